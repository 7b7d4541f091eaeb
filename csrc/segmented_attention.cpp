// Segmented attention on the CPU: index sets, tiles, threads. The arithmetic is in
// segmented_attention_tile.h, the definition in memattn/reference/segmented_attention.py.
#include <tuple>

#include "sliding_sums.h"
#include "tensors.h"

namespace memattn {
namespace {

// One document: tokens [start, end), whose first segment has this index among all segments.
struct Document {
  int64_t start, end, first_segment;
};

struct Inputs {
  SegmentedArgs args;
  std::vector<RowRange> rows;
};

RowRange row_range(const SegmentedArgs& a, int64_t i, const Document& doc, OptionalInt segment_len,
                   OptionalInt window_size, bool is_causal, bool memory_is_causal) {
  RowRange r{0, 0, 0, 0, 0};
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
  }
  if (is_causal) hi = i + 1;
  lo = std::max({lo, doc.start, int64_t{0}});
  hi = std::min({hi, doc.end, a.S});
  if (lo < hi) r.lo = static_cast<int32_t>(lo), r.hi = static_cast<int32_t>(hi);
  r.persistent = static_cast<int32_t>(a.P);
  if (a.M) {
    r.segment = static_cast<int32_t>(doc.first_segment + (i - doc.start) / *segment_len);
    r.memory = static_cast<int32_t>(
        memory_is_causal ? std::min(a.M, (i - doc.start) % *segment_len + 1) : a.M);
  }
  return r;
}

// What every query sees; refuses anything that would read outside a tensor.
std::vector<RowRange> row_ranges(SegmentedArgs& a, int64_t n_segments, const OptionalTensor& cu_seqlens,
                                 const OptionalTensor& seq_start, const OptionalTensor& seq_end,
                                 OptionalInt segment_len, OptionalInt window_size, bool is_causal,
                                 bool memory_is_causal, int64_t query_offset) {
  STD_TORCH_CHECK(a.S < INT32_MAX && a.T < INT32_MAX, "memattn_cpp takes lengths below 2^31");
  const bool alike = !seq_start && !seq_end;
  const int64_t sequences = alike ? std::min<int64_t>(a.B, 1) : a.B;
  const auto starts = seq_start ? int_values(*seq_start) : std::vector<int64_t>(a.B, 0);
  const auto ends = seq_end ? int_values(*seq_end) : std::vector<int64_t>(a.B, INT32_MAX);
  std::vector<RowRange> rows(sequences * a.T);
  for (int64_t b = 0; b < sequences; ++b) {
    std::vector<Document> documents;
    if (cu_seqlens) {
      const auto bounds = int_values(*cu_seqlens);
      int64_t segments = 0;
      for (size_t d = 0; d + 1 < bounds.size(); ++d) {
        STD_TORCH_CHECK(bounds[d] >= 0 && bounds[d] <= bounds[d + 1], "cu_seqlens must rise");
        documents.push_back({bounds[d], bounds[d + 1], segments});
        if (segment_len) segments += (bounds[d + 1] - bounds[d] + *segment_len - 1) / *segment_len;
      }
    } else {
      documents.push_back({starts[b], ends[b], 0});
    }
    size_t d = 0;
    for (int64_t t = 0; t < a.T; ++t) {
      const int64_t i = t + query_offset;
      while (d + 1 < documents.size() && i >= documents[d].end) ++d;
      RowRange& r = rows[b * a.T + t];
      r = row_range(a, i, documents[d], segment_len, window_size, is_causal, memory_is_causal);
      STD_TORCH_CHECK(!r.memory || r.segment < n_segments, "memory_key must have at least n_segments=",
                      r.segment + 1, ", got ", n_segments);
    }
  }
  a.rows_stride = alike ? 0 : a.T;
  return rows;
}

Inputs make_inputs(const Tensor& query, const Tensor& key, const Tensor& value,
                   const OptionalTensor& persistent_key, const OptionalTensor& persistent_value,
                   const OptionalTensor& memory_key, const OptionalTensor& memory_value,
                   const OptionalTensor& cu_seqlens, const OptionalTensor& seq_start,
                   const OptionalTensor& seq_end, OptionalInt segment_len, OptionalInt window_size,
                   bool is_causal, bool memory_is_causal, int64_t query_offset, double scale) {
  Inputs in;
  SegmentedArgs& a = in.args;
  a = SegmentedArgs{};
  a.B = query.size(0), a.H = query.size(1), a.T = query.size(2), a.D = query.size(3);
  a.Hkv = key.size(1), a.S = key.size(2), a.Dv = value.size(3);
  a.scale = scale;
  a.query = view_of(query), a.key = view_of(key), a.value = view_of(value);
  if (persistent_key) {
    a.P = persistent_key->size(1);
    a.persistent_key = view_of(*persistent_key), a.persistent_value = view_of(*persistent_value);
  }
  int64_t n_segments = 0;
  if (memory_key) {
    n_segments = memory_key->size(2), a.M = memory_key->size(3);
    a.memory_key = view_of(*memory_key), a.memory_value = view_of(*memory_value);
  }
  in.rows = row_ranges(a, n_segments, cu_seqlens, seq_start, seq_end, segment_len, window_size,
                       is_causal, memory_is_causal, query_offset);
  a.rows = in.rows.data();
  return in;
}

std::tuple<Tensor, Tensor, Tensor> forward(
    Tensor query, Tensor key, Tensor value, OptionalTensor persistent_key,
    OptionalTensor persistent_value, OptionalTensor memory_key, OptionalTensor memory_value,
    OptionalTensor cu_seqlens, OptionalTensor seq_start, OptionalTensor seq_end,
    OptionalInt segment_len, OptionalInt window_size, bool is_causal, bool memory_is_causal,
    int64_t query_offset, double scale) {
  Inputs in = make_inputs(query, key, value, persistent_key, persistent_value, memory_key,
                          memory_value, cu_seqlens, seq_start, seq_end, segment_len, window_size,
                          is_causal, memory_is_causal, query_offset, scale);
  SegmentedArgs& a = in.args;
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
  const Kernels& k = kernels();
  parallel_work(
      tiles.size(), [&] { return buffer(k.forward_scratch(a)); },
      [&](int64_t i, Buffer& scratch) { k.segmented_forward(a, tiles[i], scratch.get()); });
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
  double work = 0;
  for (int64_t t = 0; t < a.T; ++t) work += rows[t].hi - rows[t].lo + rows[t].persistent + rows[t].memory + 1;
  std::vector<int64_t> bounds{0};
  double done = 0;
  for (int64_t t = 0; t < a.T; ++t) {
    done += rows[t].hi - rows[t].lo + rows[t].persistent + rows[t].memory + 1;
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
      if (rows[t].lo >= rows[t].hi) continue;
      found[i].begin = std::min<int64_t>(found[i].begin, rows[t].lo);
      end = std::max<int64_t>(end, rows[t].hi);
    }
    found[i].end = end;
  }
  for (size_t i = tiles.size(); i-- > 0;) begin = found[i].begin = std::min(begin, found[i].begin);
  return found;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor d_out, Tensor d_lse, Tensor out, Tensor lse2, Tensor query, Tensor key,
    Tensor value, OptionalTensor persistent_key, OptionalTensor persistent_value, OptionalTensor memory_key,
    OptionalTensor memory_value, OptionalTensor cu_seqlens, OptionalTensor seq_start,
    OptionalTensor seq_end, OptionalInt segment_len, OptionalInt window_size, bool is_causal,
    bool memory_is_causal, int64_t query_offset, double scale) {
  Inputs in = make_inputs(query, key, value, persistent_key, persistent_value, memory_key,
                          memory_value, cu_seqlens, seq_start, seq_end, segment_len, window_size,
                          is_causal, memory_is_causal, query_offset, scale);
  SegmentedArgs& a = in.args;
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

  const float factor = static_cast<float>(scale);
  const Kernels& k = kernels();
  const int64_t ldk = (D + k.lanes - 1) / k.lanes * k.lanes;
  const int64_t ldv = (Dv + k.lanes - 1) / k.lanes * k.lanes;
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

  auto d_key_of = [&](int64_t owner) {
    return GradientRows{view_of(d_key), owner * a.S * D, D, ldk, factor};
  };
  auto d_value_of = [&](int64_t owner) {
    return GradientRows{view_of(d_value), owner * a.S * Dv, Dv, ldv, 1.0f};
  };
  auto store_memory = [&](int64_t owner) {
    std::vector<Part> dmk, dmv;
    for (size_t c = first_chunk[owner]; c < first_chunk[owner + 1]; ++c) {
      const int64_t s0 = chunks[c].segment_begin * M, s1 = chunks[c].segment_end * M;
      dmk.push_back({chunks[c].grads.d_memory_key, s0, s1});
      dmv.push_back({chunks[c].grads.d_memory_value, s0, s1});
    }
    const int64_t n = n_segments * M;
    store_sum(view_of(d_mk), owner * n * D, n, D, ldk, factor, dmk);
    store_sum(view_of(d_mv), owner * n * Dv, n, Dv, ldv, 1.0f, dmv);
  };
  auto store_tokens = [&](int64_t owner) {
    std::vector<Part> dk, dv;
    for (size_t c = first_chunk[owner]; c < first_chunk[owner + 1]; ++c) {
      dk.push_back({chunks[c].grads.d_key, chunks[c].key_begin, chunks[c].key_end});
      dv.push_back({chunks[c].grads.d_value, chunks[c].key_begin, chunks[c].key_end});
    }
    store_sum(view_of(d_key), owner * a.S * D, a.S, D, ldk, factor, dk);
    store_sum(view_of(d_value), owner * a.S * Dv, a.S, Dv, ldv, 1.0f, dv);
  };

  // persistent sums stay until the end, since every sequence adds to them
  Buffer persistent = buffer(chunks.size() * P * (ldk + ldv));
  const int64_t persistent_size = P * (ldk + ldv);
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
        const int64_t memories = (c.segment_end - c.segment_begin) * M;
        const int64_t floats = (keys + memories) * (ldk + ldv);
        if (split > 1) {
          c.sums = buffer(floats);
        } else if (!state.sums || state.floats < floats) {
          state.sums = buffer(floats), state.floats = floats;
        }
        float* sums = split > 1 ? c.sums.get() : state.sums.get();
        std::fill_n(sums, floats, 0.0f);
        SegmentedGrads& g = c.grads;
        g.d_key = sums, g.d_value = g.d_key + keys * ldk, g.key_begin = c.key_begin;
        g.d_memory_key = g.d_value + keys * ldv;
        g.d_memory_value = g.d_memory_key + memories * ldk;
        g.segment_begin = c.segment_begin;
        g.d_persistent_key = persistent.get() + i * persistent_size;
        g.d_persistent_value = g.d_persistent_key + P * ldk;
        std::fill_n(g.d_persistent_key, persistent_size, 0.0f);
        if (split > 1) {
          for (const Tile& tile : tiles) k.segmented_backward(a, tile, g, state.scratch.get());
          return;
        }
        SlidingSums sliding(d_key_of(i), d_value_of(i), a.S, reach, keys, sums);
        for (size_t n = 0; n < tiles.size(); ++n) {
          sliding.slide_to(reach[n]);
          g.key_begin = sliding.first();
          k.segmented_backward(a, tiles[n], g, state.scratch.get());
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
      std::vector<Part> dk, dv;
      for (const Chunk& c : chunks)
        if (c.hkv == hkv) {
          dk.push_back({c.grads.d_persistent_key, 0, P});
          dv.push_back({c.grads.d_persistent_value, 0, P});
        }
      store_sum(view_of(d_pk), hkv * P * D, P, D, ldk, factor, dk);
      store_sum(view_of(d_pv), hkv * P * Dv, P, Dv, ldv, 1.0f, dv);
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
