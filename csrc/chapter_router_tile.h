// The router of chapters: rows are lanes, and a tile of rows has the logits of all chapters in
// scratch. A logit is one sum over E in a fixed order, whatever the tile, the lane or the chapter.
//
// Included once per instruction set after attention_tile.h.

constexpr int64_t ROUTER_BLOCK = 96;   // chapters of a block; a multiple of the micro-tile rows
constexpr int64_t LOGIT_RUN = 128;    // terms of a logit summed in one go
constexpr int64_t PROBABILITY_RUN = 32;  // probabilities summed in one go
constexpr uint32_t ORDERED_INFINITY = 0x007fffff;  // ordered() of minus infinity

// Bit i for lane i where a >= b.
static MEMATTN_INLINE uint32_t lanes_at_least(vf a, vf b) {
#if defined(MEMATTN_AT_LEAST)
  return MEMATTN_AT_LEAST(a, b);
#else
  const vi at_least = a >= b;
  uint32_t mask = 0;
  for (int i = 0; i < VL; ++i) mask |= (uint32_t)(at_least[i] & 1) << i;
  return mask;
#endif
}

// Unsigned integers in the order of floats, where -0 is 0.
static MEMATTN_INLINE uint32_t ordered(float x) {
  x += 0.0f;
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// A larger logit first, then a lower chapter: keys are all different.
static MEMATTN_INLINE uint64_t key_of(float logit, int64_t chapter) {
  return (uint64_t)ordered(logit) << 32 | (uint32_t)~(uint32_t)chapter;
}
static MEMATTN_INLINE int64_t chapter_of(uint64_t key) { return (uint32_t)~(uint32_t)key; }

// The first `keep` of n different keys, the largest first.
static void sort_keys(const uint64_t* keys, int64_t n, int64_t keep, uint64_t* sorted) {
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t key = keys[i];
    int64_t rank = 0;
    for (int64_t j = 0; j < n; ++j) rank += keys[j] > key;
    if (rank < keep) sorted[rank] = key;
  }
}

// e^d for d <= 0.
static MEMATTN_INLINE vf exp_nonpositive(vf d) {
  constexpr float LOG2E_HIGH = 0x1.715476p+0f, LOG2E_LOW = 0x1.4ae0cp-26f;
  return exp2_nonpositive(d * LOG2E_HIGH,
                          [&](vf n) { return fma(d, LOG2E_HIGH, -n) + d * LOG2E_LOW; });
}

// How a tile's scratch is laid out. Panels are [E or C][lanes of a panel], one behind the other.
struct RouterTile {
  int64_t first, n;       // rows
  int64_t panel, panels;  // lanes of a panel
  int64_t ld;             // floats between two rows
  RouterTile(const RouterArgs& a, int64_t first)
      : first(first), n(a.rows - first < TILE_ROWS ? a.rows - first : TILE_ROWS),
        panel(n <= VL ? VL : 2 * VL), panels((n + panel - 1) / panel), ld(round_up(a.E, 2 * VL)) {}
};

// to[i] += the sum of row i of n rows of lanes.
template <class Sum>
static void add_lane_sums(const vf* lanes, int64_t n, Sum* to) {
  for (int64_t i = 0; i < n; i += VL) {
    vf rows[VL];
    for (int64_t j = 0; j < VL; ++j) rows[j] = i + j < n ? lanes[i + j] : vf{};
    transpose(rows);
#pragma GCC unroll 16
    for (int width = VL / 2; width; width /= 2)
      for (int j = 0; j < width; ++j) rows[j] += rows[j + width];
    for (int64_t j = 0; j < VL && i + j < n; ++j) to[i + j] += rows[0][j];
  }
}

static int64_t router_run(const RouterArgs& a) {
  const int64_t run = a.C / (2 * a.top_k);
  return run < 1 ? 1 : run;
}
static int64_t router_capacity(const RouterArgs& a) { return 4 * a.top_k + 32; }

static int64_t router_inputs_floats(const RouterArgs& a) {
  return TILE_ROWS * round_up(a.E, 2 * VL) + TILE_ROWS * round_up(a.E, VL);
}

static inline int64_t router_forward_scratch(const RouterArgs& a) {
  const int64_t keys = (2 * VL + 1) * router_capacity(a);
  return router_inputs_floats(a) + (TILE_ROWS + VL) * a.C + TILE_ROWS * a.top_k + 2 * keys;
}

