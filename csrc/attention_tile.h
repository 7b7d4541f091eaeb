// What attention kernels share inside a tile: blocks of keys and their masks, the online softmax,
// and the sums of key gradients.
//
// Included once per instruction set after tile_engine.h.

constexpr int64_t TILE_ROWS = 64;    // query rows of a tile; a multiple of every panel
constexpr int64_t BLOCK_KEYS = 96;   // keys of a block; a multiple of the micro-tile rows
constexpr double LOG2E = 1.4426950408889634;
constexpr int64_t WEIGHTS_RUN = 16;  // weights summed in one go
constexpr float NO_SCORE = -3e38f;   // running maximum before the first key
constexpr float LARGE = 65536.0f;    // a maximum of this size is that of a large lane

// How many terms a tile sums in one go, by the keys that its rows see. The fewer they are, the less
// rounding errors average out, and the less time matters.
struct SumRuns {
  int64_t dims;    // of a dot product
  int64_t keys;    // of a weighted sum
  int64_t panels;  // of queries, in the gradient of a key
  bool few_keys;   // also goes through the keys twice in the backward

  static constexpr int64_t FEW = 64;
  SumRuns(int64_t n_keys, bool few_for_a_row) : few_keys(n_keys <= FEW || few_for_a_row) {
    if (few_keys) dims = 8, keys = 24, panels = 1;
    else if (n_keys <= 256) dims = 16, keys = 24, panels = 1;
    else dims = 64, keys = BLOCK_KEYS, panels = TILE_ROWS;  // all that a tile has at a time
  }
};

// Keys that one query lane may see, [lo, hi) counted in its source.
struct Interval {
  int32_t lo[TILE_ROWS], hi[TILE_ROWS];
  // bounds over each panel: of the union, and of what all lanes see
  int32_t any_lo[TILE_ROWS], any_hi[TILE_ROWS], all_lo[TILE_ROWS], all_hi[TILE_ROWS];
  int32_t min_lo, max_hi;

  void summarise(int64_t lanes, int64_t panel) {
    min_lo = INT32_MAX, max_hi = INT32_MIN;
    for (int64_t p = 0; p * panel < lanes; ++p) {
      any_lo[p] = INT32_MAX, any_hi[p] = INT32_MIN, all_lo[p] = INT32_MIN, all_hi[p] = INT32_MAX;
      for (int64_t i = p * panel; i < (p + 1) * panel; ++i) {
        if (lo[i] < hi[i]) {
          any_lo[p] = lo[i] < any_lo[p] ? lo[i] : any_lo[p];
          any_hi[p] = hi[i] > any_hi[p] ? hi[i] : any_hi[p];
        }
        all_lo[p] = lo[i] > all_lo[p] ? lo[i] : all_lo[p];
        all_hi[p] = hi[i] < all_hi[p] ? hi[i] : all_hi[p];
      }
      min_lo = any_lo[p] < min_lo ? any_lo[p] : min_lo;
      max_hi = any_hi[p] > max_hi ? any_hi[p] : max_hi;
    }
  }
};

// A block of keys, and where its gradients are summed.
struct KeyBlock {
  Rows key, value;
  int64_t begin, n;  // keys [begin, begin + n) of their source
  float *d_key, *d_value;
};

// A block of which each lane sees an interval.
struct Block : KeyBlock {
  const Interval* seen;
};

// A block of which every key tells the lanes that see it; its keys are counted from 0.
struct LaneBlock : KeyBlock {
  const uint64_t* lanes;  // [n], bit i for lane i; null where all rows see all keys
  uint64_t rows;          // the lanes that hold a row
  int64_t panel;
};

// Keys of one source, row by row, and where their gradients are summed, from row `sums_begin` on.
struct Source {
  const View &key, &value;
  int64_t key_at, value_at;  // row 0
  int64_t row_axis;
  float *d_key, *d_value;  // null without gradients
  int64_t sums_begin;
};

