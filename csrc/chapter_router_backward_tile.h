// The backward of the router of chapters: logits are computed again, block by block.
//
// Included once per instruction set after chapter_router_tile.h.

// The gradient of the logits, over the temperature, of one panel; `z` has the logits before.
// chosen: [lanes][top_k]
template <int NV>
static void logit_gradients(const RouterArgs& a, const RouterTile& tile, int64_t p, float* z,
                            float* chosen) {
  constexpr int PANEL = NV * VL;
  const int64_t slots = a.num_shared + a.top_k;
  vf high[NV] = {}, low[NV] = {}, sum[NV] = {};
  vi kept[NV] = {};
  for (int i = 0; i < PANEL; ++i) {
    const int64_t at = p * PANEL + i, row = tile.first + at;
    const bool is_valid = at < tile.n && a.valid[row];
    kept[i / VL][i % VL] = is_valid ? -1 : 0;
    high[i / VL][i % VL] = is_valid ? a.lse_high[row] : 0.0f;
    low[i / VL][i % VL] = is_valid ? a.lse_low[row] : 0.0f;
  }
  for (int64_t c = 0; c < a.C; c += PROBABILITY_RUN) {
    vf part[NV] = {};
    for (int64_t i = c; i < a.C && i < c + PROBABILITY_RUN; ++i)
      for (int v = 0; v < NV; ++v) {
        vf& at = ((vf*)z)[i * NV + v];
        at = select(kept[v], exp_nonpositive((at - high[v]) - low[v]), vf{});
        part[v] = fma(at, a.gamma[i], part[v]);
      }
    for (int v = 0; v < NV; ++v) sum[v] += part[v];
  }
  // what the selected add, before the probabilities are overwritten
  for (int64_t i = 0; i < PANEL && p * PANEL + i < tile.n && a.d_weights; ++i) {
    const int64_t row = tile.first + p * PANEL + i;
    if (!a.valid[row]) continue;
    const int32_t* indices = a.indices + row * slots + a.num_shared;
    const float* d_weights = a.d_weights + row * slots + a.num_shared;
    double all = 0.0, mean = 0.0;
    for (int64_t j = 0; j < a.top_k; ++j) {
      const double weight = z[(indices[j] - a.num_shared) * PANEL + i];
      all += weight, mean += weight * d_weights[j];
    }
    mean /= all;
    const double factor = a.routed_scale * (double)a.factor / all;
    for (int64_t j = 0; j < a.top_k; ++j)
      chosen[i * a.top_k + j] = (float)(factor * z[(indices[j] - a.num_shared) * PANEL + i] *
                                        (d_weights[j] - mean));
  }
  vf shift[NV];
  for (int v = 0; v < NV; ++v) shift[v] = high[v] * a.z_factor - sum[v];
  for (int64_t c = 0; c < a.C; ++c)
    for (int v = 0; v < NV; ++v) {
      vf& at = ((vf*)z)[c * NV + v];
      at = at * (shift[v] + a.gamma[c]) * a.factor;
    }
  for (int64_t i = 0; i < PANEL && p * PANEL + i < tile.n && a.d_weights; ++i) {
    const int64_t row = tile.first + p * PANEL + i;
    if (!a.valid[row]) continue;
    const int32_t* indices = a.indices + row * slots + a.num_shared;
    for (int64_t j = 0; j < a.top_k; ++j)
      z[(indices[j] - a.num_shared) * PANEL + i] += chosen[i * a.top_k + j];
  }
}

// Gradients of the logits and of the hidden states of tile `i` of a block.
template <int NV>
static void router_backward_tile(const RouterArgs& a, const RouterTile& tile,
                                 const RouterBlock& block, int64_t i, float* scratch) {
  constexpr int64_t PANEL = NV * VL, WIDTH = 2 * VL;
  float* rows = scratch;
  float* x = rows + TILE_ROWS * tile.ld;
  float* d_x = x + TILE_ROWS * round_up(a.E, VL);
  float* chosen = d_x + TILE_ROWS * round_up(a.E, VL);
  float* z = block.gradients + i * TILE_ROWS * a.C;
  load_rows(a, tile, rows, x);
  // the rows as the gradient of the weights reads them: panels of their elements
  float* kept = block.rows + i * TILE_ROWS * tile.ld;
  for (int64_t d = 0; d < tile.ld; d += WIDTH)
    for (int64_t r = 0; r < PANEL * tile.panels; ++r, kept += WIDTH)
      __builtin_memcpy(kept, rows + r * tile.ld + d, WIDTH * sizeof(float));
  walk_chapters(a, tile, [&](int64_t p, int64_t c, int64_t n) {
    router_logits<NV>(a, c, n, x + p * a.E * PANEL, z + (p * a.C + c) * PANEL);
  });
  for (int64_t p = 0; p < tile.panels; ++p)
    logit_gradients<NV>(a, tile, p, z + p * a.C * PANEL, chosen);
  for (int64_t j = 0; j < tile.panels * PANEL * a.E; ++j) d_x[j] = 0.0f;
  walk_chapters(a, tile, [&](int64_t p, int64_t c, int64_t n) {
    add_weighted<NV>(a.E, n, ROUTER_BLOCK, a.weight + c * a.weight_stride, a.weight_stride,
                     z + (p * a.C + c) * PANEL, PANEL, d_x + p * a.E * PANEL, PANEL, nullptr);
  });
  from_panels(d_x, PANEL, PANEL * tile.panels, a.E, tile.ld, rows);
  for (int64_t r = 0; r < tile.n; ++r) {
    const int64_t b = (tile.first + r) / a.N, t = (tile.first + r) % a.N;
    store_row(a.d_hidden, b * a.d_hidden.stride[0] + t * a.d_hidden.stride[1],
              a.d_hidden.stride[2], a.E, rows + r * tile.ld);
  }
}

static void router_backward_rows(const RouterArgs& a, const RouterBlock& block, int64_t i,
                                 float* scratch) {
  const RouterTile tile(a, block.first + i * TILE_ROWS);
  if (tile.panel == VL) router_backward_tile<1>(a, tile, block, i, scratch);
  else router_backward_tile<2>(a, tile, block, i, scratch);
}

// Adds what the tiles of a block give the weights and biases of chapters [c, c + n).
static void router_backward_chapters(const RouterArgs& a, const RouterBlock& block, int64_t c,
                                     int64_t n) {
  constexpr int64_t WIDTH = 2 * VL;
  for (int64_t i = 0; i < block.tiles; ++i) {
    const RouterTile tile(a, block.first + i * TILE_ROWS);
    const float* z = block.gradients + i * TILE_ROWS * a.C + c * tile.panel;
    const float* rows = block.rows + i * TILE_ROWS * tile.ld;
    for (int64_t d = 0; d < tile.ld; d += WIDTH) {
      product<2, Store::add, true>(n, tile.panels, tile.panel, z, tile.panel, a.C * tile.panel,
                                   rows, WIDTH, tile.panel * WIDTH,
                                   block.d_weight + c * tile.ld + d, tile.ld, nullptr);
      rows += tile.panels * tile.panel * WIDTH;
    }
    for (int64_t j = 0; j < n; ++j) {
      vf sum{};
      for (int64_t p = 0; p < tile.panels; ++p)
        for (int64_t v = 0; v < tile.panel / VL; ++v)
          sum += ((const vf*)(z + (p * a.C + j) * tile.panel))[v];
      for (int v = 0; v < VL; ++v) block.d_bias[c + j] += sum[v];
    }
  }
}
