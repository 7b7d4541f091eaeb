// Backward of future attention and its loss, one tile of queries at a time.
//
// Included once per instruction set after future_attention_tile.h.

// What meets one kind of keys on the side of the queries: panels [panel][D or Dv][PANEL], and rows
// [lanes][D or Dv rounded up].
struct QuerySide {
  const float *q, *q_rows;
  const float *g, *g_rows;           // gradient of what the weighted values add up to
  float* d_q;                        // panels
  const float *lse_high, *lse_low;   // in units of log 2
  float* mean;                       // sum over the keys of weight * (g . value)
  const float* d_lse;
};

template <int NV>
static void future_backward_tile(const FutureArgs& a, const Tile& tile, const FutureGrads& grads,
                                 float* scratch) {
  constexpr int64_t PANEL = NV * VL;
  const FutureTileRows rows(a, tile, PANEL);
  const int64_t panels = rows.lanes / PANEL;
  const int64_t ldk = round_up(a.D, VL), ldv = round_up(a.Dv, VL);
  const bool has_loss = a.loss != FutureLoss::none, with_target = a.walks_target(true);
  auto take = [&scratch](int64_t n) {
    float* from = scratch;
    scratch += round_up(n, 16);
    return from;
  };
  float* p_all = take(TILE_ROWS * BLOCK_KEYS);  // [panel][BLOCK_KEYS][PANEL]
  float* ds_all = take(TILE_ROWS * BLOCK_KEYS);
  // panels, and rows
  float *q = take(TILE_ROWS * a.D), *q_rows = take(TILE_ROWS * ldk), *d_q = take(TILE_ROWS * a.D);
  float *future_q = q, *future_q_rows = q_rows, *d_future_q = d_q;
  float *g = take(TILE_ROWS * a.Dv), *g_rows = take(TILE_ROWS * ldv);
  float *future_g = take(TILE_ROWS * a.Dv), *future_g_rows = take(TILE_ROWS * ldv);
  float *target_g = take(TILE_ROWS * a.Dv), *target_g_rows = take(TILE_ROWS * ldv);
  float* out_rows = take(TILE_ROWS * ldv);
  float* target_rows = take(TILE_ROWS * ldv);
  float* block_scratch = take(BLOCK_KEYS * (a.D + a.Dv));
  // of each lane; a log-sum-exp in units of log 2
  float* lanes = take(8 * TILE_ROWS);
  float *lse_high = lanes, *lse_low = lanes + TILE_ROWS, *delta = lanes + 2 * TILE_ROWS,
        *d_lse = lanes + 3 * TILE_ROWS, *target_high = lanes + 4 * TILE_ROWS,
        *target_low = lanes + 5 * TILE_ROWS, *target_delta = lanes + 6 * TILE_ROWS,
        *target_d_lse = lanes + 7 * TILE_ROWS;
  __builtin_memset(lanes, 0, 8 * TILE_ROWS * 4);

  const Split scale2 = Split::factor(a.scale * LOG2E);
  const SumRuns runs = rows.sum_runs();
  load_rows(a.query, tile, rows, a.D, ldk, q_rows);
  to_panels(q_rows, ldk, rows.lanes, a.D, PANEL, q);
  __builtin_memset(d_q, 0, rows.lanes * a.D * 4);
  if (a.separate_query) {
    future_q = take(TILE_ROWS * a.D), future_q_rows = take(TILE_ROWS * ldk);
    d_future_q = take(TILE_ROWS * a.D);
    load_rows(a.future_query, tile, rows, a.D, ldk, future_q_rows);
    to_panels(future_q_rows, ldk, rows.lanes, a.D, PANEL, future_q);
    __builtin_memset(d_future_q, 0, rows.lanes * a.D * 4);
  }
  load_rows(a.d_out, tile, rows, a.Dv, ldv, g_rows);
  to_panels(g_rows, ldv, rows.lanes, a.Dv, PANEL, g);
  // delta is that of the past's part of out and that of the future's, each with its own gradient in
  // the order of the products below: a row with one key gets gradient 0 exactly
  load_rows(a.out, tile, rows, a.Dv, ldv, target_rows);
  load_rows(a.out_future, tile, rows, a.Dv, ldv, out_rows);
  for (int64_t i = 0; i < rows.lanes * ldv; ++i) target_rows[i] -= out_rows[i];
  row_dot_products(target_rows, ldv, g, PANEL, rows.lanes, a.Dv, runs.dims, delta);

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
    to_panels(target_g_rows, ldv, rows.lanes, a.Dv, PANEL, target_g);
    row_dot_products(target_rows, ldv, target_g, PANEL, rows.lanes, a.Dv, runs.dims, target_delta);
  } else {
    load_rows(a.d_out_future, tile, rows, a.Dv, ldv, future_g_rows);
  }
  to_panels(future_g_rows, ldv, rows.lanes, a.Dv, PANEL, future_g);
  for (int64_t i = 0; i < rows.lanes * ldv; ++i) future_g_rows[i] += g_rows[i];
  for (int64_t i = 0; i < rows.lanes * a.Dv; ++i) future_g[i] += g[i];
  // the second part of delta, on lanes that are not needed yet
  row_dot_products(out_rows, ldv, future_g, PANEL, rows.lanes, a.Dv, runs.dims, target_d_lse);
  for (int64_t i = 0; i < rows.lanes; ++i) delta[i] += target_d_lse[i], target_d_lse[i] = 0.0f;

  for (int64_t i = 0; i < rows.lanes; ++i) {
    auto set = [&](const float* high, const float* low, float* to_high, float* to_low) {
      // weight 0 everywhere for lanes without a row and rows without a key
      if (i >= rows.n || rows.empty(i) || high[rows.flat[i]] == -__builtin_inff()) {
        to_high[i] = -NO_SCORE;
        return;
      }
      saved_lse(high[rows.flat[i]], low[rows.flat[i]], to_high + i, to_low + i);
    };
    set(a.lse2_high, a.lse2_low, lse_high, lse_low);
    if (i < rows.n && !rows.empty(i)) d_lse[i] = a.d_lse[rows.flat[i]];
    if (with_target) set(a.target2_high, a.target2_low, target_high, target_low);
  }

  const QuerySide sides[3] = {
      {q, q_rows, g, g_rows, d_q, lse_high, lse_low, delta, d_lse},
      {future_q, future_q_rows, future_g, future_g_rows, d_future_q, lse_high, lse_low, delta, d_lse},
      {q, q_rows, target_g, target_g_rows, d_q, target_high, target_low, target_delta,
       target_d_lse}};

  // scores of the keys [span.first, span.last) in panel p, and g . value of each
  auto score = [&](const Block& block, const QuerySide& side, int64_t p, const Span& span,
                   float* scores, float* dw) {
    const int64_t n = span.last - span.first, skip = span.first - block.begin;
    dot_products<NV>(n, a.D, runs.dims, block.key.data + skip * block.key.stride, block.key.stride,
                     side.q + p * a.D * PANEL, PANEL, scores, PANEL);
    if (span.partial) mask_panel<NV>(scores, *block.seen, p, span.first, span.last);
    dot_products<NV>(n, a.Dv, runs.dims, block.value.data + skip * block.value.stride,
                     block.value.stride, side.g + p * a.Dv * PANEL, PANEL, dw, PANEL);
  };

  // with few keys the means are cheap to take from the weights, and their rounding cancels
  // against that of g . value
  if (runs.few_keys) {
    WeightedMean means[TILE_ROWS / VL], target_means[TILE_ROWS / VL];
    for_each_future_block(a, tile, rows, PANEL, nullptr, with_target, block_scratch,
                          [&](Keys kind, const Block& block) {
      const QuerySide& side = sides[kind];
      for (int64_t p = 0; p < panels; ++p) {
        const Span span(block, p);
        if (span.first >= span.last) continue;
        score(block, side, p, span, p_all, ds_all);
        for (int v = 0; v < NV; ++v) {
          const int64_t at = p * NV + v;
          const vf high = ((const vf*)side.lse_high)[at], low = ((const vf*)side.lse_low)[at];
          const vf t_high = ((const vf*)target_high)[at], t_low = ((const vf*)target_low)[at];
          WeightedMean& mean = kind == AHEAD ? target_means[at] : means[at];
          const vf lows[2] = {low, t_low};
          with_large_lanes<2>(lows, [&](auto some_large) {
            for (int64_t j = 0; j < span.last - span.first; ++j) {
              const vf s = ((const vf*)p_all)[j * NV + v];
              mean.add(saved_weight<some_large>(s, scale2, high, low),
                       ((const vf*)ds_all)[j * NV + v]);
              if (with_target && kind == PAST)  // its values are not in the target
                target_means[at].add(saved_weight<some_large>(s, scale2, t_high, t_low), vf{});
            }
          });
        }
      }
    });
    for (int64_t i = 0; i < rows.lanes / VL; ++i) {
      means[i].store((vf*)delta + i, (vf*)d_lse + i);
      target_means[i].store((vf*)target_delta + i, (vf*)target_d_lse + i);
    }
  }

  for_each_future_block(a, tile, rows, PANEL, &grads, with_target, block_scratch,
                        [&](Keys kind, const Block& block) {
    const QuerySide& side = sides[kind];
    int64_t first[TILE_ROWS], last[TILE_ROWS];
    for (int64_t p = 0; p < panels; ++p) {
      const Span span(block, p);
      const int64_t n = span.last - span.first, skip = span.first - block.begin;
      first[p] = n > 0 ? skip : 0, last[p] = n > 0 ? skip + n : 0;
      float* weights = p_all + p * BLOCK_KEYS * PANEL;
      float* ds = ds_all + p * BLOCK_KEYS * PANEL;
      if (n < block.n) {  // keys that this panel does not see add nothing
        clear_outside<NV>(weights, block.n, first[p], last[p]);
        clear_outside<NV>(ds, block.n, first[p], last[p]);
      }
      if (n <= 0) continue;
      weights += skip * PANEL, ds += skip * PANEL;
      score(block, side, p, span, weights, ds);
      const bool also_target = with_target && kind == PAST;
      for (int v = 0; v < NV; ++v) {
        const int64_t at = p * NV + v;
        const vf high = ((const vf*)side.lse_high)[at], low = ((const vf*)side.lse_low)[at];
        const vf mean = ((const vf*)side.mean)[at], extra = ((const vf*)side.d_lse)[at];
        const vf t_high = ((const vf*)target_high)[at], t_low = ((const vf*)target_low)[at];
        const vf t_mean = ((const vf*)target_delta)[at];
        vf* w = (vf*)weights + v;
        vf* d = (vf*)ds + v;
        const vf lows[2] = {low, also_target ? t_low : low};
        with_large_lanes<2>(lows, [&](auto some_large) {
          if (also_target)  // the past enters the target through its log-sum-exp
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
    add_rows<NV>(p_all, side.g_rows, runs.panels, block.d_value, ldv, block.n, panels, first, last);
    add_rows<NV>(ds_all, side.q_rows, runs.panels, block.d_key, ldk, block.n, panels, first, last);
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

static int64_t future_backward_scratch(const FutureArgs& a) {
  const int64_t wide = round_up(a.D, VL) + round_up(a.Dv, VL);
  return (8 * TILE_ROWS + BLOCK_KEYS) * wide + 2 * TILE_ROWS * BLOCK_KEYS + 8 * TILE_ROWS + 512;
}

static void future_backward(const FutureArgs& a, const Tile& tile, const FutureGrads& grads,
                            float* scratch) {
  future_backward_tile<2>(a, tile, grads, scratch);
}
