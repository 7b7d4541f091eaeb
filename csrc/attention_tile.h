// What attention kernels share inside a tile: weights, the online softmax, and the sums of key
// gradients.
//
// Included once per instruction set after key_blocks.h.

constexpr double LOG2E = 1.4426950408889634;
constexpr int64_t WEIGHTS_RUN = 16;  // weights summed in one go
constexpr int64_t FETCH_KEYS = 24;   // keys between two calls of fetch_some()
constexpr float NO_SCORE = -3e38f;   // running maximum before the first key
constexpr float LARGE = 65536.0f;    // a maximum of this size is that of a large lane

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

// weight() of lanes whose log-sum-exp is saved; large lanes are looked for only where there are any.
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

// ---- caps
//
// A cap c makes c * tanh(s * scale / c) of a score s. A panel then holds the tanh alone, and c is the
// scale of exponents.

// To 1.5 units in the last place; NaN stays NaN.
static MEMATTN_INLINE vf tanh_of(vf x) {
  constexpr double TWO_LOG2E = 2 * LOG2E;
  const vf size = (vf)((vi)x & 0x7fffffff), square = x * x;
  // minimax polynomial of (tanh(x) / x - 1) / x^2 up to 0.625
  vf p = broadcast(-5.70498872745e-3f);
  p = fma(p, square, broadcast(2.06390887954e-2f));
  p = fma(p, square, broadcast(-5.37397155531e-2f));
  p = fma(p, square, broadcast(1.33314422036e-1f));
  p = fma(p, square, broadcast(-3.33332819422e-1f));
  const vf small = fma(p * square, x, x);
  const float high = (float)-TWO_LOG2E, low = (float)(-TWO_LOG2E - high);
  const vf u = exp2_nonpositive(size * high, [&](vf n) {
    return fma(size, high, -n) + size * low;
  });
  const vf large = 1.0f - 2.0f * u / (1.0f + u);
  return select(size < 0.625f, small, (vf)((vi)large | ((vi)x & (vi{} + INT32_MIN))));
}

struct Uncapped {
  static constexpr bool CAPS = false;
  static MEMATTN_INLINE double exponent(double scale) { return scale * LOG2E; }
  template <int NV>
  MEMATTN_INLINE void apply(float*, int64_t, int64_t) const {}
};

struct Softcap {
  static constexpr bool CAPS = true;
  double cap;
  Split factor;

