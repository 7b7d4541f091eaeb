// Attention to selected chapters on the CPU: lists of rows by chapter, owners, threads. The arithmetic
// is in chapter_attention_tile.h, the definition in memattn/reference/chapter_attention.py.
#include <tuple>

#include "chapter_index.h"
#include "gradient_sums.h"

namespace memattn {
namespace {

// The arguments of both operators, in their order.
struct Inputs {
  Tensor query, key, value, indices;
  OptionalTensor weights, key_scale, value_scale;
  Tensor row_start, row_end;
  int64_t row_len, value_dim;
  bool is_joint;
  double scale;
};

#define MEMATTN_PARAMETERS                                                                        \
  Tensor query, Tensor key, Tensor value, Tensor indices, OptionalTensor weights,                 \
      OptionalTensor key_scale, OptionalTensor value_scale, Tensor row_start, Tensor row_end,     \
      int64_t row_len, int64_t value_dim, bool is_joint, double scale
#define MEMATTN_TAKEN                                                                             \
  Inputs{query,     key,     value,   indices,   weights,  key_scale, value_scale,                \
         row_start, row_end, row_len, value_dim, is_joint, scale}

const int32_t* int32_data(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  check_shape(name, t, sizes);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous(), name,
                  " must be contiguous and int32");
  return static_cast<const int32_t*>(t.data_ptr());
}

BankView bank_of(const Tensor& t, const OptionalTensor& scale) {
  BankView bank;
  bank.view.data = t.data_ptr();
  for (int64_t i = 0; i < 4; ++i) bank.view.stride[i] = t.stride(i);
  if (!scale) {
    bank.view.dtype = dtype_of(t);
    return bank;
  }
  bank.bits = t.scalar_type() == ScalarType::Byte ? 4 : 8;
  bank.scale = static_cast<const float*>(scale->data_ptr());
  for (int64_t i = 0; i < 3; ++i) bank.scale_stride[i] = scale->stride(i);
  return bank;
}

RoutingRows rows_of(const Inputs& in) {
  const int64_t B = in.query.size(0), T = in.query.size(2), N = in.indices.size(1);
  RoutingRows rows{B, N, in.indices.size(2), T};
  rows.indices = int32_data("indices", in.indices, {B, N, rows.K});
  rows.row_start = int32_data("row_start", in.row_start, {B, N});
  rows.row_end = int32_data("row_end", in.row_end, {B, N});
  rows.is_joint = in.is_joint;
  rows.weights = nullptr;
  if (in.weights) {
    check_shape("weights", *in.weights, {B, N, rows.K});
    STD_TORCH_CHECK(in.weights->scalar_type() == ScalarType::Float && in.weights->is_contiguous(),
                    "weights must be contiguous and float32");
    rows.weights = static_cast<const float*>(in.weights->data_ptr());
  }
  STD_TORCH_CHECK(T < INT32_MAX, "memattn_cpp takes lengths below 2^31");
  for (int64_t b = 0; b < B; ++b)
    for (int64_t n = 0, end = 0; n < N; ++n) {
      const int64_t first = rows.row_start[b * N + n], last = rows.row_end[b * N + n];
      STD_TORCH_CHECK(end <= first && first <= last && last <= T, "row_start and row_end must rise");
      end = last;
    }
  return rows;
}

// The arguments of the kernels, and what they point to.
struct Call {
  RoutingRows rows;
  ChapterArgs args;
  std::vector<uint8_t> row_class;

  explicit Call(const Inputs& in) : rows(rows_of(in)) {
    ChapterArgs& a = args;
    a = ChapterArgs{};
    a.B = rows.B, a.T = rows.T, a.N = rows.N, a.K = rows.K;
    a.H = in.query.size(1), a.D = in.query.size(3), a.Dv = in.value_dim;
    a.C = in.key.size(0), a.Hkv = in.key.size(1), a.M = in.key.size(2);
    a.scale = in.scale, a.is_joint = in.is_joint;
    a.query = view_of(in.query);
    a.key = bank_of(in.key, in.key_scale), a.value = bank_of(in.value, in.value_scale);
    a.indices = rows.indices, a.weights = rows.weights;
    a.row_start = rows.row_start, a.row_end = rows.row_end;
  }

  void use(const ChapterIndex& index) {
    ChapterArgs& a = args;
    a.chapter_begin = index.begin, a.entries = index.entries;
    a.has_repeats = index.has_repeats, a.counts_slots = a.weights || a.has_repeats;
    row_class = index.row_classes(a.B * a.N, a.K, a.C, a.M, a.classes);
    a.row_class = row_class.data();
  }
};

// The queries that one thread handles at a time: as many as its cache holds, so that many of them
// share a chapter, but fewer where threads would be idle.
struct Ranges {
  std::vector<QueryRange> all;
  int64_t tokens;

