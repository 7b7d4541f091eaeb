// The backward of the router of chapters: logits are computed again, block by block.
//
// Included once per instruction set after chapter_router_tile.h.

constexpr int64_t GRADIENT_RUN = 128;  // rows of a gradient of the weights summed in one go

// What lanes of one panel know of their rows, and the sums of their probabilities times gamma.
template <int NV>
struct RouterLanes {
  vf high[NV] = {}, low[NV] = {}, sum[NV] = {};  // log-sum-exp as a sum of two floats
  vi kept[NV] = {};                              // a valid row

  void load(const RouterArgs& a, const RouterTile& tile, int64_t p) {
    for (int64_t i = 0; i < NV * VL; ++i) {
      const int64_t at = p * NV * VL + i, row = tile.first + at;
      const bool is_valid = at < tile.n && a.valid[row];
      kept[i / VL][i % VL] = is_valid ? -1 : 0;
      high[i / VL][i % VL] = is_valid ? a.lse_high[row] : 0.0f;
      low[i / VL][i % VL] = is_valid ? a.lse_low[row] : 0.0f;
    }
  }

  // The logits of chapters [c, c + n) become probabilities.
  void probabilities(const RouterArgs& a, int64_t c, int64_t n, float* z) {
    const RouterLanes own = *this;  // what is written to z cannot be this
    const float* gamma = a.gamma + c;
    for (int64_t begin = 0; begin < n; begin += PROBABILITY_RUN) {
      vf part[NV] = {};
      for (int64_t i = begin; i < n && i < begin + PROBABILITY_RUN; ++i)
        for (int v = 0; v < NV; ++v) {
          vf& at = ((vf*)z)[i * NV + v];
          at = select(own.kept[v], exp_nonpositive((at - own.high[v]) - own.low[v]), vf{});
          part[v] = fma(at, gamma[i], part[v]);
        }
      for (int v = 0; v < NV; ++v) sum[v] += part[v];
    }
  }

  // And these the gradients of the logits over the temperature, but for what weights add.
  void gradients(const RouterArgs& a, int64_t c, int64_t n, float* z) const {
    const float *gamma = a.gamma + c, factor = a.factor;
    vf shift[NV];
    for (int v = 0; v < NV; ++v) shift[v] = high[v] * a.z_factor - sum[v];
    for (int64_t i = 0; i < n; ++i)
      for (int v = 0; v < NV; ++v) {
        vf& at = ((vf*)z)[i * NV + v];
        at = at * (shift[v] + gamma[i]) * factor;
      }
  }
};

// What the weights of the selected add to the gradients of the logits, in lists by blocks of
// chapters.
struct RouterAdded {
  int32_t *first, *next;  // [panels][blocks], [entries]: an entry, or -1
  int32_t* at;            // [entries], where in the logits of a panel
  float* value;
  int64_t blocks, n = 0;

  static int64_t floats(const RouterArgs& a) {
    return TILE_ROWS / VL * block_count(a) + 3 * TILE_ROWS * a.top_k;
  }
  static int64_t block_count(const RouterArgs& a) {
    return (a.C + ROUTER_BLOCK - 1) / ROUTER_BLOCK;
  }

  RouterAdded(const RouterArgs& a, const RouterTile& tile, float* scratch)
      : blocks(block_count(a)) {
    first = (int32_t*)scratch, next = first + TILE_ROWS / VL * blocks;
    at = next + TILE_ROWS * a.top_k, value = (float*)(at + TILE_ROWS * a.top_k);
    for (int64_t i = 0; i < tile.panels * blocks; ++i) first[i] = -1;
  }

