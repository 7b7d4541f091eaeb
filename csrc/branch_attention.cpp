// Attention in branches on the CPU: lists of slots by branch, tiles, threads. The arithmetic is in
// branch_attention_tile.h, the definition in memattn/reference/branch_attention.py.
#include <tuple>

#include "key_owners.h"
#include "sequences.h"

namespace memattn {
namespace {

// The arguments of both operators, in their order.
struct Inputs {
  Tensor query, key, value, gates;
  OptionalTensor indices, cu_seqlens, seq_start, seq_end;
  bool is_causal;
  int64_t query_offset;
  double scale;
};

#define MEMATTN_PARAMETERS                                                                      \
  Tensor query, Tensor key, Tensor value, Tensor gates, OptionalTensor indices,                 \
      OptionalTensor cu_seqlens, OptionalTensor seq_start, OptionalTensor seq_end,              \
      bool is_causal, int64_t query_offset, double scale
#define MEMATTN_TAKEN                                                                           \
  Inputs{query,      key,       value,   gates,     indices,     cu_seqlens,                    \
         seq_start,  seq_end,   is_causal, query_offset, scale}

// The arguments of the kernels, and what they point to.
struct Call {
  BranchArgs args{};
  std::vector<KeyRange> ranges;
  std::vector<int64_t> list_begin;
  std::vector<int32_t> entries;
  Tensor gates;
  bool has_gaps = false;  // slots in no list

  explicit Call(const Inputs& in) : gates(torch::stable::contiguous(in.gates)) {
    BranchArgs& a = args;
    STD_TORCH_CHECK(in.query.dim() == 5 && in.key.dim() == 5 && in.value.dim() == 5,
                    "query, key and value must have 5 axes");
    a.B = in.query.size(0), a.A = in.query.size(1), a.H = in.query.size(2);
    a.T = in.query.size(3), a.D = in.query.size(4);
    a.F = in.key.size(1), a.Hkv = in.key.size(2), a.S = in.key.size(3), a.Dv = in.value.size(4);
    a.scale = in.scale;
    STD_TORCH_CHECK(a.H > 0 && a.Hkv > 0 && a.H % a.Hkv == 0,
                    "the heads of key must divide those of query, got ", a.H, " and ", a.Hkv);
    check_shape("key", in.key, {a.B, a.F, a.Hkv, a.S, a.D});
    check_shape("value", in.value, {a.B, a.F, a.Hkv, a.S, a.Dv});
    check_shape("gates", gates, {a.B, a.T, a.A});
    STD_TORCH_CHECK(gates.scalar_type() == ScalarType::Float, "gates must have dtype float32");
    STD_TORCH_CHECK(a.S < INT32_MAX && a.T * a.A < INT32_MAX,
                    "memattn_cpp takes lengths below 2^31");
    a.query = view_of(in.query), a.key = view_of(in.key), a.value = view_of(in.value);
    a.gates = static_cast<const float*>(gates.data_ptr());
    find_ranges(in);
    list_slots(in);
  }

  Tensor like_slots(const Tensor& query, int64_t width) const {
    return empty({args.B, args.A, args.H, args.T, width}, query, query.scalar_type());
  }

  // Fills the rows of slots in no list, in a contiguous [B, A, H, T, width].
  template <class Element>
  void fill_gaps(Element* data, int64_t width, Element value) const {
    const BranchArgs& a = args;
    if (!has_gaps) return;
    std::vector<uint8_t> is_listed(a.B * a.A * a.T);
    for (int64_t i = 0; i < a.B * a.F; ++i)
      for (int64_t e = a.list_begin[i]; e < a.list_begin[i + 1]; ++e)
        is_listed[(i / a.F * a.A + entries[e] % a.A) * a.T + entries[e] / a.A] = 1;
    for (int64_t slot = 0; slot < a.B * a.A; ++slot)
      for (int64_t t = 0; t < a.T; ++t)
        if (!is_listed[slot * a.T + t])
          for (int64_t h = 0; h < a.H; ++h)
            std::fill_n(data + ((slot * a.H + h) * a.T + t) * width, width, value);
  }

  void zero_gaps(const Tensor& t, int64_t width) const {
    if (t.element_size() == 4) fill_gaps(static_cast<float*>(t.data_ptr()), width, 0.0f);
    else fill_gaps(static_cast<uint16_t*>(t.data_ptr()), width, uint16_t{0});
  }

