// Backward of future attention and its loss, one tile of queries at a time.
//
// Included once per instruction set after future_attention_tile.h. Products with keys are in a class of
// steps: FloatFutureSteps here, and bfloat16_future.h for pairs.

// Rows of queries or gradients: panels [panel][D or Dv][PANEL], and rows [lanes][D or Dv rounded up],
// both in the units of products.
struct Sides {
  float *panels, *rows;
};

// Queries, their gradients and their sums, for one kind of keys.
struct QuerySide {
  Sides q;
  Sides g;                           // gradient of what the weighted values add up to
  float* d_q;                        // panels
  const float *lse_high, *lse_low;   // in units of log 2
  float* mean;                       // sum over the keys of weight * (g . value)
  float* d_lse;
};

template <int NV>
struct FloatFutureSteps {
  static constexpr int64_t PANEL = NV * VL;
  const FutureArgs& a;
  const SumRuns runs;
  const int64_t panels, ldk = round_up(a.D, VL), ldv = round_up(a.Dv, VL);
  const Split scale2 = Split::factor(a.scale * LOG2E);
  float *p_all, *ds_all;  // [panel][BLOCK_KEYS][PANEL]
  float* block_scratch;

  FloatFutureSteps(const FutureArgs& a, const SumRuns& runs, int64_t panels, Pieces& pieces)
      : a(a), runs(runs), panels(panels) {
    p_all = pieces.take(TILE_ROWS * BLOCK_KEYS);
    ds_all = pieces.take(TILE_ROWS * BLOCK_KEYS);
    block_scratch = pieces.take(BLOCK_KEYS * (a.D + a.Dv));
  }

  static int64_t scratch(const FutureArgs& a) {
    const int64_t wide = round_up(a.D, VL) + round_up(a.Dv, VL);
    return 2 * TILE_ROWS * BLOCK_KEYS + (BLOCK_KEYS + 4 * TILE_ROWS) * wide;
  }

  // Rows [lanes][ld] in both layouts that products with keys need.
  Sides sides(float* rows, int64_t ld, int64_t width, Pieces& pieces) const {
    float* to = pieces.take(TILE_ROWS * width);
    to_panels(rows, ld, panels * PANEL, width, PANEL, to);
    return {to, rows};
  }

  // The products of rows with the gradients that they meet.
  void products(const float* rows, const float*, const Sides& g, float* totals) const {
    row_dot_products(rows, ldv, g.panels, PANEL, panels * PANEL, a.Dv, runs.dims, totals);
  }

  static void lse(float high, float low, float* to_high, float* to_low) {
    saved_lse(high, low, to_high, to_low);
  }

  // Scores of the keys [span.first, span.last) in panel p, and g . value of each.
  void score(const Block& block, const QuerySide& side, int64_t p, const Span& span, float* scores,
             float* dw) const {
    const int64_t n = span.last - span.first, skip = span.first - block.begin;
    dot_products<NV>(n, a.D, runs.dims, block.key.data + skip * block.key.stride, block.key.stride,
                     side.q.panels + p * a.D * PANEL, PANEL, scores, PANEL);
    if (span.partial) mask_panel<NV>(scores, *block.seen, p, span.first, span.last);
    dot_products<NV>(n, a.Dv, runs.dims, block.value.data + skip * block.value.stride,
                     block.value.stride, side.g.panels + p * a.Dv * PANEL, PANEL, dw, PANEL);
  }

