// Future attention and its loss on the CPU: arguments, tiles, threads. Who sees what is in
// future_rows.h, the arithmetic in future_attention_tile.h, the definition in
// memattn/reference/future_attention.py.
#include <map>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "future_chunks.h"
#include "future_rows.h"
#include "gradient_sums.h"

namespace memattn {
namespace {

// The arguments of all four operators, in their order.
struct Inputs {
  Tensor query, key, value, future_key, future_value;
  OptionalTensor future_query, cu_seqlens, seq_start, seq_end;
  int64_t table_len;
  bool by_distance;
  int64_t future_dim, query_offset;
  double scale;
  std::optional<std::string> loss_type;
  bool detach_target;
};

struct Call {
  FutureArgs args;
  std::vector<FutureRow> rows;
};

FutureLoss loss_of(const std::optional<std::string>& loss_type) {
  if (!loss_type) return FutureLoss::none;
  STD_TORCH_CHECK(*loss_type == "mse" || *loss_type == "cosine",
                  "loss_type must be one of mse, cosine, got ", *loss_type);
  return *loss_type == "mse" ? FutureLoss::mse : FutureLoss::cosine;
}

View table_view(const Tensor& table) {
  View view = view_of(table);
  if (table.dim() == 3)
    for (int i = 3; i >= 0; --i) view.stride[i] = i ? view.stride[i - 1] : 0;
  return view;
}

Call make_call(const Inputs& in) {
  STD_TORCH_CHECK(in.query.dim() == 4 && in.key.dim() == 4 && in.value.dim() == 4,
                  "query, key and value must have 4 axes");
  STD_TORCH_CHECK(in.future_key.dim() == 3 || in.future_key.dim() == 4,
                  "future_key must have 3 or 4 axes, got ", in.future_key.dim());
  Call call;
  FutureArgs& a = call.args;
  a = FutureArgs{};
  a.B = in.query.size(0), a.H = in.query.size(1), a.T = in.query.size(2), a.D = in.query.size(3);
  a.Hkv = in.key.size(1), a.S = in.key.size(2), a.Dv = in.value.size(3);
  const int64_t head_axis = in.future_key.dim() - 3;
  a.Hf = in.future_key.size(head_axis), a.R = in.future_key.size(head_axis + 1);
  STD_TORCH_CHECK(a.H > 0 && a.Hkv > 0 && a.Hf > 0 && a.H % a.Hkv == 0 && a.H % a.Hf == 0,
                  "the heads of key and future_key must divide those of query, got ", a.H, ", ",
                  a.Hkv, " and ", a.Hf);
  check_shape("key", in.key, {a.B, a.Hkv, a.S, a.D});
  check_shape("value", in.value, {a.B, a.Hkv, a.S, a.Dv});
  if (head_axis) {
    check_shape("future_key", in.future_key, {a.B, a.Hf, a.R, a.D});
    check_shape("future_value", in.future_value, {a.B, a.Hf, a.R, a.Dv});
  } else {
    check_shape("future_key", in.future_key, {a.Hf, a.R, a.D});
    check_shape("future_value", in.future_value, {a.Hf, a.R, a.Dv});
  }
  if (in.future_query) check_shape("future_query", *in.future_query, {a.B, a.H, a.T, a.D});
  a.scale = in.scale, a.loss = loss_of(in.loss_type);
  a.query = view_of(in.query), a.key = view_of(in.key), a.value = view_of(in.value);
  a.future_key = table_view(in.future_key), a.future_value = table_view(in.future_value);
  a.separate_query = in.future_query.has_value();
  a.future_query = a.separate_query ? view_of(*in.future_query) : a.query;
  call.rows = future_rows(a, in.cu_seqlens, in.seq_start, in.seq_end,
                          {in.table_len, in.by_distance, in.future_dim}, in.query_offset);
  a.rows = call.rows.data();
  return call;
}

// Rows that count for the loss, over all sequences and heads; at least 1.
int64_t count_whole(const FutureArgs& a) {
  int64_t count = 0;
  for (int64_t b = 0; b < a.B; ++b)
    for (int64_t t = 0; t < a.T; ++t) {
      const FutureRow& r = a.rows[b * a.rows_stride + t];
      count += r.mid < r.hi;
    }
  return std::max<int64_t>(count * a.H, 1);
}

// What a forward pass leaves: the results, and what the backward needs besides.
struct Results {
  Tensor out, out_future, lse, lse2, target, target_lse2, loss;
};

Results run_forward(const Inputs& in) {
  Call call = make_call(in);
  FutureArgs& a = call.args;
  const bool has_loss = a.loss != FutureLoss::none;
  const Tensor& like = in.query;
  const ScalarType dtype = like.scalar_type(), wide = ScalarType::Float;
  // the loss is taken from what was not rounded
  Results r{empty({a.B, a.H, a.T, a.Dv}, like, dtype),
            empty({a.B, a.H, a.T, a.Dv}, like, has_loss ? wide : dtype),
            empty({a.B, a.H, a.T}, like, wide),
            empty({2, a.B, a.H, a.T}, like, wide),
            has_loss ? empty({a.B, a.H, a.T, a.Dv}, like, wide) : empty({0}, like, wide),
            has_loss ? empty({2, a.B, a.H, a.T}, like, wide) : empty({0}, like, wide),
            has_loss ? empty({}, like, wide) : empty({0}, like, wide)};
  a.out = view_of(r.out), a.out_future = view_of(r.out_future), a.target = view_of(r.target);
  auto floats = [](Tensor& t) { return static_cast<float*>(t.data_ptr()); };
  a.lse = floats(r.lse);
  take_pair(r.lse2, a.lse2_high, a.lse2_low);
  take_pair(r.target_lse2, a.target2_high, a.target2_low);
  std::vector<double> row_loss(has_loss ? a.B * a.H * a.T : 0);
  a.row_loss = row_loss.data();

  std::vector<Tile> tiles;
  for (int64_t b = 0; b < a.B; ++b)
    for (int64_t hkv = 0; hkv < a.Hkv; ++hkv) {
      const auto more = make_tiles(a, b, hkv, 0, a.T);
      tiles.insert(tiles.end(), more.begin(), more.end());
    }
  const auto& k = kernels().future;
  parallel_work(
      tiles.size(), [&] { return buffer(k.forward_scratch(a)); },
      [&](int64_t i, Buffer& scratch) { k.forward(a, tiles[i], scratch.get()); });
  const double sum = std::accumulate(row_loss.begin(), row_loss.end(), 0.0);
  if (has_loss) *floats(r.loss) = static_cast<float>(sum / static_cast<double>(count_whole(a)));
  return r;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// `a` has everything but the gradients that this makes.
Gradients run_backward(const Inputs& in, FutureArgs& a) {
  const ScalarType dtype = in.query.scalar_type();
  const bool per_sequence = in.future_key.dim() == 4;
  const int64_t D = a.D, Dv = a.Dv;
  auto table = [&](int64_t width) {
    return per_sequence ? empty({a.B, a.Hf, a.R, width}, in.query, dtype)
                        : empty({a.Hf, a.R, width}, in.query, dtype);
  };
  Tensor d_query = empty({a.B, a.H, a.T, D}, in.query, dtype);
  Tensor d_key = empty({a.B, a.Hkv, a.S, D}, in.query, dtype);
  Tensor d_value = empty({a.B, a.Hkv, a.S, Dv}, in.query, dtype);
  Tensor d_future_key = table(D), d_future_value = table(Dv);
  Tensor d_future_query = a.separate_query ? empty({a.B, a.H, a.T, D}, in.query, dtype)
                                           : empty({0}, in.query, dtype);  // there is none
  a.d_query = view_of(d_query), a.d_future_query = view_of(d_future_query);

  const auto& k = kernels().future;
  const KeyGradients tokens(view_of(d_key), view_of(d_value), a.S, D, Dv, a.scale);
  const KeyGradients tables(view_of(d_future_key), view_of(d_future_value), a.R, D, Dv, a.scale);
  const FutureOwners owners(a, per_sequence);
  std::vector<FutureChunk> chunks;
  for (int64_t owner = 0; owner < owners.count(); ++owner)
    for (FutureChunk& chunk : future_chunks(a, owners, owner)) chunks.push_back(std::move(chunk));

  // rows of the token gradients, from all units of one key head in one sequence
  auto store_tokens = [&](int64_t head, const std::vector<const FutureUnit*>& units) {
    std::vector<Part> parts;
    for (const FutureUnit* u : units) parts.push_back({u->sums.get(), u->key_begin, u->key_end});
    tokens.store(head, parts);
  };
  // rows of the table's gradients, from the chunks [first, last) of one owner
  auto store_table = [&](size_t first, size_t last, int64_t head) {
    const int64_t owner = chunks[first].owner;
    const int64_t table = owner / owners.groups;  // 0 where it is shared
    std::vector<Part> parts;
    for (size_t c = first; c < last; ++c) {
      const FutureChunk& ch = chunks[c];
      const float* sums = ch.sums.get() + head * tables.floats(ch.future_end - ch.future_begin);
      parts.push_back({sums, ch.future_begin, ch.future_end});
    }
    const int64_t first_head = owner % owners.groups * owners.table_heads;
    tables.store(table * a.Hf + first_head + head, parts);
  };

  // a unit that has all queries of its key head stores its sums at once, so that its thread uses
  // their memory again
  struct State {
    Buffer scratch, sums;
    int64_t floats = 0;
  };
  parallel_work(
      chunks.size(), [&] { return State{buffer(k.backward_scratch(a)), nullptr}; },
      [&](int64_t i, State& state) {
        FutureChunk& c = chunks[i];
        const int64_t future_rows = c.future_end - c.future_begin;
        const int64_t table_floats = owners.table_heads * tables.floats(future_rows);
        c.sums = buffer(table_floats);
        std::fill_n(c.sums.get(), table_floats, 0.0f);
        FutureGrads g{};
        g.d_future_key = c.sums.get();
        g.d_future_value = tables.values(g.d_future_key, future_rows);
        g.future_begin = c.future_begin, g.future_rows = future_rows;
        g.table_head_begin = c.owner % owners.groups * owners.table_heads;
        for (FutureUnit& unit : c.units) {
          const int64_t keys = unit.key_end - unit.key_begin, floats = tokens.floats(keys);
          if (!state.sums || state.floats < floats)
            state.sums = buffer(floats), state.floats = floats;
          unit.sums = std::move(state.sums);
          std::fill_n(unit.sums.get(), floats, 0.0f);
          g.d_key = unit.sums.get(), g.d_value = tokens.values(g.d_key, keys);
          g.key_begin = unit.key_begin;
          for (const Tile& tile : make_tiles(a, unit.b, unit.hkv, unit.t_begin, unit.t_end))
            k.backward(a, tile, g, state.scratch.get());
          if (unit.t_end - unit.t_begin == a.T) {
            store_tokens(unit.b * a.Hkv + unit.hkv, {&unit});
            state.sums = std::move(unit.sums);
          }
        }
        if (owners.split == 1) {
          for (int64_t head = 0; head < owners.table_heads; ++head) store_table(i, i + 1, head);
          c.sums.reset();
        }
      });

  if (owners.split > 1) {
    using Units = std::vector<const FutureUnit*>;
    std::map<int64_t, Units> shared;
    std::vector<size_t> first_chunk;
    for (size_t c = 0; c < chunks.size(); ++c) {
      if (!c || chunks[c].owner != chunks[c - 1].owner) first_chunk.push_back(c);
      for (const FutureUnit& unit : chunks[c].units)
        if (unit.sums) shared[unit.b * a.Hkv + unit.hkv].push_back(&unit);
    }
    first_chunk.push_back(chunks.size());
    const std::vector<std::pair<int64_t, Units>> heads(shared.begin(), shared.end());
    const int64_t tables = owners.count() * owners.table_heads;
    const int64_t n = static_cast<int64_t>(heads.size()) + tables;
    parallel_work(n, [] { return 0; }, [&](int64_t i, int) {
      if (i >= tables) return store_tokens(heads[i - tables].first, heads[i - tables].second);
      const int64_t owner = i / owners.table_heads;
      store_table(first_chunk[owner], first_chunk[owner + 1], i % owners.table_heads);
    });
  }
  return {d_query, d_key, d_value, d_future_key, d_future_value, d_future_query};
}

// Checks what a forward pass returned and its cotangents, and points `a` at them.
struct Saved {
  Tensor out, out_future, lse2, d_lse;
};

void take_saved(FutureArgs& a, const Tensor& d_out, Saved& s) {
  check_shape("d_out", d_out, {a.B, a.H, a.T, a.Dv});
  check_shape("out", s.out, {a.B, a.H, a.T, a.Dv});
  check_shape("out_future", s.out_future, {a.B, a.H, a.T, a.Dv});
  check_shape("d_lse", s.d_lse, {a.B, a.H, a.T});
  check_shape("lse2", s.lse2, {2, a.B, a.H, a.T});
  for (Tensor* t : {&s.out, &s.out_future, &s.lse2, &s.d_lse}) *t = torch::stable::contiguous(*t);
  a.d_out = view_of(d_out), a.out = view_of(s.out), a.out_future = view_of(s.out_future);
  take_pair(s.lse2, a.lse2_high, a.lse2_low);
  a.d_lse = static_cast<const float*>(s.d_lse.data_ptr());
}

#define MEMATTN_PARAMETERS                                                                       \
  Tensor query, Tensor key, Tensor value, Tensor future_key, Tensor future_value,                \
      OptionalTensor future_query, OptionalTensor cu_seqlens, OptionalTensor seq_start,          \
      OptionalTensor seq_end, int64_t table_len, bool by_distance, int64_t future_dim,           \
      int64_t query_offset, double scale, std::optional<std::string> loss_type, bool detach_target
#define MEMATTN_TAKEN                                                                            \
  Inputs{query,     key,         value,      future_key, future_value, future_query,             \
         cu_seqlens, seq_start,   seq_end,    table_len,  by_distance,  future_dim,              \
         query_offset, scale,     loss_type,  detach_target}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(MEMATTN_PARAMETERS) {
  Results r = run_forward(MEMATTN_TAKEN);
  return {r.out, r.out_future, r.lse, r.loss, r.lse2, r.target, r.target_lse2};
}

// without a gradient of out_future or loss, that is 0
Gradients backward(Tensor d_out, OptionalTensor d_out_future, Tensor d_lse, OptionalTensor d_loss,
                   Tensor out, Tensor out_future, Tensor lse2, Tensor target, Tensor target_lse2,
                   MEMATTN_PARAMETERS) {
  const Inputs in = MEMATTN_TAKEN;
  Call call = make_call(in);
  FutureArgs& a = call.args;
  Saved saved{out, out_future, lse2, d_lse};
  take_saved(a, d_out, saved);
  Tensor zeros;
  if (a.loss == FutureLoss::none) {
    if (d_out_future) check_shape("d_out_future", *d_out_future, {a.B, a.H, a.T, a.Dv});
    else zeros = torch::stable::new_zeros(d_out, {a.B, a.H, a.T, a.Dv});
    a.d_out_future = view_of(d_out_future ? *d_out_future : zeros);
    return run_backward(in, a);
  }
  check_shape("target", target, {a.B, a.H, a.T, a.Dv});
  check_shape("target_lse2", target_lse2, {2, a.B, a.H, a.T});
  for (Tensor* t : {&target, &target_lse2}) *t = torch::stable::contiguous(*t);
  if (d_loss) check_shape("d_loss", *d_loss, {});
  a.target = view_of(target);
  take_pair(target_lse2, a.target2_high, a.target2_low);
  const double d_mean = d_loss ? *static_cast<const float*>(d_loss->data_ptr()) : 0.0;
  a.d_row_loss = d_mean / static_cast<double>(count_whole(a));
  a.through_target = !detach_target;
  return run_backward(in, a);
}

}  // namespace
}  // namespace memattn

// the schemas are made from the signature in memattn_kernels/signatures.py
STABLE_TORCH_LIBRARY_IMPL(memattn_cpp, CPU, m) {
  m.impl("future_attention", TORCH_BOX(&memattn::forward));
  m.impl("future_attention_backward", TORCH_BOX(&memattn::backward));
}