// Calls visit(block) for the blocks of a source that some lane sees. scratch: [BLOCK_KEYS][D + Dv].
template <class Visit>
static MEMATTN_INLINE void walk_source(const Source& s, const Interval& seen, int64_t D, int64_t Dv,
                                       float* scratch, Visit visit) {
  const int64_t key_step = s.key.stride[s.row_axis], value_step = s.value.stride[s.row_axis];
  for (int64_t j = seen.min_lo; j < seen.max_hi; j += BLOCK_KEYS) {
    const int64_t left = seen.max_hi - j;
    const int64_t n = left < BLOCK_KEYS ? left : BLOCK_KEYS;
    Block block;
    block.key = float_rows(s.key, s.key_at + j * key_step, key_step, s.key.stride[s.row_axis + 1],
                           n, D, scratch);
    block.value = float_rows(s.value, s.value_at + j * value_step, value_step,
                             s.value.stride[s.row_axis + 1], n, Dv, scratch + BLOCK_KEYS * D);
    block.begin = j, block.n = n, block.seen = &seen;
    block.d_key = s.d_key ? s.d_key + (j - s.sums_begin) * round_up(D, VL) : nullptr;
    block.d_value = s.d_value ? s.d_value + (j - s.sums_begin) * round_up(Dv, VL) : nullptr;
    visit(block);
  }
}

// Scores -inf outside the lanes' intervals; key j of the source in row j - first of `scores`. Keys
// that all lanes see are passed over.
template <int NV>
static void mask_panel(float* scores, const Interval& seen, int64_t p, int64_t first,
                       int64_t last) {
  constexpr int PANEL = NV * VL;
  vi lo[NV], hi[NV];
  for (int v = 0; v < NV; ++v) {
    __builtin_memcpy(&lo[v], seen.lo + p * PANEL + v * VL, sizeof(vi));
    __builtin_memcpy(&hi[v], seen.hi + p * PANEL + v * VL, sizeof(vi));
  }
  auto mask = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      vf* s = (vf*)(scores + (j - first) * PANEL);
      for (int v = 0; v < NV; ++v) {
        const vi key = (int32_t)j - vi{};
        s[v] = select((key >= lo[v]) & (key < hi[v]), s[v], broadcast(-__builtin_inff()));
      }
    }
  };
  auto within = [last](int64_t j, int64_t low) { return j < low ? low : j < last ? j : last; };
  const int64_t all_first = within(seen.all_lo[p], first);
  mask(first, all_first);
  mask(within(seen.all_hi[p], all_first), last);
}

// Scores -inf where a lane does not see a key.
template <int NV>
static void mask_panel(float* scores, const LaneBlock& block, int64_t p, int64_t first,
                       int64_t last) {
  constexpr int PANEL = NV * VL;
  vi bit[NV];
  for (int i = 0; i < PANEL; ++i) bit[i / VL][i % VL] = (int32_t)(uint32_t{1} << i);
  for (int64_t j = first; j < last; ++j) {
    const vi lanes = (int32_t)(uint32_t)(block.lanes[j] >> p * PANEL) - vi{};
    vf* s = (vf*)(scores + (j - first) * PANEL);
    for (int v = 0; v < NV; ++v)
      s[v] = select((lanes & bit[v]) != 0, s[v], broadcast(-__builtin_inff()));
  }
}

template <int NV>
static MEMATTN_INLINE void mask_panel(float* scores, const Block& block, int64_t p, int64_t first,
                                      int64_t last) {
  mask_panel<NV>(scores, *block.seen, p, first, last);
}

// Keys of a block that some lane of panel p sees, and whether all lanes see all of them.
struct Span {
  int64_t first, last;
  bool partial;
  Span(const LaneBlock& block, int64_t p) {
    first = 0, last = block.n, partial = false;
    if (!block.lanes) return;
    const uint64_t panel = ~uint64_t{0} >> (64 - block.panel) << p * block.panel;
    const uint64_t rows = block.rows & panel;
    while (first < last && !(block.lanes[first] & rows)) ++first;
    while (last > first && !(block.lanes[last - 1] & rows)) --last;
    uint64_t all = rows;
    for (int64_t j = first; j < last; ++j) all &= block.lanes[j];
    partial = all != rows;
  }
  Span(const Block& block, int64_t p) {
    const Interval& seen = *block.seen;
    const int64_t end = block.begin + block.n;
    first = block.begin > seen.any_lo[p] ? block.begin : seen.any_lo[p];
    last = end < seen.any_hi[p] ? end : seen.any_hi[p];
    partial = seen.all_lo[p] > first || seen.all_hi[p] < last;
  }
};