  // Tiles of the entries [begin, end) of list i for key head hkv: their rows see keys from the same
  // one on, and are summed in the same runs.
  std::vector<Tile> tiles_of(int64_t i, int64_t hkv, int64_t begin, int64_t end) const {
    const int64_t G = args.H / args.Hkv, most = kernels().tile_rows;
    std::vector<Tile> tiles;
    for (int64_t first = begin, last; first < end; first = last) {
      const KeyRange& range = range_of(i, first);
      for (last = first + 1; last < end; ++last) {
        const KeyRange& next = range_of(i, last);
        if (next.lo != range.lo || run_class(next) != run_class(range)) break;
      }
      const int64_t heads = std::clamp<int64_t>(most / (last - first), 1, G);
      for (int64_t e = first; e < last; e += most)
        for (int64_t g = 0; g < G; g += heads)
          tiles.push_back({i, hkv, hkv * G + g, hkv * G + std::min(g + heads, G), e,
                           std::min(e + most, last)});
    }
    return tiles;
  }

  Reach reach(const Tile& tile) const {  // the last row sees most
    return {range_of(tile.b, tile.t0).lo, range_of(tile.b, tile.t1 - 1).hi};
  }

 private:
  const KeyRange& range_of(int64_t i, int64_t e) const {
    return args.ranges[i / args.F * args.ranges_stride + entries[e] / args.A];
  }

  // the numbers of keys at which SumRuns changes its mind
  static int run_class(const KeyRange& range) {
    const int32_t keys = range.hi - range.lo;
    return (keys > 64) + (keys > 256);
  }

  // The keys that each token sees, none where it is outside its sequence.
  void find_ranges(const Inputs& in) {
    BranchArgs& a = args;
    const auto samples = documents_of(a.B, in.cu_seqlens, in.seq_start, in.seq_end);
    ranges.assign(samples.size() * a.T, KeyRange{0, 0});
    for_each_token(samples, a.T, in.query_offset, [&](int64_t row, int64_t i, const Document& doc) {
      if (i < doc.start || i >= doc.end) return;
      const int64_t lo = std::max<int64_t>(doc.start, 0);
      const int64_t hi = std::min({doc.end, a.S, in.is_causal ? i + 1 : a.S});
      if (lo < hi) ranges[row] = {static_cast<int32_t>(lo), static_cast<int32_t>(hi)};
    });
    a.ranges = ranges.data(), a.ranges_stride = in.seq_start || in.seq_end ? a.T : 0;
  }

