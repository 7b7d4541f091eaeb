// Attention in branches, one tile of slots at a time, forward and backward.
//
// Included once per instruction set after attention_rows.h. The rows of a tile are slots of one
// branch, gathered from the tokens of a sequence, which see about as many keys: so what a slot gets
// depends on its own keys alone. Derivation: docs/branch_attention.md.

// The slots of a tile, row r in lane r. `tile.b` is a list of slots, b * F + f.
struct BranchRows {
  int64_t n = 0;   // rows
  int64_t lanes;   // rounded up to whole panels
  int64_t b;
  int64_t head[TILE_ROWS], slot[TILE_ROWS], t[TILE_ROWS];
  Interval seen;

  BranchRows(const BranchArgs& a, const Tile& tile, int64_t panel) : b(tile.b / a.F) {
    const KeyRange* ranges = a.ranges + b * a.ranges_stride;
    for (int64_t h = tile.h0; h < tile.h1; ++h)
      for (int64_t e = tile.t0; e < tile.t1; ++e, ++n) {
        head[n] = h, t[n] = a.entries[e] / a.A, slot[n] = a.entries[e] % a.A;
        seen.lo[n] = ranges[t[n]].lo, seen.hi[n] = ranges[t[n]].hi;
      }
    lanes = round_up(n, panel);
    // lanes past the last row repeat it: they cost no mask, and nobody reads them
    for (int64_t i = n; i < lanes; ++i) seen.lo[i] = seen.lo[n - 1], seen.hi[i] = seen.hi[n - 1];
    seen.summarise(lanes, panel);
  }

  bool empty(int64_t) const { return false; }  // such slots are in no tile
  SumRuns sum_runs() const { return {seen.hi[0] - seen.lo[0], false}; }
  int64_t at(const int64_t* stride, int64_t i) const {
    return b * stride[0] + slot[i] * stride[1] + head[i] * stride[2] + t[i] * stride[3];
  }
};

static MEMATTN_INLINE int64_t place_of(const View& v, const Tile&, const BranchRows& rows, int64_t i) {
  return rows.at(v.stride, i);
}

static MEMATTN_INLINE int64_t column_step(const View& v, const BranchRows&) { return v.stride[4]; }

static MEMATTN_INLINE int64_t number_of(const BranchArgs& a, const Tile&, const BranchRows& rows,
                                        int64_t i) {
  return ((rows.b * a.A + rows.slot[i]) * a.H + rows.head[i]) * a.T + rows.t[i];
}

static MEMATTN_INLINE float gate_of(const BranchArgs& a, const BranchRows& rows, int64_t i) {
  return a.gates[(rows.b * a.T + rows.t[i]) * a.A + rows.slot[i]];
}

// A result is kept as it is for the gradient of its gate, and stored with its gate.
static void store_result(const BranchArgs& a, const Tile&, const BranchRows& rows, int64_t i,
                         float* row) {
  const int64_t place = rows.at(a.out.stride, i);
  store_row(a.ungated, place, 1, a.Dv, row);
  const float gate = gate_of(a, rows, i);
  for (int64_t d = 0; d < a.Dv; ++d) row[d] *= gate;
  store_row(a.out, place, 1, a.Dv, row);
}

// The gradients of gates, and the cotangents of the results before these.
static inline void take_cotangents(const BranchArgs& a, const Tile& tile, const BranchRows& rows,
                                   const float* out, float* d_out, int64_t ld) {
  for (int64_t i = 0; i < rows.n; ++i, out += ld, d_out += ld) {
    a.d_gate[number_of(a, tile, rows, i)] = row_product(out, d_out, a.Dv);
    const float gate = gate_of(a, rows, i);
    for (int64_t d = 0; d < a.Dv; ++d) d_out[d] *= gate;
  }
}

// The same of rows of bfloat16, `ld` pairs apart; they are rounded as in plain PyTorch.
static inline void take_pair_cotangents(const BranchArgs& a, const Tile& tile, const BranchRows& rows,
                                        const bfloat16_bits* out, bfloat16_bits* d_out, int64_t ld) {
  for (int64_t i = 0; i < rows.n; ++i, out += 2 * ld, d_out += 2 * ld) {
    double sum = 0.0;
    const float gate = gate_of(a, rows, i);
    for (int64_t d = 0; d < a.Dv; ++d) {
      const float g = bfloat16_to_float(d_out[d]);
      sum += (double)bfloat16_to_float(out[d]) * g;
      d_out[d] = bfloat16_of(g * gate);
    }
    a.d_gate[number_of(a, tile, rows, i)] = sum;
  }
}

// A block of keys that few rows share, so that they come from memory, and the next block's.
template <class Base>
struct FetchingBlock : Base {
  static constexpr bool FETCHES = true;
  const Source& source;
  int64_t D, Dv, next, n_next;  // the keys [next, next + n_next),
  int64_t share;                // so many of their rows at a time;
  mutable int64_t fetched = 0;  // of keys, and then of values