// ---- weights -------------------------------------------------------------------------------
//
// A weight is 2^(s * scale2 - lse), with the log-sum-exp in units of log 2 as the sum of two floats.
// Below LARGE the exponent is exact but for its own size. From there on scores are so large that
// float32 rounds them by more than a weight's precision: a large lane rounds s * scale2 once, as
// plain float32 arithmetic does, so that the largest key has exponent 0 exactly at any size. Its
// `high` is the maximum alone, and its `low` is 1 + log2(sum of weights): at least 1, while that of
// another lane is below 1/2.

constexpr float COARSE = 12288.0f;  // what is added to it loses all below 2^-10

// A number as the sum of two floats, so that a product with it rounds only once. The low part of a
// factor is positive: a masked score stays -inf.
struct Split {
  float high, low;
  explicit Split(double x) : high((float)x), low((float)(x - high)) {}
  // the high part a multiple of 2^-10
  static Split coarse(double x) {
    Split split(x);
    split.high = (split.high + COARSE) - COARSE, split.low = (float)(x - split.high);
    return split;
  }
  static Split factor(double x) {
    Split split(x);
    if (split.low < 0.0f) split = Split(x * (1 - 0x1p-24)), split.low = (float)(x - split.high);
    if (split.low < 0x1p-126f) split.low = 0x1p-126f;
    return split;
  }
};

// 2^(s * scale2 - high - low), not above 1. The integer part of the exponent is taken to `high`,
// which is coarse and loses no bit by it: so the rest, below 1, is rounded at its own size.
static MEMATTN_INLINE vf weight(vf s, Split scale2, vf high, vf low) {
  return exp2_nonpositive(fma(s, scale2.high, -high), [&](vf n) {
    return fma(s, scale2.high, -(high + n)) + fma(s, scale2.low, -low);
  });
}

// The same of a large lane.
static MEMATTN_INLINE vf large_weight(vf s, Split scale2, vf high, vf log_sum) {
  const vf x = s * scale2.high - high;
  return exp2_nonpositive(x - log_sum, [&](vf n) { return (x - n) - log_sum; });
}

static MEMATTN_INLINE vi is_large(vf maximum) {
  return ((maximum >= LARGE) | (maximum <= -LARGE)) & (maximum != NO_SCORE);
}
static MEMATTN_INLINE vi is_large_low(vf low) { return low >= 0.5f; }

template <int NV>
static MEMATTN_INLINE bool any(const vi* lanes) {
  vi some{};
  for (int v = 0; v < NV; ++v) some |= lanes[v];
  int32_t all = 0;
  for (int i = 0; i < VL; ++i) all |= some[i];
  return all != 0;
}

// weight() of lanes whose log-sum-exp is saved; large ones are asked for only where there are any.
template <bool SOME_LARGE>
static MEMATTN_INLINE vf saved_weight(vf s, Split scale2, vf high, vf low) {
  const vf w = weight(s, scale2, high, low);
  if constexpr (!SOME_LARGE) return w;
  return select(is_large_low(low), large_weight(s, scale2, high, low - 1.0f), w);
}

// Calls use(std::true_type or std::false_type) by whether a lane of the panel is large.
template <int NV, class Use>
static MEMATTN_INLINE void with_large_lanes(const vf* low, Use use) {
  vi large[NV];
  for (int v = 0; v < NV; ++v) large[v] = is_large_low(low[v]);
  any<NV>(large) ? use(std::true_type()) : use(std::false_type());
}

// The mean of `x` under weights, each sum in two floats: where one weight is large, x less the mean
// is small beside both.
struct WeightedMean {
  vf high{}, low{}, weight_high{}, weight_low{};

  MEMATTN_INLINE void add(vf w, vf x) {
    const vf term = w * x;
    low += fma(w, x, -term);
    add(high, low, term), add(weight_high, weight_low, w);
  }
  MEMATTN_INLINE void scale(vf factor) {
    high *= factor, low *= factor, weight_high *= factor, weight_low *= factor;
  }
  // stores the mean, and takes what its rounding left from `extra`
  MEMATTN_INLINE void store(vf* mean, vf* extra) const {
    const vf sum = high + low, weight = weight_high + weight_low;
    const vi some = weight != 0.0f;
    *mean = select(some, sum / weight, vf{});
    // of high + low - mean * (weight_high + weight_low)
    const vf left = fma(-*mean, weight_high, high) + fma(-*mean, weight_low, low);
    *extra -= select(some, left / weight, vf{});
  }

