// Attention to selected chapters, forward: a softmax for each query and chapter, which are merged
// query by query in the order of chapters.
//
// Included once per instruction set after chapter_attention_rows.h. What a query gets does not depend
// on what else is in its tile: so its bits depend on the query and its chapters alone.

// The softmax state of a query row.
struct RowState {
  float high, low, sum;
};

// w = mantissa * 2^exponent with a mantissa in [1, 2); NaN for what is not finite.
static MEMATTN_INLINE void split_weight(vf w, vf* exponent, vf* mantissa) {
  const vi is_small = w < 0x1p-126f;
  const vf normal = select(is_small, w * 0x1p64f, w);
  const vi bits = (vi)normal;
  *exponent = __builtin_convertvector((bits >> 23 & 511) - 127, vf) -
              select(is_small, broadcast(64.0f), vf{});
  *mantissa = select(normal <= 3.4028235e38f, (vf)((bits & 0x7fffff) | 0x3f800000),
                     broadcast(__builtin_nanf("")));
}

// rows[i][:] = alpha[i] * rows[i][:] + beta[i] * the sum over n units of keys of weights[unit][i] *
// keys[unit][:], summed in one go; `width` is a multiple of two vectors.
template <int MR, class Unit>
static MEMATTN_INLINE void merge_group(int64_t n, const float* weights, int64_t panel,
                                       const float* keys, int64_t width, float* const* rows,
                                       const float* alpha, const float* beta) {
  for (int64_t d = 0; d < width; d += 2 * VL) {
    vf acc[MR][2];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) acc[m][0] = acc[m][1] = vf{};
    const float *w = weights, *from = keys + d;
#pragma GCC unroll 4
    for (int64_t k = 0; k < n; ++k, w += panel, from += width) {
      const vf low = ((const vf*)from)[0], high = ((const vf*)from)[1];
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const vf wm = Unit::all(w + m);
        acc[m][0] = Unit::add_product(wm, low, acc[m][0]);
        acc[m][1] = Unit::add_product(wm, high, acc[m][1]);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        vf_unaligned* to = (vf_unaligned*)(rows[m] + d) + v;
        *to = *to * alpha[m] + acc[m][v] * beta[m];
      }
  }
}

// Calls visit(i, number of rows) for groups of up to MR of n rows, the last ones in one go.
template <int MR, class Visit>
static MEMATTN_INLINE void for_each_group(int64_t i, int64_t n, Visit visit) {
  for (; n - i >= MR; i += MR) visit(i, std::integral_constant<int, MR>());
  if constexpr (MR > 8) for_each_group<8>(i, n, visit);
  else if constexpr (MR > 1) for_each_group<MR - 1>(i, n, visit);
}

template <int PANEL, class Unit>
static void merge_rows(int64_t lanes, int64_t n, const float* weights, const float* keys,
                       int64_t width, float* const* rows, const float* alpha, const float* beta) {
  for_each_group<micro_rows<2>()>(0, lanes, [&](int64_t i, auto mr) {
    merge_group<mr, Unit>(n, weights + i, PANEL, keys, width, rows + i, alpha + i, beta + i);
  });
}

template <class How>
struct ChapterForward {
  using Unit = typename How::Unit;
  const ChapterArgs& a;
  const QueryRange& range;
  int64_t ldk, ldv;
  decltype(How::exponent(1.0)) scale2;
  RowSums sums;
  RowState* states;  // [heads of the group][tokens of the range]
  float *spare, *q, *scores, *out, *key, *value, *summed;