  // Takes a block into the means; `past_target`, where there is one, is the target's side of its past,
  // whose values are not in the target.
  void add_means(const Block& block, const QuerySide& side, const QuerySide* past_target,
                 WeightedMean* means, WeightedMean* target_means) const {
    for (int64_t p = 0; p < panels; ++p) {
      const Span span(block, p);
      if (span.first >= span.last) continue;
      score(block, side, p, span, p_all, ds_all);
      const QuerySide& target = past_target ? *past_target : side;
      for (int v = 0; v < NV; ++v) {
        const int64_t at = p * NV + v;
        const vf high = ((const vf*)side.lse_high)[at], low = ((const vf*)side.lse_low)[at];
        const vf t_high = ((const vf*)target.lse_high)[at], t_low = ((const vf*)target.lse_low)[at];
        const vf lows[2] = {low, t_low};
        with_large_lanes<2>(lows, [&](auto some_large) {
          for (int64_t j = 0; j < span.last - span.first; ++j) {
            const vf s = ((const vf*)p_all)[j * NV + v];
            means[at].add(saved_weight<some_large>(s, scale2, high, low),
                          ((const vf*)ds_all)[j * NV + v]);
            if (past_target)
              target_means[at].add(saved_weight<some_large>(s, scale2, t_high, t_low), vf{});
          }
        });
      }
    }
  }

  // Adds what a block gives to all gradients. The past enters the target through its log-sum-exp.
  void add_gradients(const Block& block, const QuerySide& side, const QuerySide* past_target) const {
    PanelSpans spans;
    for (int64_t p = 0; p < panels; ++p) {
      const Span span = spans.look(block, p);
      const int64_t n = spans.count(p), skip = spans.first[p];
      float* weights = p_all + p * BLOCK_KEYS * PANEL;
      float* ds = ds_all + p * BLOCK_KEYS * PANEL;
      if (n < block.n) {  // keys that this panel does not see add nothing
        clear_outside<NV>(weights, block.n, spans, p);
        clear_outside<NV>(ds, block.n, spans, p);
      }
      if (n <= 0) continue;
      weights += skip * PANEL, ds += skip * PANEL;
      score(block, side, p, span, weights, ds);
      const QuerySide& target = past_target ? *past_target : side;
      for (int v = 0; v < NV; ++v) {
        const int64_t at = p * NV + v;
        const vf high = ((const vf*)side.lse_high)[at], low = ((const vf*)side.lse_low)[at];
        const vf mean = ((const vf*)side.mean)[at], extra = ((const vf*)side.d_lse)[at];
        const vf t_high = ((const vf*)target.lse_high)[at], t_low = ((const vf*)target.lse_low)[at];
        const vf t_mean = ((const vf*)target.mean)[at];
        vf* w = (vf*)weights + v;
        vf* d = (vf*)ds + v;
        const vf lows[2] = {low, t_low};
        with_large_lanes<2>(lows, [&](auto some_large) {
          if (past_target)
            for (int64_t j = 0; j < n * NV; j += NV) {
              const vf in_target = saved_weight<some_large>(w[j], scale2, t_high, t_low);
              w[j] = saved_weight<some_large>(w[j], scale2, high, low);
              d[j] = fma(-in_target, t_mean, w[j] * ((d[j] - mean) + extra));
            }
          else
#pragma GCC unroll 2
            for (int64_t j = 0; j < n * NV; j += NV) {
              w[j] = saved_weight<some_large>(w[j], scale2, high, low);
              d[j] = w[j] * ((d[j] - mean) + extra);
            }
        });
      }
      add_weighted<NV>(a.D, n, runs.keys, block.key.data + skip * block.key.stride,
                       block.key.stride, ds, PANEL, side.d_q + p * a.D * PANEL, PANEL, nullptr);
    }
    add_rows<NV>(p_all, side.g.rows, runs.panels, block.d_value, ldv, block.n, panels, spans);
    add_rows<NV>(ds_all, side.q.rows, runs.panels, block.d_key, ldk, block.n, panels, spans);
  }
};