 private:
  static MEMATTN_INLINE void add(vf& high, vf& low, vf term) {
    const vf sum = high + term, added = sum - high;
    low += (high - (sum - added)) + (term - added);
    high = sum;
  }
};

// Online softmax state of one panel: the maximum in units of log 2 as a sum of two floats, the first
// coarse, so that the largest key has weight 1 exactly, and the sum of the weights. In a large lane
// the first float is the maximum, and the second 0.
template <int NV>
struct SoftmaxState {
  vf high[NV], low[NV], sum[NV];
};

// Turns scores into weights and adds these up.
template <bool SOME_LARGE, int NV>
static MEMATTN_INLINE void softmax_weights(float* scores, int64_t n, Split scale2, const vf* high,
                                           const vf* low, const vi* large, vf* sum) {
  for (int64_t begin = 0; begin < n; begin += WEIGHTS_RUN) {
    vf part[NV];
    for (int v = 0; v < NV; ++v) part[v] = vf{};
    const int64_t end = n - begin < WEIGHTS_RUN ? n : begin + WEIGHTS_RUN;
    for (int64_t j = begin; j < end; ++j)
      for (int v = 0; v < NV; ++v) {
        vf* s = (vf*)scores + j * NV + v;
        vf w = weight(*s, scale2, high[v], low[v]);
        if constexpr (SOME_LARGE)
          w = select(large[v], large_weight(*s, scale2, high[v], vf{}), w);
        *s = w;
        part[v] += *s;
      }
    for (int v = 0; v < NV; ++v) sum[v] += part[v];
  }
}

// Takes in one panel of scores [n][PANEL] without their scale, and turns them into weights in place.
// `alpha` is the factor of what was summed before.
template <int NV>
static MEMATTN_INLINE void softmax_step(float* scores, int64_t n, Split scale2,
                                        SoftmaxState<NV>* state, vf* alpha) {
  vf top[NV], high[NV], low[NV], sum[NV];
  vi large[NV];
  for (int v = 0; v < NV; ++v) top[v] = broadcast(-__builtin_inff()), sum[v] = vf{};
  for (int64_t j = 0; j < n; ++j)
    for (int v = 0; v < NV; ++v) {
      const vf s = ((const vf*)scores)[j * NV + v];
      top[v] = greater(s, top[v]);
    }
  for (int v = 0; v < NV; ++v) {
    const vf exact = top[v] * scale2.high;
    high[v] = (exact + COARSE) - COARSE;
    low[v] = fma(top[v], scale2.low, fma(top[v], scale2.high, -high[v]));
    large[v] = is_large(exact);
    high[v] = select(large[v], exact, high[v]), low[v] = select(large[v], vf{}, low[v]);
    const vi higher = high[v] > state->high[v];  // not for a lane that sees no key of these
    high[v] = select(higher, high[v], state->high[v]);
    low[v] = select(higher, low[v], state->low[v]);
    large[v] = is_large(high[v]);
  }
  if (any<NV>(large)) softmax_weights<true, NV>(scores, n, scale2, high, low, large, sum);
  else softmax_weights<false, NV>(scores, n, scale2, high, low, large, sum);
  for (int v = 0; v < NV; ++v) {
    const vf rise = state->high[v] - high[v], low_rise = state->low[v] - low[v];
    alpha[v] = exp2_nonpositive(rise, [&](vf n) { return (rise - n) + low_rise; });
    state->sum[v] = fma(state->sum[v], alpha[v], sum[v]);
    state->high[v] = high[v], state->low[v] = low[v];
  }
}

// The log-sum-exp of a row: in natural units, and in units of log 2 as the backward wants it.
struct RowLse {
  float natural = -__builtin_inff(), high = -__builtin_inff(), low = 0.0f;

  // `top` and its rest are the state's maximum; no key where the sum is 0
  RowLse(float top, float rest, double sum) {
    if (sum == 0.0) return;
    const double log_sum = __builtin_log2(sum), all = ((double)top + rest) + log_sum;
    natural = (float)(all / LOG2E);
    const bool large = top >= LARGE || top <= -LARGE;
    high = large ? top : (float)all;
    low = large ? (float)(1.0 + log_sum) : (float)(all - high);
  }
};