// Where row i of a tile lies in `hidden`, -1 for one that is not valid.
static MEMATTN_INLINE int64_t hidden_at(const RouterArgs& a, const RouterTile& tile, int64_t i) {
  const int64_t row = tile.first + i;
  if (i >= tile.n || !a.valid[row]) return -1;
  return row / a.N * a.hidden.stride[0] + row % a.N * a.hidden.stride[1];
}

// The rows of a tile as float32, 0 for those that are not valid.
static void load_rows(const RouterArgs& a, const RouterTile& tile, float* rows) {
  for (int64_t i = 0; i < tile.panel * tile.panels; ++i) {
    float* to = rows + i * tile.ld;
    const int64_t offset = hidden_at(a, tile, i), filled = offset < 0 ? 0 : a.E;
    if (filled) load_row(a.hidden, offset, a.hidden.stride[2], a.E, to);
    for (int64_t d = filled; d < tile.ld; ++d) to[d] = 0.0f;
  }
}

// Logits in products of floats; RouterPairs has the same for bfloat16.
struct RouterFloats {
  static int64_t units(const RouterArgs& a) { return a.E; }
  // the rows of a tile in panels of units; with their floats, or a place for [TILE_ROWS][units rounded up]
  static void panels(const RouterArgs& a, const RouterTile& tile, float* rows, float* to) {
    load_rows(a, tile, rows);
    to_panels(rows, tile.ld, tile.panel * tile.panels, a.E, tile.panel, to);
  }
  template <int NV>
  static void products(const RouterArgs& a, int64_t c, int64_t n, const float* x, float* z) {
    dot_products<NV>(n, a.E, LOGIT_RUN, a.weight + c * a.weight_stride, a.weight_stride, x, NV * VL, z,
                     NV * VL);
  }
};

// Logits of chapters [c, c + n) for one panel.
template <class How, int NV>
static void router_logits(const RouterArgs& a, int64_t c, int64_t n, const float* x, float* z) {
  constexpr int PANEL = NV * VL;
  How::template products<NV>(a, c, n, x, z);
  if (!a.bias && a.factor == 1.0f) return;
  for (int64_t i = 0; i < n; ++i)
    for (int v = 0; v < NV; ++v) {
      vf& at = ((vf*)(z + i * PANEL))[v];
      at = (at + (a.bias ? a.bias[c + i] : 0.0f)) * a.factor;
    }
}

// Calls visit(panel, c, n) for blocks of chapters; the panels of a tile share a block's weights.
template <class Visit>
static MEMATTN_INLINE void walk_chapters(const RouterArgs& a, const RouterTile& tile, Visit visit) {
  for (int64_t c = 0; c < a.C; c += ROUTER_BLOCK)
    for (int64_t p = 0; p < tile.panels; ++p)
      visit(p, c, a.C - c < ROUTER_BLOCK ? a.C - c : ROUTER_BLOCK);
}

// The top_k largest of the maxima of runs of chapters of one panel, the largest first: at least
// top_k logits of a lane are as large as the last of them. NaN is passed over.
template <int NV>
struct LargestOfRuns {
  vf* largest;  // [top_k][NV]
  vf maximum[NV];
  int64_t K, run, left;  // left: chapters until the run ends

  LargestOfRuns() = default;
  LargestOfRuns(const RouterArgs& a, vf* largest)
      : largest(largest), K(a.top_k), run(router_run(a)), left(run) {
    for (int64_t j = 0; j < K * NV; ++j) largest[j] = broadcast(-__builtin_inff());
    for (int v = 0; v < NV; ++v) maximum[v] = broadcast(-__builtin_inff());
  }

  void take(const float* z, int64_t n) {
    for (int64_t i = 0; i < n;) {
      const int64_t end = n - i < left ? n : i + left;
      left -= end - i;
      vf top[NV];
      for (int v = 0; v < NV; ++v) top[v] = maximum[v];
      for (; i < end; ++i)
        for (int v = 0; v < NV; ++v) top[v] = greater(((const vf*)z)[i * NV + v], top[v]);
      for (int v = 0; v < NV; ++v) maximum[v] = top[v];
      if (left == 0) end_run();
    }
  }

  void end_run() {
    for (int64_t j = 0; j < K; ++j)
      for (int v = 0; v < NV; ++v) {
        const vf before = largest[j * NV + v], x = maximum[v];
        const vi rises = x > before;
        largest[j * NV + v] = select(rises, x, before);
        maximum[v] = select(rises, before, x);
      }
    for (int v = 0; v < NV; ++v) maximum[v] = broadcast(-__builtin_inff());
    left = run;
  }
};

