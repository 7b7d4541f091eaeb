// Segmented attention on the CPU: index sets, tiles, threads. The arithmetic is in
// segmented_attention_tile.h, the definition in memattn/reference/segmented_attention.py.
#include <tuple>

#include "sequences.h"
#include "sliding_sums.h"

namespace memattn {
namespace {

// The arguments of both operators, in their order.
struct Inputs {
  Tensor query, key, value;
  OptionalTensor persistent_key, persistent_value, memory_key, memory_value;
  OptionalTensor cu_seqlens, seq_start, seq_end;
  OptionalInt segment_len, window_size, num_sink_tokens;
  bool is_causal, memory_is_causal;
  int64_t query_offset;
  double scale;
  std::optional<double> softcap;
};

struct Call {
  SegmentedArgs args;
  std::vector<RowRange> rows;
};

RowRange row_range(const SegmentedArgs& a, int64_t i, const Document& doc, int64_t first_segment,
                   const Inputs& in) {
  const OptionalInt &segment_len = in.segment_len, &window_size = in.window_size;
  RowRange r{0, 0, 0, 0, 0, 0, 0};
  if (i < doc.start || i >= doc.end) return r;
  int64_t lo = doc.start, hi = doc.end;
  if (segment_len || window_size) {
    lo = hi = i;
    if (segment_len) {
      lo = i - (i - doc.start) % *segment_len;
      hi = lo + *segment_len;
    }
    if (window_size) {
      const int64_t w = std::min<int64_t>(*window_size, INT32_MAX);
      lo = std::min(lo, i - w + 1);
      hi = std::max(hi, i + w);
    }
    if (in.num_sink_tokens) {
      const int64_t first = std::max(doc.start, int64_t{0});
      const int64_t last = first + std::min<int64_t>(*in.num_sink_tokens, a.S);
      if (lo <= last) {
        lo = first, hi = std::max(hi, last);
      } else {
        r.sink_lo = static_cast<int32_t>(std::min(first, a.S));
        r.sink_hi = static_cast<int32_t>(std::max<int64_t>(r.sink_lo, std::min({last, doc.end, a.S})));
      }
    }
  }
  if (in.is_causal) hi = i + 1;
  lo = std::max({lo, doc.start, int64_t{0}});
  hi = std::min({hi, doc.end, a.S});
  if (lo < hi) r.lo = static_cast<int32_t>(lo), r.hi = static_cast<int32_t>(hi);
  r.persistent = static_cast<int32_t>(a.P);
  if (a.M) {
    r.segment = static_cast<int32_t>(first_segment + (i - doc.start) / *segment_len);
    r.memory = static_cast<int32_t>(
        in.memory_is_causal ? std::min(a.M, (i - doc.start) % *segment_len + 1) : a.M);
  }
  return r;
}

// What every query sees; refuses anything that would read outside a tensor.
std::vector<RowRange> row_ranges(SegmentedArgs& a, const Inputs& in) {
  const int64_t n_segments = in.memory_key ? in.memory_key->size(2) : 0;
  STD_TORCH_CHECK(a.S < INT32_MAX && a.T < INT32_MAX, "memattn_cpp takes lengths below 2^31");
  const auto samples = documents_of(a.B, in.cu_seqlens, in.seq_start, in.seq_end);
  // the first segment of each document among all segments
  std::vector<int64_t> first_segment{0};
  const int64_t len = in.segment_len.value_or(INT32_MAX);
  if (!samples.empty())
    for (const Document& doc : samples[0])
      first_segment.push_back(first_segment.back() + (doc.end - doc.start + len - 1) / len);
  std::vector<RowRange> rows(samples.size() * a.T);
  for_each_token(samples, a.T, in.query_offset, [&](int64_t row, int64_t i, const Document& doc) {
    RowRange& r = rows[row];
    r = row_range(a, i, doc, first_segment[doc.number], in);
    STD_TORCH_CHECK(!r.memory || r.segment < n_segments, "memory_key must have at least n_segments=",
                    r.segment + 1, ", got ", n_segments);
  });
  a.rows_stride = in.seq_start || in.seq_end ? a.T : 0;
  return rows;
}

Call make_call(const Inputs& in) {
  Call call;
  SegmentedArgs& a = call.args;
  a = SegmentedArgs{};
  a.B = in.query.size(0), a.H = in.query.size(1), a.T = in.query.size(2), a.D = in.query.size(3);
  a.Hkv = in.key.size(1), a.S = in.key.size(2), a.Dv = in.value.size(3);
  a.scale = in.scale, a.softcap = in.softcap.value_or(0.0);
  a.query = view_of(in.query), a.key = view_of(in.key), a.value = view_of(in.value);
  if (in.persistent_key) {
    a.P = in.persistent_key->size(1);
    a.persistent_key = view_of(*in.persistent_key);
    a.persistent_value = view_of(*in.persistent_value);
  }
  if (in.memory_key) {
    a.M = in.memory_key->size(3);
    a.memory_key = view_of(*in.memory_key), a.memory_value = view_of(*in.memory_value);
  }
  call.rows = row_ranges(a, in);
  a.rows = call.rows.data();
  return call;
}

#define MEMATTN_PARAMETERS                                                                       \
  Tensor query, Tensor key, Tensor value, OptionalTensor persistent_key,                         \
      OptionalTensor persistent_value, OptionalTensor memory_key, OptionalTensor memory_value,   \
      OptionalTensor cu_seqlens, OptionalTensor seq_start, OptionalTensor seq_end,               \
      OptionalInt segment_len, OptionalInt window_size, OptionalInt num_sink_tokens,             \
      bool is_causal, bool memory_is_causal, int64_t query_offset, double scale,                 \
      std::optional<double> softcap
#define MEMATTN_TAKEN                                                                            \
  Inputs{query,         key,          value,                                                      \
         persistent_key, persistent_value, memory_key,       memory_value,                        \
         cu_seqlens,    seq_start,    seq_end,                                                    \
         segment_len,   window_size,  num_sink_tokens,                                            \
         is_causal,     memory_is_causal, query_offset,      scale, softcap}

std::tuple<Tensor, Tensor, Tensor> forward(MEMATTN_PARAMETERS) {
  Call call = make_call(MEMATTN_TAKEN);
  SegmentedArgs& a = call.args;
  Tensor out = empty({a.B, a.H, a.T, a.Dv}, query, query.scalar_type());
  Tensor lse = empty({a.B, a.H, a.T}, query, ScalarType::Float);
  Tensor lse2 = empty({2, a.B, a.H, a.T}, query, ScalarType::Float);
  a.out = view_of(out);
  a.lse = static_cast<float*>(lse.data_ptr());
  take_pair(lse2, a.lse2_high, a.lse2_low);
  std::vector<Tile> tiles;
  for (int64_t b = 0; b < a.B; ++b)
    for (int64_t hkv = 0; hkv < a.Hkv; ++hkv) {
      const auto more = make_tiles(a, b, hkv, 0, a.T);
      tiles.insert(tiles.end(), more.begin(), more.end());
    }
  const auto& k = kernels().segmented;
  parallel_work(
      tiles.size(), [&] { return buffer(k.forward_scratch(a)); },
      [&](int64_t i, Buffer& scratch) { k.forward(a, tiles[i], scratch.get()); });
  return {out, lse, lse2};
}

// The queries [t_begin, t_end) of key head (b, hkv), with the keys and segments that they reach.
struct Chunk {
  int64_t b, hkv, t_begin, t_end;
  int64_t key_begin = 0, key_end = 0, segment_begin = 0, segment_end = 0;
  Buffer sums;
  SegmentedGrads grads{};
};

// Splits the queries of one sequence into `n` chunks of about equal work.
std::vector<int64_t> split_rows(const SegmentedArgs& a, int64_t b, int64_t n) {
  const RowRange* rows = a.rows + b * a.rows_stride;
  auto work_of = [](const RowRange& r) {
    return r.hi - r.lo + r.persistent + r.memory + r.sinks() + 1;
  };
  double work = 0;
  for (int64_t t = 0; t < a.T; ++t) work += work_of(rows[t]);
  std::vector<int64_t> bounds{0};
  double done = 0;
  for (int64_t t = 0; t < a.T; ++t) {
    done += work_of(rows[t]);
    if (done >= work * bounds.size() / n && static_cast<int64_t>(bounds.size()) < n && t + 1 < a.T)
      bounds.push_back(t + 1);
  }
  bounds.push_back(a.T);
  return bounds;
}

void reach(const SegmentedArgs& a, Chunk& c) {
  const RowRange* rows = a.rows + c.b * a.rows_stride;
  int64_t lo = a.S, hi = 0, s0 = INT32_MAX, s1 = 0;
  for (int64_t t = c.t_begin; t < c.t_end; ++t) {
    if (rows[t].lo < rows[t].hi)
      lo = std::min<int64_t>(lo, rows[t].lo), hi = std::max<int64_t>(hi, rows[t].hi);
    if (rows[t].sinks())
      lo = std::min<int64_t>(lo, rows[t].sink_lo), hi = std::max<int64_t>(hi, rows[t].sink_hi);
    if (rows[t].memory)
      s0 = std::min<int64_t>(s0, rows[t].segment), s1 = std::max<int64_t>(s1, rows[t].segment + 1);
  }
  if (lo < hi) c.key_begin = lo, c.key_end = hi;
  if (s0 < s1) c.segment_begin = s0, c.segment_end = s1;
}

// What the tiles of one key head reach, in their order.
std::vector<Reach> reaches(const SegmentedArgs& a, const std::vector<Tile>& tiles) {
  std::vector<Reach> found(tiles.size());
  int64_t end = 0, begin = a.S;
  for (size_t i = 0; i < tiles.size(); ++i) {
    const RowRange* rows = a.rows + tiles[i].b * a.rows_stride;
    found[i].begin = a.S;
    for (int64_t t = tiles[i].t0; t < tiles[i].t1; ++t) {
      const RowRange& r = rows[t];
      if (r.lo < r.hi) {
        found[i].begin = std::min<int64_t>(found[i].begin, r.lo);
        end = std::max<int64_t>(end, r.hi);
      }
      if (r.sinks()) {
        found[i].begin = std::min<int64_t>(found[i].begin, r.sink_lo);
        end = std::max<int64_t>(end, r.sink_hi);
      }
    }
    found[i].end = end;
  }
  for (size_t i = tiles.size(); i-- > 0;) begin = found[i].begin = std::min(begin, found[i].begin);
  return found;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor d_out, Tensor d_lse, Tensor out, Tensor lse2, MEMATTN_PARAMETERS) {
  Call call = make_call(MEMATTN_TAKEN);
  SegmentedArgs& a = call.args;
  const ScalarType dtype = query.scalar_type();
  const int64_t n_segments = memory_key ? memory_key->size(2) : 0;
  const int64_t P = a.P, M = a.M, D = a.D, Dv = a.Dv;
  Tensor d_query = empty({a.B, a.H, a.T, D}, query, dtype);
  Tensor d_key = empty({a.B, a.Hkv, a.S, D}, query, dtype);
  Tensor d_value = empty({a.B, a.Hkv, a.S, Dv}, query, dtype);
  // of size 0 where there are none
  auto or_empty = [&](bool given, std::initializer_list<int64_t> sizes) {
    return given ? empty(sizes, query, dtype) : empty({0}, query, dtype);
  };
  Tensor d_pk = or_empty(persistent_key.has_value(), {a.Hkv, P, D});
  Tensor d_pv = or_empty(persistent_key.has_value(), {a.Hkv, P, Dv});
  Tensor d_mk = or_empty(memory_key.has_value(), {a.B, a.Hkv, n_segments, M, D});
  Tensor d_mv = or_empty(memory_key.has_value(), {a.B, a.Hkv, n_segments, M, Dv});
  out = torch::stable::contiguous(out), lse2 = torch::stable::contiguous(lse2);
  d_lse = torch::stable::contiguous(d_lse);
  a.out = view_of(out), a.d_out = view_of(d_out), a.d_query = view_of(d_query);
  take_pair(lse2, a.lse2_high, a.lse2_low);
  a.d_lse = static_cast<const float*>(d_lse.data_ptr());

  const auto& k = kernels().segmented;
  const KeyGradients tokens(view_of(d_key), view_of(d_value), a.S, D, Dv, scale);
  const KeyGradients persistents(view_of(d_pk), view_of(d_pv), P, D, Dv, scale);
  const KeyGradients memories(view_of(d_mk), view_of(d_mv), n_segments * M, D, Dv, scale);
  // one owner for each (sequence, key head); split further only where that leaves threads idle
  const int64_t threads = torch::stable::get_num_threads(), owners = a.B * a.Hkv;
  const bool even = owners >= 4 * threads || (owners && owners % threads == 0);
  const int64_t split = even || !owners ? 1 : std::min<int64_t>((2 * threads + owners - 1) / owners, 8);
  std::vector<Chunk> chunks;
  std::vector<size_t> first_chunk;
  for (int64_t b = 0; b < a.B; ++b) {
    const auto bounds = split_rows(a, b, split);
    for (int64_t hkv = 0; hkv < a.Hkv; ++hkv) {
      first_chunk.push_back(chunks.size());
      for (size_t c = 0; c + 1 < bounds.size(); ++c) {
        Chunk chunk{b, hkv, bounds[c], bounds[c + 1]};
        reach(a, chunk);
        chunks.push_back(std::move(chunk));
      }
    }
  }
  first_chunk.push_back(chunks.size());

  auto store_memory = [&](int64_t owner) {
    std::vector<Part> parts;
    for (size_t c = first_chunk[owner]; c < first_chunk[owner + 1]; ++c)
      parts.push_back({chunks[c].grads.d_memory_key, chunks[c].segment_begin * M,
                       chunks[c].segment_end * M});
    memories.store(owner, parts);
  };
  auto store_tokens = [&](int64_t owner) {
    std::vector<Part> parts;
    for (size_t c = first_chunk[owner]; c < first_chunk[owner + 1]; ++c)
      parts.push_back({chunks[c].grads.d_key, chunks[c].key_begin, chunks[c].key_end});
    tokens.store(owner, parts);
  };

  // persistent sums stay until the end, since every sequence adds to them
  const int64_t persistent_size = persistents.floats(P);
  Buffer persistent = buffer(chunks.size() * persistent_size);
  // an owner that is not split stores its sums at once, so its thread uses their memory again
  struct State {
    Buffer scratch, sums;
    int64_t floats = 0;
  };
  parallel_work(
      chunks.size(), [&] { return State{buffer(k.backward_scratch(a)), nullptr}; },
      [&](int64_t i, State& state) {
        Chunk& c = chunks[i];
        const std::vector<Tile> tiles = make_tiles(a, c.b, c.hkv, c.t_begin, c.t_end);
        const std::vector<Reach> reach = reaches(a, tiles);
        const int64_t keys = split > 1 ? c.key_end - c.key_begin : SlidingSums::rows_for(reach);
        const int64_t memory_rows = (c.segment_end - c.segment_begin) * M;
        const int64_t floats = tokens.floats(keys + memory_rows);
        if (split > 1) {
          c.sums = buffer(floats);
        } else if (!state.sums || state.floats < floats) {
          state.sums = buffer(floats), state.floats = floats;
        }
        float* sums = split > 1 ? c.sums.get() : state.sums.get();
        std::fill_n(sums, floats, 0.0f);
        SegmentedGrads& g = c.grads;
        g.d_key = sums, g.d_value = tokens.values(sums, keys), g.key_begin = c.key_begin;
        g.d_memory_key = sums + tokens.floats(keys);
        g.d_memory_value = memories.values(g.d_memory_key, memory_rows);
        g.segment_begin = c.segment_begin;
        g.d_persistent_key = persistent.get() + i * persistent_size;
        g.d_persistent_value = persistents.values(g.d_persistent_key, P);
        std::fill_n(g.d_persistent_key, persistent_size, 0.0f);
        if (split > 1) {
          for (const Tile& tile : tiles) k.backward(a, tile, g, state.scratch.get());
          return;
        }
        SlidingSums sliding(tokens, i, reach, keys, sums);
        for (size_t n = 0; n < tiles.size(); ++n) {
          sliding.slide_to(reach[n]);
          g.key_begin = sliding.first();
          k.backward(a, tiles[n], g, state.scratch.get());
        }
        sliding.finish();
        if (M) store_memory(i);
      });
  if (split > 1)
    parallel_work(owners, [] { return 0; }, [&](int64_t owner, int) {
      store_tokens(owner);
      if (M) store_memory(owner);
    });
  if (P)
    for (int64_t hkv = 0; hkv < a.Hkv; ++hkv) {
      std::vector<Part> parts;
      for (const Chunk& c : chunks)
        if (c.hkv == hkv) parts.push_back({c.grads.d_persistent_key, 0, P});
      persistents.store(hkv, parts);
    }
  return {d_query, d_key, d_value, d_pk, d_pv, d_mk, d_mv};
}

}  // namespace
}  // namespace memattn

// the schemas are made from the signature in memattn_kernels/signatures.py
STABLE_TORCH_LIBRARY_IMPL(memattn_cpp, CPU, m) {
  m.impl("segmented_attention", TORCH_BOX(&memattn::forward));
  m.impl("segmented_attention_backward", TORCH_BOX(&memattn::backward));
}