  // z: the probabilities of panel p
  void take(const RouterArgs& a, const RouterTile& tile, int64_t p, const float* z) {
    const int64_t slots = a.num_shared + a.top_k;
    for (int64_t i = 0; i < tile.panel && p * tile.panel + i < tile.n; ++i) {
      const int64_t row = tile.first + p * tile.panel + i;
      if (!a.valid[row]) continue;
      const int32_t* indices = a.indices + row * slots + a.num_shared;
      const float* d_weights = a.d_weights + row * slots + a.num_shared;
      const float* of_row = z - a.num_shared * tile.panel + i;
      double all = 0.0, mean = 0.0;
      for (int64_t j = 0; j < a.top_k; ++j) {
        const double weight = of_row[indices[j] * tile.panel];
        all += weight, mean += weight * d_weights[j];
      }
      mean /= all;
      const double factor = a.routed_scale * (double)a.factor / all;
      for (int64_t j = 0; j < a.top_k; ++j, ++n) {
        const int64_t c = indices[j] - a.num_shared;
        int32_t& list = first[p * blocks + c / ROUTER_BLOCK];
        next[n] = list, list = (int32_t)n;
        at[n] = (int32_t)(c * tile.panel + i);
        value[n] = (float)(factor * z[at[n]] * (d_weights[j] - mean));
      }
    }
  }

  void add(int64_t p, int64_t c, float* z) const {
    const int32_t list = first[p * blocks + c / ROUTER_BLOCK];
    for (int32_t i = list; i >= 0; i = next[i]) z[at[i]] += value[i];
  }
};

static inline int64_t router_backward_scratch(const RouterArgs& a) {
  return router_inputs_floats(a) + TILE_ROWS * round_up(a.E, VL) + RouterAdded::floats(a);
}

// Gradients of the logits and of the hidden states of tile `i` of a block.
template <class How, int NV>
static void router_backward_tile(const RouterArgs& a, const RouterTile& tile,
                                 const RouterBlock& block, int64_t i, float* scratch) {
  constexpr int64_t PANEL = NV * VL, WIDTH = 2 * VL;
  float* rows = scratch;
  float* x = rows + TILE_ROWS * tile.ld;
  float* d_x = x + TILE_ROWS * round_up(a.E, VL);
  RouterAdded added(a, tile, d_x + TILE_ROWS * round_up(a.E, VL));
  float* z = block.gradients + i * TILE_ROWS * a.C;
  How::panels(a, tile, rows, x);
  if (How::units(a) != a.E) load_rows(a, tile, rows);  // else these are there
  // the rows as the gradient of the weights reads them: panels of their elements
  float* kept = block.rows + i * TILE_ROWS * tile.ld;
  for (int64_t p = 0; p < tile.panels; ++p)
    for (int64_t d = 0; d < tile.ld; d += WIDTH)
      for (int64_t r = 0; r < PANEL; ++r, kept += WIDTH)
        __builtin_memcpy(kept, rows + (p * PANEL + r) * tile.ld + d, WIDTH * sizeof(float));

  RouterLanes<NV> lanes[TILE_ROWS / PANEL];
  for (int64_t p = 0; p < tile.panels; ++p) lanes[p].load(a, tile, p);
  walk_chapters(a, tile, [&](int64_t p, int64_t c, int64_t n) {
    float* at = z + (p * a.C + c) * PANEL;
    router_logits<How, NV>(a, c, n, x + p * How::units(a) * PANEL, at);
    lanes[p].probabilities(a, c, n, at);
  });
  if (a.d_weights)
    for (int64_t p = 0; p < tile.panels; ++p) added.take(a, tile, p, z + p * a.C * PANEL);
  for (int64_t j = 0; j < tile.panels * PANEL * a.E; ++j) d_x[j] = 0.0f;
  walk_chapters(a, tile, [&](int64_t p, int64_t c, int64_t n) {
    float* at = z + (p * a.C + c) * PANEL;
    lanes[p].gradients(a, c, n, at);
    added.add(p, c, z + p * a.C * PANEL);
    add_weighted<NV>(a.E, n, ROUTER_BLOCK, a.weight + c * a.weight_stride, a.weight_stride, at,
                     PANEL, d_x + p * a.E * PANEL, PANEL, nullptr);
  });
  from_panels(d_x, PANEL, PANEL * tile.panels, a.E, tile.ld, rows);
  for (int64_t r = 0; r < tile.n; ++r) {
    const int64_t b = (tile.first + r) / a.N, t = (tile.first + r) % a.N;
    store_row(a.d_hidden, b * a.d_hidden.stride[0] + t * a.d_hidden.stride[1],
              a.d_hidden.stride[2], a.E, rows + r * tile.ld);
  }
}