  explicit Ranges(const ChapterArgs& a) {
    const int64_t threads = torch::stable::get_num_threads(), tile = kernels().tile_rows;
    const int64_t width = std::max<int64_t>(a.H / a.Hkv * (a.D + a.Dv), 1);
    const int64_t owners = std::max<int64_t>(a.B * a.Hkv, 1);
    const int64_t in_cache = std::max(CACHED_FLOATS / width, tile);
    int64_t parts = (a.T + in_cache - 1) / in_cache;
    if (owners * parts < 4 * threads && owners * parts % threads)
      parts = std::max(parts, std::min((4 * threads + owners - 1) / owners, (a.T + tile - 1) / tile));
    tokens = parts ? (a.T + parts - 1) / parts : 0;
    for (int64_t b = 0; b < a.B; ++b)
      for (int64_t hkv = 0; hkv < a.Hkv; ++hkv)
        for (int64_t t = 0; t < a.T; t += tokens)
          all.push_back({b, hkv, t, std::min(t + tokens, a.T)});
  }

  // Runs kernel(range, scratch) for all of them.
  template <class Kernel>
  void run(int64_t scratch, Kernel kernel) const {
    parallel_work(
        all.size(), [&] { return buffer(scratch); },
        [&](int64_t i, Buffer& memory) { kernel(all[i], memory.get()); });
  }

 private:
  static constexpr int64_t CACHED_FLOATS = 1 << 18;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(MEMATTN_PARAMETERS) {
  Call call(MEMATTN_TAKEN);
  ChapterArgs& a = call.args;
  Tensor index = ChapterIndex::make(call.rows, a.C, query);
  call.use(ChapterIndex(index, a.C));
  Tensor out = empty({a.B, a.H, a.T, a.Dv}, query, query.scalar_type());
  Tensor lse = empty({a.B, a.H, a.T}, query, ScalarType::Float);
  Tensor lse2 = empty({2, a.B, a.H, a.T}, query, ScalarType::Float);
  a.out = view_of(out);
  a.lse = static_cast<float*>(lse.data_ptr());
  take_pair(lse2, a.lse2_high, a.lse2_low);
  const auto& k = kernels().chapter;
  const Ranges ranges(a);
  ranges.run(k.scratch(a, ranges.tokens),
             [&](const QueryRange& range, float* scratch) { k.forward(a, range, scratch); });
  return {out, lse, lse2, index};
}

// Gradients of the weights: sums over heads for each entry, in the order of heads.
class WeightGradients {
 public:
  // `heads` key heads are summed at a time
  WeightGradients(const Call& call, int64_t heads, float* d_weights)
      : call(call), n(call.args.chapter_begin[call.args.C]), d_weights(d_weights),
        by_entry(buffer(d_weights ? heads * n : 0)) {
    if (d_weights) std::fill_n(d_weights, call.rows.B * call.rows.N * call.rows.K, 0.0f);
  }

  float* of(int64_t head) const { return d_weights ? by_entry.get() + head * n : nullptr; }

  // Adds the first `heads` sums to all slots that hold the chapter.
  void add(int64_t heads) const {
    if (!d_weights) return;
    const ChapterArgs& a = call.args;
    parallel_work(a.C, [] { return 0; }, [&](int64_t c, int) {
      for (int64_t e = a.chapter_begin[c]; e < a.chapter_begin[c + 1]; ++e) {
        const int64_t first = a.entries[e], row = a.row_of(e);
        float sum = d_weights[first];
        for (int64_t h = 0; h < heads; ++h) sum += by_entry.get()[h * n + e];
        d_weights[first] = sum;
        if (!a.has_repeats) continue;
        for (int64_t i = first + 1; i < (row + 1) * a.K; ++i)
          if (a.indices[i] == c && call.rows.holds(row, i - row * a.K, a.C)) d_weights[i] = sum;
      }
    });
  }

