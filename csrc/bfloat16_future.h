// Backward of future attention in bfloat16: what FloatFutureSteps does, in products of pairs.
//
// Included after bfloat16_rows.h and future_attention_backward_tile.h. Rows of Sides are pairs of lanes.

template <int NV>
struct PairFutureSteps {
  static constexpr int64_t PANEL = NV * VL, HALF = PANEL / 2;
  const FutureArgs& a;
  const int64_t panels, ldk = round_up(a.D, VL), ldv = round_up(a.Dv, VL);
  const float scale2 = (float)(a.scale * LOG2E);
  float *scores, *dw;      // [BLOCK_KEYS + 2][PANEL], whole pairs of keys
  float* ds_pairs;         // [BLOCK_KEYS / 2 + 1][PANEL], pairs of keys
  float *p_all, *ds_all;   // [panel][BLOCK_KEYS][HALF], pairs of lanes
  float* pair_rows;        // rows on their way to panels
  PairScratch block_scratch;

  PairFutureSteps(const FutureArgs& a, const SumRuns&, int64_t panels, Pieces& pieces)
      : a(a), panels(panels) {
    scores = pieces.take((BLOCK_KEYS + 2) * PANEL);
    dw = pieces.take((BLOCK_KEYS + 2) * PANEL);
    ds_pairs = pieces.take((BLOCK_KEYS / 2 + 1) * PANEL);
    p_all = pieces.take(TILE_ROWS / 2 * BLOCK_KEYS);
    ds_all = pieces.take(TILE_ROWS / 2 * BLOCK_KEYS);
    pair_rows = pieces.take(TILE_ROWS * (ldk > ldv ? ldk : ldv));
    block_scratch = {pieces.take(pair_scratch(a.D, a.Dv)), true};
  }

  static int64_t scratch(const FutureArgs& a) {
    const int64_t wide = round_up(a.D, VL) + round_up(a.Dv, VL);
    return (5 * BLOCK_KEYS + 10) * VL + TILE_ROWS * BLOCK_KEYS + 5 * TILE_ROWS * wide +
           pair_scratch(a.D, a.Dv);
  }

  // Rounds rows [lanes][ld] of floats to bfloat16, in place; gives both layouts of them that products
  // with keys need.
  Sides sides(float* rows, int64_t ld, int64_t width, Pieces& pieces) const {
    const int64_t terms = pairs_in(width), ldp = round_up(terms, VL), lanes = panels * PANEL;
    const Sides made{pieces.take(TILE_ROWS * terms), pieces.take(TILE_ROWS / 2 * ld)};
    for (int64_t i = 0; i < lanes; ++i) {
      float *row = rows + i * ld, *to = pair_rows + i * ldp;
      for (int64_t d = 0; d < ld; d += VL) {
        const __m256i numbers = (__m256i)_mm512_cvtneps_pbh((__m512)*(vf*)(row + d));
        _mm256_storeu_si256((__m256i*)(to + d / 2), numbers);
        *(vf*)(row + d) = floats_of(numbers);
      }
      __builtin_memset(to + ld / 2, 0, (ldp - ld / 2) * 4);
    }
    to_panels(pair_rows, ldp, lanes, terms, PANEL, made.panels);
    interleave({pair_rows, ldp}, lanes, width, ld, made.rows);
    return made;
  }

  // The products of rows with the rounded gradients that they meet.
  void products(const float* rows, const float* g_rows, const Sides&, float* totals) const {
    for (int64_t i = 0; i < panels * PANEL; ++i) {
      vf sum{};
      for (int64_t d = 0; d < ldv; d += VL)
        sum = fma(*(const vf*)(rows + i * ldv + d), *(const vf*)(g_rows + i * ldv + d), sum);
      totals[i] = _mm512_reduce_add_ps((__m512)sum);
    }
  }

  static void lse(float high, float low, float* to_high, float* to_low) {
    saved_pair_lse(high, low, to_high, to_low);
  }

  // Calls use(panel, its pairs of keys) with their scores and gradients of weights.
  template <class AnyBlock, class Use>
  void with_products(const AnyBlock& block, const QuerySide& side, int64_t p, Use use) const {
    const Span seen(block, p);
    if (seen.first >= seen.last) return;
    const PairSpan span(seen.first - block.begin, seen.last - seen.first);
    pair_gradients<NV>(block, p, seen, span, a.D, a.Dv, side.q.panels, side.g.panels, scores, dw);
    use(span);
  }