  void list_slots(const Inputs& in) {
    BranchArgs& a = args;
    OptionalTensor indices;
    const int32_t* branches = nullptr;
    if (in.indices) {
      check_shape("indices", *in.indices, {a.B, a.T, a.A});
      STD_TORCH_CHECK(in.indices->scalar_type() == ScalarType::Int, "indices must be int32");
      indices = torch::stable::contiguous(*in.indices);
      branches = static_cast<const int32_t*>(indices->data_ptr());
    } else {
      STD_TORCH_CHECK(a.A == a.F, "query must have a slot for each branch without indices");
    }
    // calls visit(list, entry) for the slots that see a key
    auto for_each = [&](auto visit) {
      for (int64_t b = 0; b < a.B; ++b)
        for (int64_t t = 0; t < a.T; ++t) {
          const KeyRange& range = ranges[b * a.ranges_stride + t];
          if (range.lo >= range.hi) continue;
          for (int64_t s = 0; s < a.A; ++s) {
            const int64_t at = (b * a.T + t) * a.A + s, f = branches ? branches[at] : s;
            if (f >= 0 && f < a.F && a.gates[at] != 0.0f) visit(b * a.F + f, t * a.A + s);
          }
        }
    };
    list_begin.assign(a.B * a.F + 1, 0);
    for_each([&](int64_t list, int64_t) { ++list_begin[list + 1]; });
    for (int64_t i = 0; i < a.B * a.F; ++i) list_begin[i + 1] += list_begin[i];
    entries.resize(list_begin.back());
    std::vector<int64_t> next(list_begin.begin(), list_begin.end() - 1);
    for_each([&](int64_t list, int64_t entry) {
      entries[next[list]++] = static_cast<int32_t>(entry);
    });
    has_gaps = list_begin.back() < a.B * a.T * a.A;
    a.list_begin = list_begin.data(), a.entries = entries.data();
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(MEMATTN_PARAMETERS) {
  Call call(MEMATTN_TAKEN);
  BranchArgs& a = call.args;
  Tensor out = call.like_slots(query, a.Dv), ungated = call.like_slots(query, a.Dv);
  Tensor lse = empty({a.B, a.A, a.H, a.T}, query, ScalarType::Float);
  Tensor lse2 = empty({2, a.B, a.A, a.H, a.T}, query, ScalarType::Float);
  a.out = view_of(out), a.ungated = view_of(ungated);
  a.lse = static_cast<float*>(lse.data_ptr());
  take_pair(lse2, a.lse2_high, a.lse2_low);
  call.zero_gaps(out, a.Dv), call.zero_gaps(ungated, a.Dv);
  call.fill_gaps(a.lse, 1, -INFINITY), call.fill_gaps(a.lse2_high, 1, -INFINITY);
  call.fill_gaps(a.lse2_low, 1, 0.0f);
  std::vector<Tile> tiles;
  for (int64_t i = 0; i < a.B * a.F; ++i)
    for (int64_t hkv = 0; hkv < a.Hkv; ++hkv) {
      const auto more = call.tiles_of(i, hkv, a.list_begin[i], a.list_begin[i + 1]);
      tiles.insert(tiles.end(), more.begin(), more.end());
    }
  const auto& k = kernels().branch;
  parallel_work(
      tiles.size(), [&] { return buffer(k.forward_scratch(a)); },
      [&](int64_t i, Buffer& scratch) { k.forward(a, tiles[i], scratch.get()); });
  return {out, lse, lse2, ungated};
}

// Sums over heads, in their order.
void add_heads(const BranchArgs& a, const std::vector<double>& by_head, float* d_gates) {
  for (int64_t b = 0; b < a.B; ++b)
    for (int64_t s = 0; s < a.A; ++s)
      for (int64_t t = 0; t < a.T; ++t) {
        double sum = 0.0;
        for (int64_t h = 0; h < a.H; ++h) sum += by_head[((b * a.A + s) * a.H + h) * a.T + t];
        d_gates[(b * a.T + t) * a.A + s] = static_cast<float>(sum);
      }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor d_out, Tensor d_lse, Tensor lse2,
                                                    Tensor ungated, MEMATTN_PARAMETERS) {
  Call call(MEMATTN_TAKEN);
  BranchArgs& a = call.args;
  const ScalarType dtype = query.scalar_type();
  Tensor d_query = call.like_slots(query, a.D);
  Tensor d_key = empty({a.B, a.F, a.Hkv, a.S, a.D}, query, dtype);
  Tensor d_value = empty({a.B, a.F, a.Hkv, a.S, a.Dv}, query, dtype);
  Tensor d_gates = empty({a.B, a.T, a.A}, query, ScalarType::Float);
  check_shape("d_out", d_out, {a.B, a.A, a.H, a.T, a.Dv});
  check_shape("ungated", ungated, {a.B, a.A, a.H, a.T, a.Dv});
  check_shape("d_lse", d_lse, {a.B, a.A, a.H, a.T});
  check_shape("lse2", lse2, {2, a.B, a.A, a.H, a.T});
  call.zero_gaps(d_query, a.D);
  d_lse = torch::stable::contiguous(d_lse), lse2 = torch::stable::contiguous(lse2);
  a.out = view_of(ungated), a.d_out = view_of(d_out), a.d_query = view_of(d_query);
  take_pair(lse2, a.lse2_high, a.lse2_low);
  a.d_lse = static_cast<const float*>(d_lse.data_ptr());
  std::vector<double> d_gate(a.B * a.A * a.H * a.T);
  a.d_gate = d_gate.data();

  constexpr int64_t FEWEST_ROWS = 256;
  const auto& k = kernels().branch;
  const KeyGradients gradients(view_of(d_key), view_of(d_value), a.S, a.D, a.Dv, a.scale);
  std::vector<KeyChunk> chunks;
  for (int64_t i = 0; i < a.B * a.F; ++i)
    for (int64_t hkv = 0; hkv < a.Hkv; ++hkv) {
      const int64_t begin = a.list_begin[i], n = a.list_begin[i + 1] - begin;
      const int64_t parts = chunks_of_head(a.Hkv, n / FEWEST_ROWS);
      for (int64_t c = 0; c < parts; ++c)
        chunks.push_back({i * a.Hkv + hkv, begin + n * c / parts, begin + n * (c + 1) / parts});
    }
  run_owners(
      gradients, chunks, a.B * a.F * a.Hkv, k.backward_scratch(a),
      [&](const KeyChunk& c) {
        return call.tiles_of(c.owner / a.Hkv, c.owner % a.Hkv, c.begin, c.end);
      },
      [&](const Tile& tile) { return call.reach(tile); },
      [&](const Tile& tile, const KeyGrads& grads, float* scratch) {
        k.backward(a, tile, grads, scratch);
      });
  add_heads(a, d_gate, static_cast<float*>(d_gates.data_ptr()));
  return {d_query, d_key, d_value, d_gates};
}

}  // namespace
}  // namespace memattn

// the schemas are made from the signature in memattn_kernels/signatures.py
STABLE_TORCH_LIBRARY_IMPL(memattn_cpp, CPU, m) {
  m.impl("branch_attention", TORCH_BOX(&memattn::forward));
  m.impl("branch_attention_backward", TORCH_BOX(&memattn::backward));
}