template <template <int> class Steps, int NV>
static void future_backward_tile(const FutureArgs& a, const Tile& tile, const FutureGrads& grads,
                                 float* scratch) {
  constexpr int64_t PANEL = NV * VL;
  const FutureTileRows rows(a, tile, PANEL);
  const int64_t ldk = round_up(a.D, VL), ldv = round_up(a.Dv, VL);
  const bool has_loss = a.loss != FutureLoss::none, with_target = a.walks_target(true);
  Pieces pieces{scratch};
  const SumRuns runs = rows.sum_runs();
  const Steps<NV> steps(a, runs, rows.lanes / PANEL, pieces);
  float *q_rows = pieces.take(TILE_ROWS * ldk), *d_q = pieces.take(TILE_ROWS * a.D);
  float* g_rows = pieces.take(TILE_ROWS * ldv);
  float* future_g_rows = pieces.take(TILE_ROWS * ldv);
  float* target_g_rows = pieces.take(TILE_ROWS * ldv);
  float* out_rows = pieces.take(TILE_ROWS * ldv);
  float* target_rows = pieces.take(TILE_ROWS * ldv);
  // of each lane; a log-sum-exp in units of log 2
  float* lanes = pieces.take(8 * TILE_ROWS);
  float *lse_high = lanes, *lse_low = lanes + TILE_ROWS, *delta = lanes + 2 * TILE_ROWS,
        *d_lse = lanes + 3 * TILE_ROWS, *target_high = lanes + 4 * TILE_ROWS,
        *target_low = lanes + 5 * TILE_ROWS, *target_delta = lanes + 6 * TILE_ROWS,
        *target_d_lse = lanes + 7 * TILE_ROWS;
  __builtin_memset(lanes, 0, 8 * TILE_ROWS * 4);

  load_rows(a.query, tile, rows, a.D, ldk, q_rows);
  const Sides q = steps.sides(q_rows, ldk, a.D, pieces);
  __builtin_memset(d_q, 0, rows.lanes * a.D * 4);
  Sides future_q = q;
  float* d_future_q = d_q;
  if (a.separate_query) {
    float* future_q_rows = pieces.take(TILE_ROWS * ldk);
    d_future_q = pieces.take(TILE_ROWS * a.D);
    load_rows(a.future_query, tile, rows, a.D, ldk, future_q_rows);
    future_q = steps.sides(future_q_rows, ldk, a.D, pieces);
    __builtin_memset(d_future_q, 0, rows.lanes * a.D * 4);
  }
  load_rows(a.d_out, tile, rows, a.Dv, ldv, g_rows);
  load_rows(a.out_future, tile, rows, a.Dv, ldv, out_rows);
  // the gradient of out_future itself, then with that of out, which contains it
  if (has_loss) {
    load_rows(a.target, tile, rows, a.Dv, ldv, target_rows);
    __builtin_memset(future_g_rows, 0, rows.lanes * ldv * 4);
    __builtin_memset(target_g_rows, 0, rows.lanes * ldv * 4);
    for (int64_t i = 0; i < rows.n; ++i) {
      if (rows.range[i]->mid >= rows.range[i]->hi) continue;
      const float *x = out_rows + i * ldv, *y = target_rows + i * ldv;
      row_loss_gradient(a.loss, a.d_row_loss, x, y, a.Dv, future_g_rows + i * ldv);
      if (with_target)
        row_loss_gradient(a.loss, a.d_row_loss, y, x, a.Dv, target_g_rows + i * ldv);
    }
  } else {
    load_rows(a.d_out_future, tile, rows, a.Dv, ldv, future_g_rows);
  }
  for (int64_t i = 0; i < rows.lanes * ldv; ++i) future_g_rows[i] += g_rows[i];
  const Sides g = steps.sides(g_rows, ldv, a.Dv, pieces);
  const Sides future_g = steps.sides(future_g_rows, ldv, a.Dv, pieces);
  Sides target_g{nullptr, nullptr};
  if (with_target) {
    target_g = steps.sides(target_g_rows, ldv, a.Dv, pieces);
    steps.products(target_rows, target_g_rows, target_g, target_delta);
  }
  // delta is that of the past's part of out and that of the future's, each with its own gradient in
  // the order of the products below: a row with one key gets gradient 0 exactly. The second part is made
  // on lanes that are not needed yet
  load_rows(a.out, tile, rows, a.Dv, ldv, target_rows);
  for (int64_t i = 0; i < rows.lanes * ldv; ++i) target_rows[i] -= out_rows[i];
  steps.products(target_rows, g_rows, g, delta);
  steps.products(out_rows, future_g_rows, future_g, target_d_lse);
  for (int64_t i = 0; i < rows.lanes; ++i) delta[i] += target_d_lse[i], target_d_lse[i] = 0.0f;

  for (int64_t i = 0; i < rows.lanes; ++i) {
    auto set = [&](const float* high, const float* low, float* to_high, float* to_low) {
      // weight 0 everywhere for lanes without a row and rows without a key
      if (i >= rows.n || rows.empty(i) || high[rows.flat[i]] == -__builtin_inff()) {
        to_high[i] = -NO_SCORE;
        return;
      }
      steps.lse(high[rows.flat[i]], low[rows.flat[i]], to_high + i, to_low + i);
    };
    set(a.lse2_high, a.lse2_low, lse_high, lse_low);
    if (i < rows.n && !rows.empty(i)) d_lse[i] = a.d_lse[rows.flat[i]];
    if (with_target) set(a.target2_high, a.target2_low, target_high, target_low);
  }

  const QuerySide sides[3] = {{q, g, d_q, lse_high, lse_low, delta, d_lse},
                              {future_q, future_g, d_future_q, lse_high, lse_low, delta, d_lse},
                              {q, target_g, d_q, target_high, target_low, target_delta, target_d_lse}};
  auto past_target = [&](Keys kind) { return with_target && kind == PAST ? &sides[AHEAD] : nullptr; };

  // with few keys the means are cheap to take from the weights, and their rounding cancels
  // against that of g . value
  if (runs.few_keys) {
    WeightedMean means[TILE_ROWS / VL], target_means[TILE_ROWS / VL];
    for_each_future_block(a, tile, rows, PANEL, nullptr, with_target, steps.block_scratch,
                          [&](Keys kind, const auto& block) {
      steps.add_means(block, sides[kind], past_target(kind), kind == AHEAD ? target_means : means,
                      target_means);
    });
    for (int64_t i = 0; i < rows.lanes / VL; ++i) {
      means[i].store((vf*)delta + i, (vf*)d_lse + i);
      target_means[i].store((vf*)target_delta + i, (vf*)target_d_lse + i);
    }
  }

  for_each_future_block(a, tile, rows, PANEL, &grads, with_target, steps.block_scratch,
                        [&](Keys kind, const auto& block) {
    steps.add_gradients(block, sides[kind], past_target(kind));
  });

  auto store_d_query = [&](const View& to, float* panel_sums) {
    for (int64_t j = 0; j < rows.lanes * a.D; ++j) panel_sums[j] *= (float)a.scale;
    from_panels(panel_sums, PANEL, rows.lanes, a.D, ldk, q_rows);
    for (int64_t i = 0; i < rows.n; ++i)
      store_row(to, rows.flat[i] * a.D, 1, a.D, q_rows + i * ldk);
  };
  store_d_query(a.d_query, d_q);
  if (a.separate_query) store_d_query(a.d_future_query, d_future_q);
}

template <template <int> class Steps>
static int64_t future_backward_scratch(const FutureArgs& a) {
  const int64_t wide = round_up(a.D, VL) + round_up(a.Dv, VL);
  return 6 * TILE_ROWS * wide + 8 * TILE_ROWS + 512 + Steps<2>::scratch(a);
}

template <template <int> class Steps>
static void future_backward_by(const FutureArgs& a, const Tile& tile, const FutureGrads& grads,
                               float* scratch) {
  future_backward_tile<Steps, 2>(a, tile, grads, scratch);
}