 private:
  const Call& call;
  const int64_t n;
  float* d_weights;
  Buffer by_entry;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor d_out, Tensor d_lse, Tensor out,
                                                    Tensor lse2, Tensor index,
                                                    MEMATTN_PARAMETERS) {
  Call call(MEMATTN_TAKEN);
  ChapterArgs& a = call.args;
  index = torch::stable::contiguous(index);
  check_shape("index", index, {a.C + 2 + a.B * a.N * a.K});
  call.use(ChapterIndex(index, a.C));
  const ScalarType dtype = query.scalar_type();
  const bool has_floats = !key_scale;
  Tensor d_query = empty({a.B, a.H, a.T, a.D}, query, dtype);
  Tensor d_key = has_floats ? empty({a.C, a.Hkv, a.M, a.D}, query, dtype)
                            : empty({0}, key, key.scalar_type());
  Tensor d_value = has_floats ? empty({a.C, a.Hkv, a.M, a.Dv}, query, dtype)
                              : empty({0}, value, value.scalar_type());
  Tensor d_weights = weights ? empty({a.B, a.N, a.K}, query, ScalarType::Float)
                             : empty({0}, query, dtype);
  out = torch::stable::contiguous(out), lse2 = torch::stable::contiguous(lse2);
  d_lse = torch::stable::contiguous(d_lse);
  a.out = view_of(out), a.d_out = view_of(d_out), a.d_query = view_of(d_query);
  take_pair(lse2, a.lse2_high, a.lse2_low);
  a.d_lse = static_cast<const float*>(d_lse.data_ptr());
  Buffer row_stats = buffer(a.B * a.H * a.T * 4);
  a.row_stats = row_stats.get();

  const auto& k = kernels().chapter;
  const Ranges ranges(a);
  ranges.run(k.scratch(a, ranges.tokens),
             [&](const QueryRange& range, float* scratch) { k.prepare(a, range, scratch); });

  const int64_t threads = torch::stable::get_num_threads(), G = a.H / a.Hkv;
  // one owner for the gradients of a key head, of rows and chapters; where that leaves threads idle,
  // rows and chapters have owners of their own, which compute the weights twice
  const bool by_head = a.Hkv >= 4 * threads || a.Hkv % threads == 0;
  if (!by_head)
    ranges.run(k.scratch(a, ranges.tokens),
               [&](const QueryRange& range, float* scratch) { k.d_query(a, range, scratch); });

  // keys and values of [C, Hkv] heads of M rows
  View no_view;
  const KeyGradients bank(has_floats ? view_of(d_key) : no_view,
                          has_floats ? view_of(d_value) : no_view, a.M, a.D, a.Dv, scale);
  const bool in_place = dtype == ScalarType::Float;
  struct State {
    Buffer scratch, sums, d_rows;
  };
  auto make_state = [&] {
    const bool has_rows = by_head && !in_place;
    return State{buffer(k.scratch(a, 0)), buffer(has_floats ? bank.floats(a.M) : 0),
                 buffer(has_rows ? a.B * G * a.T * bank.ldk : 0)};
  };
  auto do_chapter = [&](int64_t hkv, int64_t c, ChapterGrads grads, State& state) {
    const int64_t head = c * a.Hkv + hkv;
    const bool is_selected = a.chapter_begin[c] < a.chapter_begin[c + 1];
    if (is_selected) {
      if (has_floats) {
        std::fill_n(state.sums.get(), bank.floats(a.M), 0.0f);
        grads.d_key = state.sums.get(), grads.d_value = bank.values(state.sums.get(), a.M);
      }
      k.d_chapter(a, hkv, c, grads, state.scratch.get());
    }
    if (!has_floats) return;
    // without a part the gradient is 0
    bank.store(head, is_selected ? std::vector<Part>{{state.sums.get(), 0, a.M}} : std::vector<Part>{});
  };

  const int64_t together = weights ? std::min(a.Hkv, threads) : a.Hkv;
  const WeightGradients of_weights(
      call, together, weights ? static_cast<float*>(d_weights.data_ptr()) : nullptr);
  for (int64_t first = 0; first < a.Hkv; first += together) {
    const int64_t heads = std::min(together, a.Hkv - first);
    if (by_head) {
      parallel_work(heads, make_state, [&](int64_t i, State& state) {
        const int64_t hkv = first + i, row = a.T * a.D;
        ChapterGrads grads;
        grads.d_weight = of_weights.of(i);
        RowSums& sums = grads.d_query;
        sums.h0 = hkv * G;
        if (in_place) {
          sums.data = static_cast<float*>(a.d_query.data) + hkv * G * row;
          sums.stride[0] = a.H * row, sums.stride[1] = row, sums.stride[2] = a.D;
          for (int64_t b = 0; b < a.B; ++b) std::fill_n(sums.row(b, hkv * G, 0), G * row, 0.0f);
        } else {
          const int64_t ld = bank.ldk;
          sums.data = state.d_rows.get();
          sums.stride[0] = G * a.T * ld, sums.stride[1] = a.T * ld, sums.stride[2] = ld;
          std::fill_n(sums.data, a.B * G * a.T * ld, 0.0f);
        }
        for (int64_t c = 0; c < a.C; ++c) do_chapter(hkv, c, grads, state);
        if (in_place) return;
        for (int64_t b = 0; b < a.B; ++b)
          store_sum(a.d_query, (b * a.H + hkv * G) * row, G * a.T, a.D, bank.ldk, 1.0f,
                    {{sums.row(b, hkv * G, 0), 0, G * a.T}});
      });
    } else {
      parallel_work(heads * a.C, make_state, [&](int64_t i, State& state) {
        ChapterGrads grads;
        grads.d_weight = of_weights.of(i / a.C);
        do_chapter(first + i / a.C, i % a.C, grads, state);
      });
    }
    of_weights.add(heads);
  }
  return {d_query, d_key, d_value, d_weights};
}

}  // namespace
}  // namespace memattn

// the schemas are made from the signature in memattn_kernels/signatures.py
STABLE_TORCH_LIBRARY_IMPL(memattn_cpp, CPU, m) {
  m.impl("chapter_attention", TORCH_BOX(&memattn::forward));
  m.impl("chapter_attention_backward", TORCH_BOX(&memattn::backward));
}
