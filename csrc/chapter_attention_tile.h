// Attention to selected chapters, forward: a softmax for each query and chapter, which are merged
// query by query in the order of chapters.
//
// Included once per instruction set after chapter_attention_rows.h. What a query gets does not depend
// on what else is in its tile: so its bits depend on the query and its chapters alone.

// Softmax states of query rows.
struct RowStates {
  float *high, *low, *sum;
};

// w = mantissa * 2^exponent with a mantissa in [1, 2); NaN for what is not finite.
static MEMATTN_INLINE void split_weight(float w, float* exponent, float* mantissa) {
  *exponent = 0.0f;
  if (w < 0x1p-126f) w *= 0x1p64f, *exponent = -64.0f;
  uint32_t bits;
  __builtin_memcpy(&bits, &w, 4);
  *exponent += (float)((int32_t)(bits >> 23) - 127);
  bits = (bits & 0x7fffff) | 0x3f800000;
  __builtin_memcpy(mantissa, &bits, 4);
  if (!(w <= 3.4028235e38f)) *mantissa = __builtin_nanf("");
}

struct ChapterForward {
  const ChapterArgs& a;
  const QueryRange& range;
  int64_t ldk, ldv;
  Split scale2;
  RowSums sums;
  RowStates states;  // [heads of the group][tokens of the range]
  float *rows, *q, *scores, *out, *key, *value;

  ChapterForward(const ChapterArgs& a, const QueryRange& range, float* scratch)
      : a(a), range(range), ldk(round_up(a.D, VL)), ldv(round_up(a.Dv, VL)),
        scale2(Split::factor(a.scale * LOG2E)) {
    const int64_t G = a.H / a.Hkv, tokens = range.t1 - range.t0;
    Pieces pieces{scratch};
    rows = pieces.take(TILE_ROWS * ldk), q = pieces.take(TILE_ROWS * a.D);
    scores = pieces.take(CHAPTER_KEYS * 2 * VL), out = pieces.take(2 * VL * ldv);
    key = pieces.take(CHAPTER_KEYS * ldk), value = pieces.take(CHAPTER_KEYS * ldv);
    states.high = pieces.take(G * tokens), states.low = pieces.take(G * tokens);
    states.sum = pieces.take(G * tokens);
    sums.b0 = range.b, sums.h0 = range.hkv * G, sums.t0 = range.t0;
    if (a.out.dtype == Dtype::float32) {
      sums.data = (float*)a.out.data + at(a.out, sums.b0, sums.h0, sums.t0);
      for (int i = 0; i < 3; ++i) sums.stride[i] = a.out.stride[i];
    } else {
      sums.data = pieces.take(G * tokens * ldv);
      sums.stride[1] = tokens * ldv, sums.stride[2] = ldv;
    }
  }

  int64_t state_of(int64_t head, int64_t t) const {
    return (head - sums.h0) * (range.t1 - range.t0) + t - range.t0;
  }

  void run() {
    const int64_t G = a.H / a.Hkv;
    for (int64_t h = sums.h0; h < sums.h0 + G; ++h)
      for (int64_t t = range.t0; t < range.t1; ++t) {
        const int64_t i = state_of(h, t);
        states.high[i] = NO_SCORE, states.low[i] = states.sum[i] = 0.0f;
        __builtin_memset(sums.row(range.b, h, t), 0, a.Dv * 4);
      }
    const Entries in_range = rows_of(a, range);
    for (int row_class = 0; row_class < ROW_CLASSES; ++row_class) {
      if (!(a.classes >> row_class & 1)) continue;
      const SumRuns runs = class_runs(row_class);
      for (int64_t c = 0; c < a.C; ++c) {
        ChapterBlocks blocks{a, c, range.hkv, ldk, ldv, key, value};
        for_each_tile(a, c, range.hkv, entries_of(a, c, in_range), range.t0, range.t1, row_class,
                      [&](const ChapterLanes& lanes) { attend_tile(lanes, runs, blocks); });
      }
    }
    for (int64_t h = sums.h0; h < sums.h0 + G; ++h)
      for (int64_t t = range.t0; t < range.t1; ++t) finish(h, t);
  }