  MEMATTN_INLINE vf weight(const QuerySide& side, int64_t p, int64_t j, int v) const {
    const int64_t at = p * NV + v;
    return saved_pair_weight(((const vf*)scores)[j * NV + v], scale2, ((const vf*)side.lse_high)[at],
                             ((const vf*)side.lse_low)[at]);
  }

  template <class AnyBlock>
  void add_means(const AnyBlock& block, const QuerySide& side, const QuerySide* past_target,
                 WeightedMean* means, WeightedMean* target_means) const {
    for (int64_t p = 0; p < panels; ++p)
      with_products(block, side, p, [&](const PairSpan& span) {
        for (int64_t j = 0; j < 2 * span.pairs; ++j)
          for (int v = 0; v < NV; ++v) {
            means[p * NV + v].add(weight(side, p, j, v), ((const vf*)dw)[j * NV + v]);
            if (past_target) target_means[p * NV + v].add(weight(*past_target, p, j, v), vf{});
          }
      });
  }

  template <class AnyBlock>
  void add_gradients(const AnyBlock& block, const QuerySide& side, const QuerySide* past_target) const {
    PanelSpans spans;
    for (int64_t p = 0; p < panels; ++p) {
      spans.look(block, p);
      float *p_rows = p_all + p * BLOCK_KEYS * HALF, *ds_rows = ds_all + p * BLOCK_KEYS * HALF;
      if (spans.count(p) < block.n) {  // keys that this panel does not see add nothing
        clear_outside<NV, Pairs>(p_rows, block.n, spans, p);
        clear_outside<NV, Pairs>(ds_rows, block.n, spans, p);
      }
      with_products(block, side, p, [&](const PairSpan& span) {
        p_rows += 2 * span.begin * HALF, ds_rows += 2 * span.begin * HALF;
        past_target ? weigh<true>(side, past_target, p, span, p_rows, ds_rows)
                    : weigh<false>(side, past_target, p, span, p_rows, ds_rows);
        with_own_keys(block, span, a.D, [&](const float* keys) {
          product<NV, Store::add, false, Pairs>(a.D, 1, span.pairs, keys, a.D, 0, ds_pairs, PANEL, 0,
                                                side.d_q + p * a.D * PANEL, PANEL, nullptr);
        });
      });
    }
    add_rows<NV, Pairs>(p_all, side.g.rows, panels, block.d_value, ldv, block.n, panels, spans);
    add_rows<NV, Pairs>(ds_all, side.q.rows, panels, block.d_key, ldk, block.n, panels, spans);
  }

  // Weights and gradients of the scores of a panel, rounded.
  template <bool PAST_TARGET>
  MEMATTN_INLINE void weigh(const QuerySide& side, const QuerySide* past_target, int64_t p,
                            const PairSpan& span, float* p_rows, float* ds_rows) const {
    const vf *mean = (const vf*)side.mean + p * NV, *extra = (const vf*)side.d_lse + p * NV;
    for (int64_t i = 0; i < span.pairs; ++i) {
      vf w[2][NV], ds[2][NV];
      for (int k = 0; k < 2; ++k)
        for (int v = 0; v < NV; ++v) {
          const int64_t j = 2 * i + k;
          w[k][v] = weight(side, p, j, v);
          ds[k][v] = w[k][v] * ((((const vf*)dw)[j * NV + v] - mean[v]) + extra[v]);
          if constexpr (PAST_TARGET)  // the past enters the target through its log-sum-exp
            ds[k][v] = fma(-weight(*past_target, p, j, v), ((const vf*)past_target->mean)[p * NV + v],
                           ds[k][v]);
        }
      store_lane_pairs<NV, HALF>(w[0], w[1], p_rows + 2 * i * HALF);
      store_lane_pairs<NV, HALF>(ds[0], ds[1], ds_rows + 2 * i * HALF);
      for (int v = 0; v < NV; ++v)
        _mm512_store_si512(ds_pairs + i * PANEL + v * VL, paired(ds[0][v], ds[1][v]));
    }
  }
};