  ChapterForward(const ChapterArgs& a, const QueryRange& range, float* scratch)
      : a(a), range(range), ldk(round_up(a.D, VL)), ldv(round_up(a.Dv, VL)),
        scale2(How::exponent(a.scale)) {
    const int64_t G = a.H / a.Hkv, tokens = range.t1 - range.t0;
    Pieces pieces{scratch};
    spare = pieces.take(VL * ldk), q = pieces.take(2 * VL * a.D);
    scores = pieces.take(2 * CHAPTER_KEYS * 2 * VL), out = pieces.take(2 * VL * ldv);
    key = pieces.take(CHAPTER_KEYS * ldk), value = pieces.take(CHAPTER_KEYS * ldv);
    summed = pieces.take(How::more_scratch(a));
    states = (RowState*)pieces.take(G * tokens * 3);
    sums.b0 = range.b, sums.h0 = range.hkv * G, sums.t0 = range.t0;
    if (a.out.dtype == Dtype::float32) {
      sums.data = (float*)a.out.data + at(a.out, sums.b0, sums.h0, sums.t0);
      for (int i = 0; i < 3; ++i) sums.stride[i] = a.out.stride[i];
    } else {
      sums.data = pieces.take(G * tokens * ldv);
      sums.stride[1] = tokens * ldv, sums.stride[2] = ldv;
    }
  }

  RowState& state_of(int64_t head, int64_t t) const {
    return states[(head - sums.h0) * (range.t1 - range.t0) + t - range.t0];
  }

  void run() {
    const int64_t G = a.H / a.Hkv;
    for (int64_t h = sums.h0; h < sums.h0 + G; ++h)
      for (int64_t t = range.t0; t < range.t1; ++t) {
        state_of(h, t) = {NO_SCORE, 0.0f, 0.0f};
        __builtin_memset(sums.row(range.b, h, t), 0, a.Dv * 4);
      }
    const Entries rows = rows_of(a, range);
    for (int row_class = 0; row_class < ROW_CLASSES; ++row_class) {
      if (!(a.classes >> row_class & 1)) continue;
      const SumRuns runs = class_runs(row_class);
      ChapterBlocks<How> blocks{a, 0, range.hkv, false, key, value, summed};
      TileWalk walk(a, range, rows, row_class, 0, a.C);
      walk.for_each(a.C, [&](const ChapterLanes& lanes, const ChapterLanes& next) {
        blocks.turn_to(lanes.c);
        for_each_panel(lanes.n, [&](const Panel& panel, auto nv) {
          this->template attend_panel<nv>(lanes, panel, next, runs, blocks);
        });
      });
    }
    for (int64_t h = sums.h0; h < sums.h0 + G; ++h)
      for (int64_t t = range.t0; t < range.t1; ++t) finish(h, t);
  }

  template <int NV>
  void attend_panel(const ChapterLanes& lanes, const Panel& panel, const ChapterLanes& next,
                    const SumRuns& runs, ChapterBlocks<How>& blocks) {
    constexpr int64_t PANEL = NV * VL;
    gather_panel<How, NV>(a.query, lanes, panel, a.D, ldk, spare, nullptr, q);
    fetch_ahead(a, range.hkv, lanes, next, panel, [&](int64_t b, int64_t h, int64_t t) {
      fetch_row(a.query, at(a.query, b, h, t), a.D);
      fetch_bytes(sums.row(b, h, t), a.Dv * 4);
    });
    SoftmaxState<NV> state;
    clear<NV>(&state, 1);
    // keys that are summed in one go need no rows of their own
    const int64_t run = How::run(runs.keys);
    const bool is_direct =
        !Unit::HAS_TILES && a.M <= run && blocks.is_one() && a.Dv % (2 * VL) == 0;
    const float* weights = nullptr;
    for (int64_t block = 0; block < blocks.count(); ++block) {
      blocks.load(block);
      How::template products<NV>(blocks.key, blocks.n, a.D, runs, q, scores);
      vf alpha[NV];
      weights = How::template weigh<NV>(scores, blocks.n, scale2, &state, alpha);
      if (is_direct) break;
      if (block)
        for (int64_t i = 0; i < panel.n; ++i)
          for (int64_t d = 0; d < ldv; ++d) out[i * ldv + d] *= ((const float*)alpha)[i];
      weighted_rows<PANEL, Unit>(panel.n, blocks.units, run, weights, blocks.summed, ldv, block > 0,
                                 out);
    }
    merge_panel<NV>(lanes, panel, state, is_direct ? &blocks : nullptr, weights);
  }