  void fetch_some() const { fetch_until(fetched + share < 2 * n_next ? fetched + share : 2 * n_next); }
  void fetch_rest() const { fetch_until(2 * n_next); }

 private:
  void fetch_until(int64_t end) const {
    for (; fetched < end; ++fetched) {
      const bool is_key = fetched < n_next;
      const View& view = is_key ? source.key : source.value;
      const int64_t j = next + (is_key ? fetched : fetched - n_next);
      fetch_row(view, (is_key ? source.key_at : source.value_at) + j * view.stride[3],
                is_key ? D : Dv);
    }
  }
};

// Calls visit(block) for every block of keys that some row of the tile sees. FEW: few rows do.
template <bool FEW, class Scratch, class Visit>
static MEMATTN_INLINE void for_each_branch_block(const BranchArgs& a, const Tile& tile,
                                                 const BranchRows& rows, const KeyGrads* grads,
                                                 Scratch scratch, Visit visit) {
  auto first = [&](const View& v) {
    return rows.b * v.stride[0] + tile.b % a.F * v.stride[1] + tile.hkv * v.stride[2];
  };
  const Source source{a.key, a.value, first(a.key), first(a.value), 3,
                      grads ? grads->d_key : nullptr, grads ? grads->d_value : nullptr,
                      grads ? grads->key_begin : 0};
  walk_source(source, rows.seen, a.D, a.Dv, scratch, [&](const auto& block) {
    if constexpr (FEW) {
      const int64_t next = block.begin + block.n, left = rows.seen.max_hi - next;
      const int64_t n = left < BLOCK_KEYS ? left : BLOCK_KEYS;
      const int64_t times = rows.lanes / VL * (BLOCK_KEYS / FETCH_KEYS) * (grads ? 2 : 1);
      const FetchingBlock<std::decay_t<decltype(block)>> fetching{
          block, source, a.D, a.Dv, next, n, (2 * n + times - 1) / times};
      visit(fetching);
      fetching.fetch_rest();
    } else {
      visit(block);
    }
  });
}

template <class How, int NV, bool BY_ROW>
static void branch_forward_tile(const BranchArgs& a, const Tile& tile, float* scratch) {
  const BranchRows rows(a, tile, NV * VL);
  How::template forward<NV, BY_ROW>(a, tile, rows, [&](auto block_scratch, auto visit) {
    for_each_branch_block<NV == 1>(a, tile, rows, nullptr, block_scratch, visit);
  }, scratch);
}

template <class How, int NV, bool BY_ROW>
static void branch_backward_tile(const BranchArgs& a, const Tile& tile, const KeyGrads& grads,
                                 float* scratch) {
  const BranchRows rows(a, tile, NV * VL);
  How::template backward<NV, BY_ROW>(
      a, tile, rows, [&](bool with_gradients, auto block_scratch, auto visit) {
        for_each_branch_block<NV == 1>(a, tile, rows, with_gradients ? &grads : nullptr,
                                       block_scratch, visit);
      }, scratch);
}

// Whether panels of one vector serve a tile: where it has no more rows, and where rows lie so far
// apart that the second half sees blocks of keys that the first does not.
static bool is_thin(const BranchArgs& a, const Tile& tile) {
  const int64_t rows = tile.t1 - tile.t0;
  if ((tile.h1 - tile.h0) * rows <= VL) return true;
  const KeyRange* ranges = a.ranges + tile.b / a.F * a.ranges_stride;
  auto keys = [&](int64_t e) { return ranges[a.entries[e] / a.A].hi; };
  const int64_t half = rows < VL ? rows : VL, whole = rows < 2 * VL ? rows : 2 * VL;
  return keys(tile.t0 + whole - 1) - keys(tile.t0 + half - 1) > BLOCK_KEYS;
}

// Whether thin panels may be summed by row.
static bool has_whole_vectors(const BranchArgs& a) { return a.D % VL == 0 && a.Dv % VL == 0; }

template <class How>
static void branch_forward_by(const BranchArgs& a, const Tile& tile, float* scratch) {
  if (!is_thin(a, tile)) branch_forward_tile<How, 2, false>(a, tile, scratch);
  else if (has_whole_vectors(a)) branch_forward_tile<How, 1, true>(a, tile, scratch);
  else branch_forward_tile<How, 1, false>(a, tile, scratch);
}

template <class How>
static void branch_backward_by(const BranchArgs& a, const Tile& tile, const KeyGrads& grads,
                               float* scratch) {
  const KeyRange& last = a.ranges[tile.b / a.F * a.ranges_stride + a.entries[tile.t1 - 1] / a.A];
  // with few keys also the sums over rows are short ones
  if (!is_thin(a, tile) && last.hi - last.lo > SumRuns::FEW)
    branch_backward_tile<How, 2, false>(a, tile, grads, scratch);
  else if (has_whole_vectors(a)) branch_backward_tile<How, 1, true>(a, tile, grads, scratch);
  else branch_backward_tile<How, 1, false>(a, tile, grads, scratch);
}
