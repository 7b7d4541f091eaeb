// Segmented attention, one tile of queries at a time, forward and backward.
//
// Included once per instruction set after attention_rows.h. A tile walks its key sources (tokens,
// persistent keys, the memory of its segments) in blocks; every source tells each query the
// interval of its keys, so one mask serves all. Derivation: docs/segmented_attention.md.

// The queries of a tile, row r of lane r.
struct TileRows {
  int64_t n;       // rows
  int64_t lanes;   // rounded up to whole panels
  int64_t head[TILE_ROWS], t[TILE_ROWS];
  const RowRange* range[TILE_ROWS];

  TileRows(const SegmentedArgs& a, const Tile& tile, int64_t panel) {
    n = 0;
    for (int64_t h = tile.h0; h < tile.h1; ++h)
      for (int64_t i = tile.t0; i < tile.t1; ++i, ++n) {
        head[n] = h, t[n] = i;
        range[n] = a.rows + tile.b * a.rows_stride + i;
      }
    lanes = round_up(n, panel);
  }

  bool empty(int64_t i) const {
    const RowRange& r = *range[i];
    return r.lo >= r.hi && !r.persistent && !r.memory && !r.sinks();
  }

  // The first key after `key` where sinks of some row begin.
  int32_t sinks_after(int32_t key) const {
    int32_t found = INT32_MAX;
    for (int64_t i = 0; i < n; ++i) {
      const RowRange& r = *range[i];
      if (r.sinks() && r.sink_lo > key && r.sink_lo < found) found = r.sink_lo;
    }
    return found;
  }

  SumRuns sum_runs() const {
    int64_t lo = INT32_MAX, hi = 0, persistent = 0, memory = 0, sinks = 0, least = INT32_MAX;
    for (int64_t i = 0; i < n; ++i) {
      if (empty(i)) continue;
      const RowRange& r = *range[i];
      int64_t keys = r.persistent + r.memory + r.sinks();
      if (r.lo < r.hi) {
        lo = r.lo < lo ? r.lo : lo, hi = r.hi > hi ? r.hi : hi;
        keys += r.hi - r.lo;
      }
      persistent = r.persistent > persistent ? r.persistent : persistent;
      memory += r.memory;
      sinks = r.sinks() > sinks ? r.sinks() : sinks;
      least = keys < least ? keys : least;
    }
    const int64_t keys = (lo < hi ? hi - lo : 0) + persistent + memory + sinks;
    return {keys, keys <= 2 * SumRuns::FEW && least <= SumRuns::FEW / 4};
  }
};

// And those whose scores are capped.
struct CappedRows : TileRows {
  using TileRows::TileRows;
};

static MEMATTN_INLINE Softcap cap_of(const SegmentedArgs& a, const CappedRows&) {
  return {a.scale, a.softcap};
}