  // Adds what the lanes of a panel have from this chapter to their rows: the rows of `out`, or with
  // `direct` the sums of its values under `weights`.
  template <int NV>
  void merge_panel(const ChapterLanes& lanes, const Panel& panel, const SoftmaxState<NV>& chapter,
                   const ChapterBlocks<How>* direct, const float* weights) {
    constexpr int64_t PANEL = NV * VL;
    alignas(64) float high[PANEL], low[PANEL], sum[PANEL], before[PANEL], here[PANEL];
    RowState* state[PANEL];
    float* rows[PANEL];
    for (int64_t i = 0; i < PANEL; ++i) {
      const int64_t lane = panel.first + (i < panel.n ? i : 0);
      state[i] = &state_of(lanes.head[lane], lanes.t[lane]);
      high[i] = state[i]->high, low[i] = state[i]->low, sum[i] = state[i]->sum;
    }
    for (int v = 0; v < NV; ++v) {
      vf *h = (vf*)high + v, *l = (vf*)low + v, *s = (vf*)sum + v;
      const vf factor = *((const vf*)(lanes.weight + panel.first) + v);
      vf bias{}, part = broadcast(1.0f);
      if (a.counts_slots)
        split_weight(a.is_joint ? factor : *((const vf*)(lanes.number + panel.first) + v), &bias,
                     &part);
      // the maximum with the exponent of the weight, exactly
      const vf own = chapter.high[v] + bias, taken = own - chapter.high[v];
      vf rest = chapter.low[v] + ((chapter.high[v] - (own - taken)) + (bias - taken));
      rest = select(is_large(own), vf{}, rest);
      const vi higher = own > *h;
      const vf top = select(higher, own, *h), top_low = select(higher, rest, *l);
      auto fall = [&](vf from, vf from_low) {
        const vf x = from - top, x_low = from_low - top_low;
        return exp2_nonpositive(x, [&](vf n) { return (x - n) + x_low; });
      };
      const vf alpha = fall(*h, *l), beta = fall(own, rest) * part;
      *s = fma(*s, alpha, chapter.sum[v] * beta);
      *h = top, *l = top_low;
      ((vf*)before)[v] = a.is_joint ? alpha : broadcast(1.0f);
      ((vf*)here)[v] = a.is_joint ? beta : factor / chapter.sum[v];
    }
    for (int64_t i = 0; i < panel.n; ++i) {
      const int64_t lane = panel.first + i;
      *state[i] = {high[i], low[i], sum[i]};
      rows[i] = sums.row(range.b, lanes.head[lane], lanes.t[lane]);
    }
    if (direct)
      merge_rows<PANEL, Unit>(panel.n, direct->units, weights, direct->summed, a.Dv, rows, before,
                              here);
    else
      for (int64_t i = 0; i < panel.n; ++i)
        scale_and_add(rows[i], out + i * ldv, a.Dv, before[i], here[i]);
  }

  void finish(int64_t h, int64_t t) {
    const int64_t flat = (range.b * a.H + h) * a.T + t;
    const RowState& state = state_of(h, t);
    float* row = sums.row(range.b, h, t);
    if (a.is_joint && state.sum != 0.0f)
      for (int64_t d = 0; d < a.Dv; ++d) row[d] /= state.sum;
    if (a.out.dtype != Dtype::float32)
      store_row(a.out, at(a.out, range.b, h, t), a.out.stride[3], a.Dv, row);
    const RowLse lse(state.high, state.low, state.sum);
    a.lse[flat] = lse.natural, a.lse2_high[flat] = lse.high, a.lse2_low[flat] = lse.low;
  }
};

template <class How>
static void chapter_forward(const ChapterArgs& a, const QueryRange& range, float* scratch) {
  ChapterForward<How>(a, range, scratch).run();
}