  void attend_tile(const ChapterLanes& lanes, const SumRuns& runs, ChapterBlocks& blocks) {
    gather_rows(a.query, lanes, a.D, ldk, rows);
    rows_to_panels(rows, ldk, lanes.n, a.D, q);
    for_each_panel(lanes.n, [&](const Panel& panel, auto nv) {
      attend_panel<nv>(lanes, panel, runs, blocks);
    });
  }

  template <int NV>
  void attend_panel(const ChapterLanes& lanes, const Panel& panel, const SumRuns& runs,
                    ChapterBlocks& blocks) {
    constexpr int64_t PANEL = NV * VL;
    SoftmaxState<NV> state;
    clear<NV>(&state, 1);
    for (int64_t block = 0; block < blocks.count(); ++block) {
      blocks.load(block);
      dot_products<NV>(blocks.n, a.D, runs.dims, key, ldk, q + panel.first * a.D, PANEL, scores,
                       PANEL);
      vf alpha[NV];
      softmax_step<NV>(scores, blocks.n, scale2, &state, alpha);
      if (block)
        for (int64_t i = 0; i < panel.n; ++i)
          for (int64_t d = 0; d < ldv; ++d) out[i * ldv + d] *= ((const float*)alpha)[i];
      weighted_rows<PANEL>(panel.n, blocks.n, runs.keys, scores, value, ldv, block > 0, out);
    }
    merge_panel<NV>(lanes, panel, state);
  }

  // Adds what the lanes of a panel have from this chapter to their rows.
  template <int NV>
  void merge_panel(const ChapterLanes& lanes, const Panel& panel, const SoftmaxState<NV>& chapter) {
    constexpr int64_t PANEL = NV * VL;
    alignas(64) float high[PANEL], low[PANEL], sum[PANEL], exponent[PANEL], mantissa[PANEL];
    alignas(64) float factor[PANEL], before[PANEL], here[PANEL];
    for (int64_t i = 0; i < PANEL; ++i) {
      const int64_t lane = panel.first + (i < panel.n ? i : 0);
      const int64_t row = state_of(lanes.head[lane], lanes.t[lane]);
      high[i] = states.high[row], low[i] = states.low[row], sum[i] = states.sum[row];
      factor[i] = lanes.weight[lane], exponent[i] = 0.0f, mantissa[i] = 1.0f;
      if (a.counts_slots)
        split_weight(a.is_joint ? factor[i] : lanes.number[lane], exponent + i, mantissa + i);
    }
    for (int v = 0; v < NV; ++v) {
      vf *h = (vf*)high + v, *l = (vf*)low + v, *s = (vf*)sum + v;
      const vf bias = ((vf*)exponent)[v], part = ((vf*)mantissa)[v];
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
      ((vf*)here)[v] = a.is_joint ? beta : ((vf*)factor)[v] / chapter.sum[v];
    }
    for (int64_t i = 0; i < panel.n; ++i) {
      const int64_t lane = panel.first + i, row = state_of(lanes.head[lane], lanes.t[lane]);
      states.high[row] = high[i], states.low[row] = low[i], states.sum[row] = sum[i];
      scale_and_add(sums.row(range.b, lanes.head[lane], lanes.t[lane]), out + i * ldv, a.Dv,
                    before[i], here[i]);
    }
  }

  void finish(int64_t h, int64_t t) {
    const int64_t i = state_of(h, t), flat = (range.b * a.H + h) * a.T + t;
    float* row = sums.row(range.b, h, t);
    const float sum = states.sum[i];
    if (a.is_joint && sum != 0.0f)
      for (int64_t d = 0; d < a.Dv; ++d) row[d] /= sum;
    if (a.out.dtype != Dtype::float32)
      store_row(a.out, at(a.out, range.b, h, t), a.out.stride[3], a.Dv, row);
    const RowLse lse(states.high[i], states.low[i], sum);
    a.lse[flat] = lse.natural, a.lse2_high[flat] = lse.high, a.lse2_low[flat] = lse.low;
  }
};

static void chapter_forward(const ChapterArgs& a, const QueryRange& range, float* scratch) {
  ChapterForward(a, range, scratch).run();
}