// Calls visit(block) for every block of keys that some row of the tile sees.
template <class Scratch, class Visit>
static void for_each_block(const SegmentedArgs& a, const Tile& tile, const TileRows& rows,
                           int64_t panel, const SegmentedGrads* grads, int64_t ldk, int64_t ldv,
                           Scratch scratch, Visit visit) {
  Interval seen;
  // lanes past the last row repeat it: they cost no mask, and nobody reads them
  auto fill = [&](auto lo, auto hi) {
    for (int64_t i = 0; i < rows.lanes; ++i) {
      const RowRange& r = *rows.range[i < rows.n ? i : rows.n - 1];
      seen.lo[i] = lo(r), seen.hi[i] = hi(r);
    }
    seen.summarise(rows.lanes, panel);
  };
  auto walk = [&](const View& key, int64_t key_at, const View& value, int64_t value_at,
                  int64_t row, float* d_key, float* d_value, int64_t grads_begin) {
    walk_source({key, value, key_at, value_at, row, d_key, d_value, grads_begin}, seen, a.D, a.Dv,
                scratch, visit);
  };

  if (a.P) {
    fill([](const RowRange&) { return 0; }, [](const RowRange& r) { return r.persistent; });
    walk(a.persistent_key, tile.hkv * a.persistent_key.stride[0], a.persistent_value,
         tile.hkv * a.persistent_value.stride[0], 1, grads ? grads->d_persistent_key : nullptr,
         grads ? grads->d_persistent_value : nullptr, 0);
  }
  if (a.M) {
    int32_t first = INT32_MAX, last = INT32_MIN;
    for (int64_t i = 0; i < rows.n; ++i)
      if (rows.range[i]->memory) {
        first = rows.range[i]->segment < first ? rows.range[i]->segment : first;
        last = rows.range[i]->segment > last ? rows.range[i]->segment : last;
      }
    for (int32_t s = first; s <= last; ++s) {
      fill([](const RowRange&) { return 0; },
           [s](const RowRange& r) { return r.segment == s ? r.memory : 0; });
      const int64_t base = grads ? (s - grads->segment_begin) * a.M : 0;
      walk(a.memory_key, at(a.memory_key, tile.b, tile.hkv, s), a.memory_value,
           at(a.memory_value, tile.b, tile.hkv, s), 3,
           grads ? grads->d_memory_key + base * ldk : nullptr,
           grads ? grads->d_memory_value + base * ldv : nullptr, 0);
    }
  }
  auto walk_tokens = [&] {
    walk(a.key, at(a.key, tile.b, tile.hkv, 0), a.value, at(a.value, tile.b, tile.hkv, 0), 2,
         grads ? grads->d_key : nullptr, grads ? grads->d_value : nullptr,
         grads ? grads->key_begin : 0);
  };
  // document by document, as their first tokens lie far apart
  for (int32_t s = rows.sinks_after(-1); s < INT32_MAX; s = rows.sinks_after(s)) {
    fill([s](const RowRange&) { return s; },
         [s](const RowRange& r) { return r.sink_lo == s ? r.sink_hi : s; });
    walk_tokens();
  }
  fill([](const RowRange& r) { return r.lo; }, [](const RowRange& r) { return r.hi; });
  walk_tokens();
}

template <class How, class QueryRows, int NV>
static void forward_panels(const SegmentedArgs& a, const Tile& tile, float* scratch) {
  const QueryRows rows(a, tile, NV * VL);
  How::template forward<NV>(a, tile, rows, [&](auto block_scratch, auto visit) {
    for_each_block(a, tile, rows, NV * VL, nullptr, 0, 0, block_scratch, visit);
  }, scratch);
}

template <class How, class QueryRows>
static void forward_tile(const SegmentedArgs& a, const Tile& tile, float* scratch) {
  const int64_t n = (tile.h1 - tile.h0) * (tile.t1 - tile.t0);
  n <= VL ? forward_panels<How, QueryRows, 1>(a, tile, scratch)
          : forward_panels<How, QueryRows, 2>(a, tile, scratch);
}

template <class How>
static void segmented_forward_by(const SegmentedArgs& a, const Tile& tile, float* scratch) {
  a.softcap ? forward_tile<How, CappedRows>(a, tile, scratch)
            : forward_tile<How, TileRows>(a, tile, scratch);
}

template <class How, class QueryRows>
static void backward_tile(const SegmentedArgs& a, const Tile& tile, const SegmentedGrads& grads,
                          float* scratch) {
  constexpr int NV = 2;
  const QueryRows rows(a, tile, NV * VL);
  const int64_t ldk = round_up(a.D, VL), ldv = round_up(a.Dv, VL);
  How::template backward<NV>(
      a, tile, rows, [&](bool with_gradients, auto block_scratch, auto visit) {
        for_each_block(a, tile, rows, NV * VL, with_gradients ? &grads : nullptr, ldk, ldv,
                       block_scratch, visit);
      }, scratch);
}

template <class How>
static void segmented_backward_by(const SegmentedArgs& a, const Tile& tile,
                                  const SegmentedGrads& grads, float* scratch) {
  a.softcap ? backward_tile<How, CappedRows>(a, tile, grads, scratch)
            : backward_tile<How, TileRows>(a, tile, grads, scratch);
}