template <class How>
static void router_backward_rows(const RouterArgs& a, const RouterBlock& block, int64_t i,
                                 float* scratch) {
  const RouterTile tile(a, block.first + i * TILE_ROWS);
  if (tile.panel == VL) router_backward_tile<How, 1>(a, tile, block, i, scratch);
  else router_backward_tile<How, 2>(a, tile, block, i, scratch);
}

// Adds what `panels` panels of a block from `z` and `rows` on give the weights and biases of
// chapters [c, c + n).
template <int NV>
static void add_router_weights(const RouterArgs& a, const RouterBlock& block, int64_t c, int64_t n,
                               int64_t panels, const float* z, const float* rows) {
  constexpr int64_t PANEL = NV * VL, WIDTH = 2 * VL;
  const int64_t ld = round_up(a.E, WIDTH), step = a.C * PANEL;
  // some chapters at a time; sums, and the gradients of the next chapters, are fetched beforehand
  constexpr int64_t GROUP = micro_rows<2>(), LINE = 16;
  z += c * PANEL;
  for (int64_t j = 0; j < n; j += GROUP) {
    const int64_t here = n - j < GROUP ? n - j : GROUP, next = n - j - here;
    const int64_t ahead = (next < GROUP ? next : GROUP) * PANEL;
    int64_t fetched = 0;
    for (int64_t d = 0; d < ld; d += WIDTH) {
      float* to = block.d_weight + (c + j) * ld + d;
      for (int64_t i = 0; i < here; ++i)
        for (int64_t k = 0; k < WIDTH; k += LINE) __builtin_prefetch(to + i * ld + k, 1);
      for (; fetched < panels * (d + WIDTH) / ld; ++fetched)
        for (int64_t k = 0; k < ahead; k += LINE)
          __builtin_prefetch(z + fetched * step + (j + here) * PANEL + k);
      product<2, Store::add, true>(here, panels, PANEL, z + j * PANEL, PANEL, step,
                                   rows + d * PANEL, WIDTH, PANEL * ld, to, ld, nullptr);
    }
  }
  for (int64_t j = 0; j < n; j += VL) {
    const int64_t here = n - j < VL ? n - j : VL;
    vf sums[VL];
    for (int64_t k = 0; k < here; ++k) {
      sums[k] = vf{};
      for (int64_t p = 0; p < panels; ++p)
        for (int v = 0; v < NV; ++v) sums[k] += ((const vf*)(z + p * step + (j + k) * PANEL))[v];
    }
    add_lane_sums(sums, here, block.d_bias + c + j);
  }
}

// Adds what the tiles of a block give the weights and biases of chapters [c, c + n). Runs of rows
// are counted from the first row of all, so that sums do not depend on blocks.
static inline void router_backward_chapters(const RouterArgs& a, const RouterBlock& block, int64_t c,
                                     int64_t n) {
  const int64_t ld = round_up(a.E, 2 * VL), last = block.first + block.tiles * TILE_ROWS;
  const int64_t end = last < a.rows ? last : a.rows;
  for (int64_t first = block.first; first < end; first += GRADIENT_RUN) {
    const int64_t run = end - first < GRADIENT_RUN ? end - first : GRADIENT_RUN;
    // the rows of a last tile with thin panels
    const int64_t thin = run % TILE_ROWS <= VL ? run % TILE_ROWS : 0, wide = run - thin;
    const float* z = block.gradients + (first - block.first) * a.C;
    const float* rows = block.rows + (first - block.first) * ld;
    if (wide > 0) add_router_weights<2>(a, block, c, n, (wide + 2 * VL - 1) / (2 * VL), z, rows);
    if (thin > 0) add_router_weights<1>(a, block, c, n, 1, z + wide * a.C, rows + wide * ld);
  }
}