  Softcap(double scale, double cap) : cap(cap), factor(Split::factor(scale / cap)) {}
  // the factor of what a panel holds, in units of log 2
  MEMATTN_INLINE double exponent(double) const { return cap * LOG2E; }
  // of the products of `n` keys, STEP apart
  template <int NV>
  MEMATTN_INLINE void apply(float* panel, int64_t n, int64_t step) const {
    for (int64_t j = 0; j < n; ++j)
      for (int v = 0; v < NV; ++v) {
        vf* s = (vf*)(panel + j * step) + v;
        *s = tanh_of(fma(*s, factor.high, *s * factor.low));
      }
  }
  // the derivative of a capped score, 0 of a masked one
  static MEMATTN_INLINE vf slope(vf t) { return greater(fma(-t, t, broadcast(1.0f)), vf{}); }
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

// The log-sum-exp of a row: in natural units, and in units of log 2 as the backward uses it.
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

// One panel of dot products of `n` keys or values of a block. Where they come from memory, the next ones
// are prefetched meanwhile, a few at a time: with many at once the processor would wait.
template <int NV, class AnyBlock>
static MEMATTN_INLINE void block_products(const AnyBlock& block, int64_t n, int64_t width, int64_t run,
                                          Rows rows, const float* panel, float* to, int64_t ld) {
  constexpr int64_t PANEL = NV * VL;
  if constexpr (AnyBlock::FETCHES) {
    for (int64_t j = 0; j < n; j += FETCH_KEYS) {
      block.fetch_some();
      const int64_t here = n - j < FETCH_KEYS ? n - j : FETCH_KEYS;
      dot_products<NV>(here, width, run, rows.from(j).data, rows.stride, panel, PANEL, to + j * ld,
                       ld);
    }
  } else {
    dot_products<NV>(n, width, run, rows.data, rows.stride, panel, PANEL, to, ld);
  }
}

// Takes one block of keys into the softmax states of all panels, and calls add(panel, its span, what
// is added so far is to be multiplied by) when `scores` holds the weights of a panel.
// q: [panel][D][PANEL], scores: [BLOCK_KEYS][PANEL].
template <int NV, class AnyBlock, class Add, class Cap = Uncapped>
static MEMATTN_INLINE void weigh(const AnyBlock& block, int64_t lanes, int64_t D, const SumRuns& runs,
                                 Split scale2, const float* q, float* scores,
                                 SoftmaxState<NV>* states, Add add, const Cap& cap = {}) {
  constexpr int64_t PANEL = NV * VL;
  for (int64_t p = 0; p * PANEL < lanes; ++p) {
    const Span span(block, p);
    const int64_t n = span.last - span.first, skip = span.first - block.begin;
    if (n <= 0) continue;
    block_products<NV>(block, n, D, runs.dims, block.key.from(skip), q + p * D * PANEL, scores, PANEL);
    cap.template apply<NV>(scores, n, PANEL);
    if (span.partial) mask_panel<NV>(scores, block, p, span.first, span.last);
    vf alpha[NV];
    softmax_step<NV>(scores, n, scale2, &states[p], alpha);
    add(p, span, (const float*)alpha);
  }
}

// And into the weighted sums of all panels, acc: [panel][Dv][PANEL].
template <int NV, class AnyBlock, class Cap = Uncapped>
static MEMATTN_INLINE void attend(const AnyBlock& block, int64_t lanes, int64_t D, int64_t Dv,
                                  const SumRuns& runs, Split scale2, const float* q, float* scores,
                                  SoftmaxState<NV>* states, float* acc, const Cap& cap = {}) {
  constexpr int64_t PANEL = NV * VL;
  weigh<NV>(block, lanes, D, runs, scale2, q, scores, states,
            [&](int64_t p, const Span& span, const float* alpha) {
              const Rows& value = block.value;
              add_weighted<NV>(Dv, span.last - span.first, runs.keys,
                               value.data + (span.first - block.begin) * value.stride, value.stride,
                               scores, PANEL, acc + p * Dv * PANEL, PANEL, alpha);
            }, cap);
}

// Zeros what panel p, [BLOCK_KEYS][units of a panel], holds for keys of the block that it does not see.
template <int NV, class Unit = Floats>
static MEMATTN_INLINE void clear_outside(float* panel, int64_t n, const PanelSpans& spans, int64_t p) {
  constexpr int64_t PANEL = NV * VL / Unit::NUMBERS;
  const int64_t first = spans.first[p], last = spans.last[p];
  __builtin_memset(panel, 0, first * PANEL * 4);
  __builtin_memset(panel + last * PANEL, 0, (n - last) * PANEL * 4);
}

// to[j, :] += sum over the panels' lanes of weights[j, lane] * rows[lane, :], units of lanes in both.
// `spans` has the keys that each panel sees; at most `run` panels are summed in one go.
template <int NV, class Unit = Floats>
static void add_rows(const float* weights, const float* rows, int64_t run, float* to, int64_t ld,
                     int64_t n, int64_t panels, const PanelSpans& spans) {
  constexpr int64_t PANEL = NV * VL / Unit::NUMBERS;
  // keys handled with one choice of panels
  constexpr int64_t GROUP = Unit::HAS_TILES ? 32 : 24;
  for (int64_t j = 0; j < n; j += GROUP) {
    const int64_t rows_here = n - j < GROUP ? n - j : GROUP;
    int64_t p0 = 0, p1 = panels;
    while (p0 < p1 && (spans.last[p0] <= j || spans.first[p0] >= j + rows_here)) ++p0;
    while (p1 > p0 && (spans.last[p1 - 1] <= j || spans.first[p1 - 1] >= j + rows_here)) --p1;
    for (int64_t p = p0; p < p1; p += run) {
      const int64_t n_panels = p1 - p < run ? p1 - p : run;
      const float* w = weights + p * BLOCK_KEYS * PANEL + j * PANEL;
      const float* r = rows + p * PANEL * ld;
      int64_t d = 0;
      for (; d + 2 * VL <= ld; d += 2 * VL)
        product<2, Store::add, true, Unit>(rows_here, n_panels, PANEL, w, PANEL, BLOCK_KEYS * PANEL,
                                           r + d, ld, PANEL * ld, to + j * ld + d, ld, nullptr);
      for (; d < ld; d += VL)
        product<1, Store::add, true, Unit>(rows_here, n_panels, PANEL, w, PANEL, BLOCK_KEYS * PANEL,
                                           r + d, ld, PANEL * ld, to + j * ld + d, ld, nullptr);
    }
  }
}