// The candidates of the lanes of a panel for the top_k, and what a lane must reach to be one.
struct Candidates {
  uint64_t *keys, *sorted;  // [lanes][capacity], [capacity]
  int64_t capacity;
  float least[2 * VL] __attribute__((aligned(64)));
  int64_t n[2 * VL];

  void add(int64_t lane, uint64_t key, int64_t K) {
    uint64_t* own = keys + lane * capacity;
    own[n[lane]++] = key;
    if (n[lane] < capacity) return;
    sort_keys(own, n[lane], K, sorted);
    __builtin_memcpy(own, sorted, K * sizeof(uint64_t));
    n[lane] = K;
    // what comes later must be larger
    const uint32_t next = (uint32_t)(own[K - 1] >> 32) + 1;
    const uint32_t bits = next >> 31 ? next ^ 0x80000000u : ~next;
    __builtin_memcpy(&least[lane], &bits, 4);
  }

  // The keys of the top_k in order. NaN counts as minus infinity.
  const uint64_t* choose(int64_t lane, int64_t K, const float* z, int64_t panel, int64_t C) {
    const uint64_t* own = keys + lane * capacity;
    if (n[lane] >= K) {
      sort_keys(own, n[lane], K, sorted);
      if (sorted[K - 1] >> 32 > ORDERED_INFINITY) return sorted;
    }
    n[lane] = 0, least[lane] = -__builtin_inff();
    for (int64_t c = 0; c < C; ++c) {
      const float x = z[c * panel + lane], logit = x == x ? x : -__builtin_inff();
      if (logit >= least[lane]) add(lane, key_of(logit, c), K);
    }
    sort_keys(own, n[lane], K, sorted);
    return sorted;
  }
};

// What one panel of rows adds to results and sums. Its logits become e^(logit - maximum), and
// `inverse` what makes them probabilities, 0 for rows that do not count.
template <int NV>
static void router_panel(const RouterArgs& a, const RouterTile& tile, int64_t p, float* z,
                         const vf* largest, vf* inverse, Candidates& candidates,
                         RouterSums& sums) {
  constexpr int PANEL = NV * VL;
  const int64_t K = a.top_k, slots = a.num_shared + K;
  vf least[NV], maximum[NV];
  for (int v = 0; v < NV; ++v) {
    maximum[v] = largest[v], least[v] = largest[(K - 1) * NV + v];
    ((vf*)candidates.least)[v] = least[v];
  }
  for (int i = 0; i < PANEL; ++i) candidates.n[i] = 0;
  for (int64_t c = 0; c < a.C; ++c)
    for (int v = 0; v < NV; ++v) {
      uint32_t found = lanes_at_least(((const vf*)z)[c * NV + v], least[v]);
      if (!found) continue;
      for (; found; found &= found - 1) {
        const int64_t lane = v * VL + __builtin_ctz(found);
        candidates.add(lane, key_of(z[c * PANEL + lane], c), K);
      }
      least[v] = ((const vf*)candidates.least)[v];
    }
  // before the logits are overwritten
  int64_t chosen_at[PANEL];
  for (int64_t i = 0; i < PANEL; ++i) {
    const int64_t row = tile.first + p * PANEL + i;
    chosen_at[i] = -1;
    if (p * PANEL + i >= tile.n) continue;
    int32_t* indices = a.indices + row * slots;
    if (!a.valid[row]) {
      for (int64_t j = 0; j < slots; ++j) indices[j] = -1, a.weights[row * slots + j] = 0.0f;
      a.lse_high[row] = a.lse_low[row] = 0.0f;
      continue;
    }
    chosen_at[i] = row;
    const uint64_t* chosen = candidates.choose(i, K, z, PANEL, a.C);
    for (int64_t j = 0; j < a.num_shared; ++j) indices[j] = (int32_t)j;
    for (int64_t j = 0; j < K; ++j) {
      const int64_t c = chapter_of(chosen[j]);
      indices[a.num_shared + j] = (int32_t)(c + a.num_shared);
      ++sums.chosen[c];
    }
  }

  vf sum[NV] = {}, weighted[NV] = {};
  for (int64_t c = 0; c < a.C; c += PROBABILITY_RUN) {
    vf part[NV] = {}, weighted_part[NV] = {};
    for (int64_t i = c; i < a.C && i < c + PROBABILITY_RUN; ++i)
      for (int v = 0; v < NV; ++v) {
        vf& at = ((vf*)z)[i * NV + v];
        const vf d = at - maximum[v];
        at = exp_nonpositive(d);
        part[v] += at;
        // finite, so that what has no probability has no part in the entropy
        weighted_part[v] = fma(at, greater(broadcast(-200.0f), d), weighted_part[v]);
      }
    for (int v = 0; v < NV; ++v) sum[v] += part[v], weighted[v] += weighted_part[v];
  }

  for (int v = 0; v < NV; ++v) inverse[v] = vf{};
  for (int64_t i = 0; i < PANEL; ++i) {
    const int64_t row = chosen_at[i];
    if (row < 0) continue;
    const double total = sum[i / VL][i % VL], log_total = __builtin_log(total);
    const double lse = (double)maximum[i / VL][i % VL] + log_total;
    a.lse_high[row] = (float)lse, a.lse_low[row] = (float)(lse - (float)lse);
    sums.z_square += lse * lse;
    sums.entropy += log_total - weighted[i / VL][i % VL] / total;
    ++sums.count;
    inverse[i / VL][i % VL] = (float)(1.0 / total);
    const int32_t* indices = a.indices + row * slots + a.num_shared;
    float* weights = a.weights + row * slots;
    for (int64_t j = 0; j < a.num_shared; ++j) weights[j] = 1.0f;
    weights += a.num_shared;
    double all = 0.0;
    for (int64_t j = 0; j < K; ++j) {
      weights[j] = z[(indices[j] - a.num_shared) * PANEL + i];
      all += weights[j];
    }
    const double factor = a.routed_scale / all;
    for (int64_t j = 0; j < K; ++j) weights[j] = (float)(weights[j] * factor);
  }
}