// What the backward subtracts from exponents, of a row that has keys.
static MEMATTN_INLINE void saved_lse(float high, float low, float* to_high, float* to_low) {
  if (low >= 0.5f) {
    *to_high = high, *to_low = low;
    return;
  }
  const Split lse = Split::coarse((double)high + low);
  *to_high = lse.high, *to_low = lse.low;
}

template <int NV>
static void clear(SoftmaxState<NV>* states, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    for (int v = 0; v < NV; ++v)
      states[i].high[v] = broadcast(NO_SCORE), states[i].low[v] = states[i].sum[v] = vf{};
}

// Takes one block of keys into the softmax states and weighted sums of all panels.
// q: [panel][D][PANEL], scores: [BLOCK_KEYS][PANEL], acc: [panel][Dv][PANEL].
template <int NV, class AnyBlock>
static MEMATTN_INLINE void attend(const AnyBlock& block, int64_t lanes, int64_t D, int64_t Dv,
                                  const SumRuns& runs, Split scale2, const float* q,
                                  float* scores,
                                  SoftmaxState<NV>* states, float* acc) {
  constexpr int64_t PANEL = NV * VL;
  for (int64_t p = 0; p * PANEL < lanes; ++p) {
    const Span span(block, p);
    const int64_t n = span.last - span.first, skip = span.first - block.begin;
    if (n <= 0) continue;
    dot_products<NV>(n, D, runs.dims, block.key.data + skip * block.key.stride, block.key.stride,
                     q + p * D * PANEL, PANEL, scores, PANEL);
    if (span.partial) mask_panel<NV>(scores, block, p, span.first, span.last);
    vf alpha[NV];
    softmax_step<NV>(scores, n, scale2, &states[p], alpha);
    add_weighted<NV>(Dv, n, runs.keys, block.value.data + skip * block.value.stride,
                     block.value.stride, scores, PANEL, acc + p * Dv * PANEL, PANEL, alpha);
  }
}

// Zeros what panels of [BLOCK_KEYS][PANEL] hold for keys of the block outside [first, last).
template <int NV>
static MEMATTN_INLINE void clear_outside(float* panel, int64_t n, int64_t first, int64_t last) {
  constexpr int64_t PANEL = NV * VL;
  __builtin_memset(panel, 0, first * PANEL * 4);
  __builtin_memset(panel + last * PANEL, 0, (n - last) * PANEL * 4);
}

// to[j, :] += sum over the panels' lanes of weights[j, lane] * rows[lane, :]. `span_first` and
// `span_last` bound the keys that each panel sees; at most `run` panels are summed in one go.
template <int NV>
static void add_rows(const float* weights, const float* rows, int64_t run, float* to, int64_t ld,
                     int64_t n, int64_t panels, const int64_t* span_first,
                     const int64_t* span_last) {
  constexpr int64_t PANEL = NV * VL;
  constexpr int64_t GROUP = 24;  // keys handled with one choice of panels
  for (int64_t j = 0; j < n; j += GROUP) {
    const int64_t rows_here = n - j < GROUP ? n - j : GROUP;
    int64_t p0 = 0, p1 = panels;
    while (p0 < p1 && (span_last[p0] <= j || span_first[p0] >= j + rows_here)) ++p0;
    while (p1 > p0 && (span_last[p1 - 1] <= j || span_first[p1 - 1] >= j + rows_here)) --p1;
    for (int64_t p = p0; p < p1; p += run) {
      const int64_t n_panels = p1 - p < run ? p1 - p : run;
      const float* w = weights + p * BLOCK_KEYS * PANEL + j * PANEL;
      const float* r = rows + p * PANEL * ld;
      int64_t d = 0;
      for (; d + 2 * VL <= ld; d += 2 * VL)
        product<2, Store::add, true>(rows_here, n_panels, PANEL, w, PANEL, BLOCK_KEYS * PANEL,
                                     r + d, ld, PANEL * ld, to + j * ld + d, ld, nullptr);
      for (; d < ld; d += VL)
        product<1, Store::add, true>(rows_here, n_panels, PANEL, w, PANEL, BLOCK_KEYS * PANEL,
                                     r + d, ld, PANEL * ld, to + j * ld + d, ld, nullptr);
    }
  }
}
