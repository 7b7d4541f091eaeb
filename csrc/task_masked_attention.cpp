// Task-masked attention on the CPU: arguments, tiles, threads. The arithmetic is in
// task_masked_attention_tile.h, the definition in memattn/reference/task_masked_attention.py, the
// tables of a mask in memattn/ops/task_mask.py.
#include <cmath>
#include <tuple>

#include "key_owners.h"

namespace memattn {
namespace {

// The arguments of both operators, in their order.
struct Inputs {
  Tensor query, key, value, task_id, bits;
  OptionalTensor slots, query_node, key_node;
  Tensor query_tiles, query_counts;
  OptionalTensor seq_start, seq_end;
  bool is_causal;
  double scale;
};

struct Call {
  TaskArgs args;
  std::vector<int64_t> task, start, query_end, key_end;
  std::vector<Tensor> tables;  // contiguous ones
};

const int32_t* table(Call& call, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int, name, " must have dtype int32");
  call.tables.push_back(torch::stable::contiguous(t));
  return static_cast<const int32_t*>(call.tables.back().data_ptr());
}

void check_values(const char* name, const int32_t* values, int64_t n, int64_t limit) {
  for (int64_t i = 0; i < n; ++i)
    STD_TORCH_CHECK(values[i] >= 0 && values[i] < limit, name, " must have values from 0 to ",
                    limit - 1, ", got ", values[i]);
}

// Refuses lists and slots that would read outside a table, or list a tile twice.
void check_lists(const TaskArgs& a, int64_t n_lists, int64_t n_slots) {
  std::vector<int64_t> listed_in(a.tile_cols, -1);
  for (int64_t list = 0; list < n_lists; ++list) {
    const int32_t *counts = a.query_counts + 2 * list, *tiles = a.query_tiles + list * a.tile_cols;
    const int64_t n = int64_t{counts[0]} + counts[1];
    STD_TORCH_CHECK(counts[0] >= 0 && counts[1] >= 0 && n <= a.tile_cols,
                    "query_counts must add up to at most ", a.tile_cols, ", got ", counts[0],
                    " and ", counts[1]);
    check_values("query_tiles", tiles, n, a.tile_cols);
    for (int64_t i = 0; i < n; ++i) {
      STD_TORCH_CHECK(listed_in[tiles[i]] != list, "query_tiles must list a tile once, got ",
                      tiles[i], " twice");
      listed_in[tiles[i]] = list;
      if (a.slots && i >= counts[0])
        check_values("slots", a.slots + list * a.tile_cols + tiles[i], 1, n_slots);
    }
  }
}

void read_mask(const Inputs& in, Call& call) {
  TaskArgs& a = call.args;
  STD_TORCH_CHECK(in.query_tiles.dim() == 4, "query_tiles must have 4 axes, got ",
                  in.query_tiles.dim());
  const int64_t N = in.query_tiles.size(0);
  a.mask_heads = in.query_tiles.size(1);
  STD_TORCH_CHECK(a.mask_heads == 1 || a.mask_heads == a.H, "query_tiles must have one head or ",
                  a.H, ", got ", a.mask_heads);
  a.tile_rows = (a.T + MASK_TILE - 1) / MASK_TILE, a.tile_cols = (a.S + MASK_TILE - 1) / MASK_TILE;
  check_shape("query_tiles", in.query_tiles, {N, a.mask_heads, a.tile_rows, a.tile_cols});
  check_shape("query_counts", in.query_counts, {N, a.mask_heads, a.tile_rows, 2});
  STD_TORCH_CHECK(in.bits.dim() == 2, "bits must have 2 axes, got ", in.bits.dim());
  const int64_t rows = in.bits.size(0);
  a.words = in.bits.size(1);
  a.bits = table(call, "bits", in.bits);
  a.query_tiles = table(call, "query_tiles", in.query_tiles);
  a.query_counts = table(call, "query_counts", in.query_counts);
  int64_t n_slots = 0;
  if (in.slots) {
    check_shape("slots", *in.slots, {N, a.mask_heads, a.tile_rows, a.tile_cols});
    check_shape("bits", in.bits, {rows, MASK_TILE / 32});
    a.slots = table(call, "slots", *in.slots);
    n_slots = rows / MASK_TILE;
  } else {
    STD_TORCH_CHECK(in.query_node && in.key_node, "slots or both nodes must be given");
    check_shape("query_node", *in.query_node, {a.T});
    check_shape("key_node", *in.key_node, {a.S});
    a.query_node = table(call, "query_node", *in.query_node);
    a.key_node = table(call, "key_node", *in.key_node);
    a.nodes = rows / std::max<int64_t>(N * a.mask_heads, 1);
    check_shape("bits", in.bits, {N * a.mask_heads * a.nodes, (a.nodes + 31) / 32});
    check_values("query_node", a.query_node, a.T, a.nodes);
    check_values("key_node", a.key_node, a.S, a.nodes);
  }
  check_lists(a, N * a.mask_heads * a.tile_rows, n_slots);
  check_shape("task_id", in.task_id, {a.B});
  check_values("task_id", table(call, "task_id", in.task_id), a.B, N);
  call.task = int_values(in.task_id);
}

void make_call(const Inputs& in, Call& call) {
  STD_TORCH_CHECK(in.query.dim() == 4 && in.key.dim() == 4 && in.value.dim() == 4,
                  "query, key and value must have 4 axes");
  TaskArgs& a = call.args;
  a = TaskArgs{};
  a.B = in.query.size(0), a.H = in.query.size(1), a.T = in.query.size(2), a.D = in.query.size(3);
  a.Hkv = in.key.size(1), a.S = in.key.size(2), a.Dv = in.value.size(3);
  STD_TORCH_CHECK(a.H > 0 && a.Hkv > 0 && a.H % a.Hkv == 0,
                  "the heads of key must divide those of query, got ", a.H, " and ", a.Hkv);
  STD_TORCH_CHECK(a.S < INT32_MAX && a.T < INT32_MAX, "memattn_cpp takes lengths below 2^31");
  check_shape("key", in.key, {a.B, a.Hkv, a.S, a.D});
  check_shape("value", in.value, {a.B, a.Hkv, a.S, a.Dv});
  check_bounds("seq_start", in.seq_start, a.B);
  check_bounds("seq_end", in.seq_end, a.B);
  a.is_causal = in.is_causal, a.scale = in.scale;
  a.query = view_of(in.query), a.key = view_of(in.key), a.value = view_of(in.value);
  read_mask(in, call);
  call.start = in.seq_start ? int_values(*in.seq_start) : std::vector<int64_t>(a.B, 0);
  call.key_end = in.seq_end ? int_values(*in.seq_end) : std::vector<int64_t>(a.B, INT32_MAX);
  call.query_end.resize(a.B);
  for (int64_t b = 0; b < a.B; ++b) {
    STD_TORCH_CHECK(call.start[b] >= 0, "seq_start must be at least 0, got ", call.start[b]);
    const int64_t start = call.start[b], end = call.key_end[b];
    call.query_end[b] = std::max(start, std::min(end, a.T));
    call.key_end[b] = std::max(start, std::min(end, a.S));
  }
  a.task = call.task.data(), a.start = call.start.data();
  a.query_end = call.query_end.data(), a.key_end = call.key_end.data();
}

// Tiles of the queries [t_begin, t_end), counted from the sequence's start.
std::vector<Tile> tiles_of(const TaskArgs& a, int64_t b, int64_t hkv, int64_t t_begin,
                           int64_t t_end) {
  return make_tiles(a, b, hkv, t_begin, t_end, a.mask_heads == 1);
}

// Fills the rows of `data`, [B, H, T, width], that lie outside the sequences.
template <class Element>
void fill_outside(const TaskArgs& a, Element* data, int64_t width, Element value) {
  for (int64_t head = 0; head < a.B * a.H; ++head) {
    const int64_t b = head / a.H, start = std::min(a.start[b], a.T);
    Element* rows = data + head * a.T * width;
    std::fill(rows, rows + start * width, value);
    std::fill(rows + std::min(a.query_end[b], a.T) * width, rows + a.T * width, value);
  }
}

void zero_outside(const TaskArgs& a, Tensor& t, int64_t width) {
  if (t.element_size() == 4) fill_outside(a, static_cast<float*>(t.data_ptr()), width, 0.0f);
  else fill_outside(a, static_cast<uint16_t*>(t.data_ptr()), width, uint16_t{0});
}

std::tuple<Tensor, Tensor, Tensor> run_forward(const Inputs& in) {
  Call call;
  make_call(in, call);
  TaskArgs& a = call.args;
  Tensor out = empty({a.B, a.H, a.T, a.Dv}, in.query, in.query.scalar_type());
  Tensor lse = empty({a.B, a.H, a.T}, in.query, ScalarType::Float);
  Tensor lse2 = empty({2, a.B, a.H, a.T}, in.query, ScalarType::Float);
  zero_outside(a, out, a.Dv);
  a.out = view_of(out);
  a.lse = static_cast<float*>(lse.data_ptr());
  take_pair(lse2, a.lse2_high, a.lse2_low);
  fill_outside(a, a.lse, 1, -INFINITY), fill_outside(a, a.lse2_high, 1, -INFINITY);
  fill_outside(a, a.lse2_low, 1, 0.0f);
  std::vector<Tile> tiles;
  for (int64_t b = 0; b < a.B; ++b)
    for (int64_t hkv = 0; hkv < a.Hkv; ++hkv) {
      const auto more = tiles_of(a, b, hkv, 0, a.query_end[b] - a.start[b]);
      tiles.insert(tiles.end(), more.begin(), more.end());
    }
  const auto& k = kernels().task;
  parallel_work(
      tiles.size(), [&] { return buffer(k.forward_scratch(a)); },
      [&](int64_t i, Buffer& scratch) { k.forward(a, tiles[i], scratch.get()); });
  return {out, lse, lse2};
}

// ---- backward ----------------------------------------------------------------------------------

// The keys that one tile of queries reaches, [a.S, 0) for none.
Reach reach(const TaskArgs& a, const Tile& tile) {
  const int64_t list = a.list(tile.b, tile.h0, tile.t0), start = a.start[tile.b];
  const int32_t* tiles = a.query_tiles + list * a.tile_cols;
  Reach found{a.S, 0};
  for (int64_t i = 0; i < a.query_counts[2 * list] + a.query_counts[2 * list + 1]; ++i) {
    const int64_t j = start + tiles[i] * MASK_TILE;
    int64_t end = std::min(j + MASK_TILE, a.key_end[tile.b]);
    if (a.is_causal) end = std::min(end, start + tile.t1);
    if (j >= end) continue;
    found.begin = std::min(found.begin, j), found.end = std::max(found.end, end);
  }
  return found;
}

// Chunks of a key head: none of fewer queries.
int64_t chunks_of(const TaskArgs& a) {
  constexpr int64_t FEWEST_ROWS = 256;
  return chunks_of_head(a.Hkv, a.T / FEWEST_ROWS);
}

// Splits the queries of a sequence into at most `n` chunks of about equal work, at ends of tiles.
std::vector<int64_t> split_rows(const TaskArgs& a, int64_t b, int64_t n) {
  const int64_t T = a.query_end[b] - a.start[b], step = kernels().tile_rows;
  auto work = [&](int64_t t) {
    const int32_t* counts = a.query_counts + 2 * a.list(b, 0, t);
    const int64_t tiles = counts[0] + counts[1];
    return 1 + (a.is_causal ? std::min(tiles, t / MASK_TILE + 1) : tiles);
  };
  int64_t all = 0, done = 0;
  for (int64_t t = 0; t < T; t += step) all += work(t);
  std::vector<int64_t> bounds{0};
  for (int64_t t = 0; t + step < T; t += step) {
    done += work(t);
    const auto next = static_cast<int64_t>(bounds.size());
    if (next < n && done * n >= all * next) bounds.push_back(t + step);
  }
  bounds.push_back(T);
  return bounds;
}

std::tuple<Tensor, Tensor, Tensor> run_backward(const Inputs& in, const Tensor& d_out,
                                                Tensor d_lse, const Tensor& out, Tensor lse2) {
  Call call;
  make_call(in, call);
  TaskArgs& a = call.args;
  const ScalarType dtype = in.query.scalar_type();
  Tensor d_query = empty({a.B, a.H, a.T, a.D}, in.query, dtype);
  Tensor d_key = empty({a.B, a.Hkv, a.S, a.D}, in.query, dtype);
  Tensor d_value = empty({a.B, a.Hkv, a.S, a.Dv}, in.query, dtype);
  zero_outside(a, d_query, a.D);
  for (const Tensor* t : {&d_out, &out}) check_shape("out", *t, {a.B, a.H, a.T, a.Dv});
  check_shape("d_lse", d_lse, {a.B, a.H, a.T});
  check_shape("lse2", lse2, {2, a.B, a.H, a.T});
  d_lse = torch::stable::contiguous(d_lse), lse2 = torch::stable::contiguous(lse2);
  a.out = view_of(out), a.d_out = view_of(d_out), a.d_query = view_of(d_query);
  take_pair(lse2, a.lse2_high, a.lse2_low);
  a.d_lse = static_cast<const float*>(d_lse.data_ptr());

  const auto& k = kernels().task;
  const KeyGradients gradients(view_of(d_key), view_of(d_value), a.S, a.D, a.Dv, a.scale);
  std::vector<KeyChunk> chunks;
  for (int64_t b = 0; b < a.B; ++b) {
    const auto bounds = split_rows(a, b, chunks_of(a));
    for (int64_t hkv = 0; hkv < a.Hkv; ++hkv)
      for (size_t c = 0; c + 1 < bounds.size(); ++c)
        chunks.push_back({b * a.Hkv + hkv, bounds[c], bounds[c + 1]});
  }
  run_owners(
      gradients, chunks, a.B * a.Hkv, k.backward_scratch(a),
      [&](const KeyChunk& c) {
        return tiles_of(a, c.owner / a.Hkv, c.owner % a.Hkv, c.begin, c.end);
      },
      [&](const Tile& tile) { return reach(a, tile); },
      [&](const Tile& tile, const KeyGrads& grads, float* scratch) {
        k.backward(a, tile, grads, scratch);
      });
  return {d_query, d_key, d_value};
}

// the lists by tiles of keys are not read: both passes go through the tiles of queries
#define MEMATTN_PARAMETERS                                                                     \
  Tensor query, Tensor key, Tensor value, Tensor task_id, Tensor bits, OptionalTensor slots,   \
      OptionalTensor query_node, OptionalTensor key_node, Tensor query_tiles,                  \
      Tensor query_counts, Tensor, Tensor, OptionalTensor seq_start, OptionalTensor seq_end,   \
      bool is_causal, double scale
#define MEMATTN_TAKEN                                                                          \
  Inputs{query,    key,         value,        task_id,   bits,    slots,     query_node,       \
         key_node, query_tiles, query_counts, seq_start, seq_end, is_causal, scale}

std::tuple<Tensor, Tensor, Tensor> forward(MEMATTN_PARAMETERS) {
  return run_forward(MEMATTN_TAKEN);
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor d_out, Tensor d_lse, Tensor out, Tensor lse2,
                                            MEMATTN_PARAMETERS) {
  return run_backward(MEMATTN_TAKEN, d_out, d_lse, out, lse2);
}

}  // namespace
}  // namespace memattn

// the schemas are made from the signature in memattn_kernels/signatures.py
STABLE_TORCH_LIBRARY_IMPL(memattn_cpp, CPU, m) {
  m.impl("task_masked_attention", TORCH_BOX(&memattn::forward));
  m.impl("task_masked_attention_backward", TORCH_BOX(&memattn::backward));
}