template <class How, int NV>
static void router_forward_tile(const RouterArgs& a, const RouterTile& tile, vf* probability,
                                RouterSums& sums, float* scratch) {
  float* rows = scratch;
  float* x = rows + TILE_ROWS * tile.ld;
  float* z = x + TILE_ROWS * round_up(a.E, VL);
  vf* largest = (vf*)(z + TILE_ROWS * a.C);
  Candidates candidates;
  candidates.capacity = router_capacity(a);
  candidates.keys = (uint64_t*)((float*)largest + TILE_ROWS * a.top_k);
  candidates.sorted = candidates.keys + 2 * VL * candidates.capacity;
  How::panels(a, tile, rows, x);
  constexpr int64_t PANEL = NV * VL;
  LargestOfRuns<NV> runs[TILE_ROWS / PANEL];
  vf inverse[TILE_ROWS / PANEL][NV];
  for (int64_t p = 0; p < tile.panels; ++p) runs[p] = {a, largest + p * a.top_k * NV};
  walk_chapters(a, tile, [&](int64_t p, int64_t c, int64_t n) {
    float* at = z + (p * a.C + c) * PANEL;
    router_logits<How, NV>(a, c, n, x + p * How::units(a) * PANEL, at);
    runs[p].take(at, n);
  });
  for (int64_t p = 0; p < tile.panels; ++p) {
    if (runs[p].left < runs[p].run) runs[p].end_run();
    router_panel<NV>(a, tile, p, z + p * a.C * PANEL, runs[p].largest, inverse[p], candidates,
                     sums);
  }
  for (int64_t c = 0; c < a.C; ++c) {
    vf added{};
    for (int64_t p = 0; p < tile.panels; ++p)
      for (int v = 0; v < NV; ++v)
        added = fma(((const vf*)z)[(p * a.C + c) * NV + v], inverse[p][v], added);
    probability[c] += added;
  }
}

// The rows of a chunk, tile by tile.
template <class How>
static void router_forward(const RouterArgs& a, int64_t begin, int64_t end, RouterSums& sums,
                           float* scratch) {
  vf* probability = (vf*)scratch;  // [C], summed over the rows of a lane
  scratch += a.C * VL;
  for (int64_t c = 0; c < a.C; ++c) probability[c] = vf{}, sums.probability[c] = 0.0f;
  for (int64_t row = begin; row < end; row += TILE_ROWS) {
    const RouterTile tile(a, row);
    if (tile.panel == VL) router_forward_tile<How, 1>(a, tile, probability, sums, scratch);
    else router_forward_tile<How, 2>(a, tile, probability, sums, scratch);
  }
  add_lane_sums(probability, a.C, sums.probability);
}
