// Neural memory, what all its passes share: activations, products, and the scratch of a chunk.
//
// Included once per instruction set after chapter_router_tile.h. A token is a lane: the activations
// of a chunk lie in panels [panel][width][lanes of a panel], so that a product with the weights
// reads these row by row or column by column where they lie, and every sum over features, mask and
// activation is vertical. Sums over tokens, which update weights, read one factor again as plain
// rows, [lanes][row_stride(width)]. Layers count from 0 here: layer l has weights
// [width[l + 1]][width[l]]. Lanes behind the last token hold zeros throughout.

// Floats between two rows: whole lines of the cache, an odd number of them, so that rows do not
// fall on each other's.
static MEMATTN_INLINE int64_t row_stride(int64_t width) {
  const int64_t lines = (width + 15) / 16;
  return (lines | 1) * 16;
}

// Hands out scratch, or counts it where there is none.
struct Arena {
  float* base = nullptr;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* at = base ? base + used : nullptr;
    used += round_up(floats, 16);
    return at;
  }
};

// ---- activations --------------------------------------------------------------------------------

// The upper tail of the normal distribution over its density at t >= 0, relative error 1.4e-8.
static MEMATTN_INLINE vf mills_ratio(vf t) {
  const vf u = 1.0f / fma(t, 0.21f, broadcast(1.0f));
  vf r = broadcast(-0.18056226f);
  r = fma(r, u, broadcast(0.71552491f));
  r = fma(r, u, broadcast(-0.83768803f));
  r = fma(r, u, broadcast(0.88742947f));
  r = fma(r, u, broadcast(-0.24375798f));
  r = fma(r, u, broadcast(0.31672501f));
  r = fma(r, u, broadcast(0.17243116f));
  r = fma(r, u, broadcast(0.21338777f));
  return fma(r, u, broadcast(0.2098241f)) * u;
}

// (The normal distribution - 1/2) / x by x^2, for |x| < 2, relative error 6.3e-9: near 0, where most
// activations are, a half minus the tail would round more.
static MEMATTN_INLINE vf central_slope(vf square) {
  vf p = broadcast(-1.7378171790483066e-08f);
  p = fma(p, square, broadcast(5.327732992554957e-07f));
  p = fma(p, square, broadcast(-9.023297934618313e-06f));
  p = fma(p, square, broadcast(1.1466788419056684e-04f));
  p = fma(p, square, broadcast(-1.1865536216646433e-03f));
  p = fma(p, square, broadcast(9.973166510462761e-03f));
  p = fma(p, square, broadcast(-6.64903074502945e-02f));
  return fma(p, square, broadcast(3.989422917366028e-01f));
}

struct Gelu {
  // phi, and its derivatives where DERIVATIVES says so
  template <int DERIVATIVES>
  static MEMATTN_INLINE void at(vf x, vf& value, vf& first, vf& second) {
    const vf negated = -x, size = select(x < 0.0f, negated, x), square = x * x;
    const vf density = exp_nonpositive(square * -0.5f) * 0.39894228f;
    const vf tail = density * mills_ratio(size);
    const vf outer = select(x < 0.0f, tail, 1.0f - tail);
    const vf inner = fma(x, central_slope(square), broadcast(0.5f));
    const vf cumulated = select(size < 2.0f, inner, outer);
    value = x * cumulated;
    if (DERIVATIVES > 0) first = fma(x, density, cumulated);
    if (DERIVATIVES > 1) second = density * fma(negated, x, broadcast(2.0f));
  }
};

struct Silu {
  template <int DERIVATIVES>
  static MEMATTN_INLINE void at(vf x, vf& value, vf& first, vf& second) {
    const vf e = exp_nonpositive(select(x < 0.0f, x, -x)), inverse = 1.0f / (1.0f + e);
    const vf small = e * inverse, s = select(x < 0.0f, small, inverse);
    const vf rest = select(x < 0.0f, inverse, small);
    value = x * s;
    if (DERIVATIVES > 0) first = fma(value, rest, s);
    if (DERIVATIVES > 1) second = s * rest * fma(x, rest - s, broadcast(2.0f));
  }
};

template <int DERIVATIVES, class Activation>
static void activate_with(int64_t vectors, float* x, float* first, float* second) {
  for (int64_t i = 0; i < vectors; ++i) {
    vf value, slope{}, bend{};
    Activation::template at<DERIVATIVES>(((vf*)x)[i], value, slope, bend);
    ((vf*)x)[i] = value;
    if (DERIVATIVES > 0) ((vf*)first)[i] = slope;
    if (DERIVATIVES > 1) ((vf*)second)[i] = bend;
  }
}

// x becomes phi(x); first and second get the derivatives.
template <int DERIVATIVES>
static void activate(bool is_silu, int64_t vectors, float* x, float* first, float* second) {
  if (is_silu) activate_with<DERIVATIVES, Silu>(vectors, x, first, second);
  else activate_with<DERIVATIVES, Gelu>(vectors, x, first, second);
}

// ---- the tokens of a chunk ----------------------------------------------------------------------

// Tokens of one chunk: `pending` whose factors are known, then those from `first` on.
struct ChunkTokens {
  int64_t n, pending, first;
  int64_t lanes, panels;
  bool is_full;
};

// The tokens of one sequence.
struct MemoryRow {
  int64_t b, begin, end, pending;
  MemoryRow(const MemoryArgs& a, int64_t row)
      : b(a.B == a.R ? row : 0), begin(a.row_start ? a.row_start[row] : 0),
        end(a.row_end ? a.row_end[row] : a.T), pending(a.count ? a.count[row] : 0) {
    if (end < begin) end = begin;
  }
  int64_t chunks(const MemoryArgs& a) const {
    return (pending + end - begin + a.chunk - 1) / a.chunk;
  }
  ChunkTokens chunk(const MemoryArgs& a, int64_t i, int64_t panel) const {
    const int64_t all = pending + end - begin, at = i * a.chunk;
    ChunkTokens c;
    c.n = all - at < a.chunk ? all - at : a.chunk;
    c.pending = i == 0 ? pending : 0;
    c.first = begin - pending + at + c.pending;
    c.panels = (c.n + panel - 1) / panel;
    c.lanes = c.panels * panel;
    c.is_full = c.n == a.chunk;
    return c;
  }
  // where the checkpoint of group g >= 1 lies
  int64_t slot(const MemoryArgs& a, int64_t g) const {
    const int64_t span = a.group * a.chunk;
    return (begin - pending + g * span) / span - (a.count ? 0 : 1);
  }
};

// Weights and momentum of one head, their rows padded; no momentum where S is null.
struct MemoryWeights {
  float *W[MEMORY_DEPTH], *S[MEMORY_DEPTH];

  static MemoryWeights take(const MemoryArgs& a, Arena& arena) {
    MemoryWeights w{};
    for (int64_t l = 0; l < a.depth; ++l) w.W[l] = arena.take(floats(a, l));
    for (int64_t l = 0; l < a.depth && a.has_momentum; ++l) w.S[l] = arena.take(floats(a, l));
    return w;
  }
  static int64_t floats(const MemoryArgs& a, int64_t l) {
    return a.width[l + 1] * row_stride(a.width[l]);
  }
  // from and to the packed form; a null pointer stands for zeros
  void load(const MemoryArgs& a, const float* weights, const float* momentum) const {
    unpack(a, weights, W);
    if (a.has_momentum) unpack(a, momentum, S);
  }
  void store(const MemoryArgs& a, float* weights, float* momentum) const {
    if (weights) pack(a, W, weights);
    if (a.has_momentum && momentum) pack(a, S, momentum);
  }

 private:
  static void unpack(const MemoryArgs& a, const float* from, float* const* to) {
    for (int64_t l = 0; l < a.depth; ++l)
      for (int64_t m = 0; m < a.width[l + 1]; ++m) {
        const int64_t ld = row_stride(a.width[l]), filled = from ? a.width[l] : 0;
        float* row = to[l] + m * ld;
        for (int64_t k = 0; k < filled; ++k) row[k] = from[k];
        for (int64_t k = filled; k < ld; ++k) row[k] = 0.0f;
        if (from) from += a.width[l];
      }
  }
  static void pack(const MemoryArgs& a, float* const* from, float* to) {
    for (int64_t l = 0; l < a.depth; ++l)
      for (int64_t m = 0; m < a.width[l + 1]; ++m, to += a.width[l])
        __builtin_memcpy(to, from[l] + m * row_stride(a.width[l]), a.width[l] * 4);
  }
};

// What the pass over the keys of a chunk leaves behind.
template <int NV>
struct ChunkKeys {
  float *input[MEMORY_DEPTH], *input_rows[MEMORY_DEPTH];  // of layer l, the second as rows
  float *delta[MEMORY_DEPTH], *scaled[MEMORY_DEPTH];      // of its outputs, theta kappa times it
  float *first[MEMORY_DEPTH], *second[MEMORY_DEPTH];      // phi'; phi'' times the gradient of h
  float* inside;                                          // Huber: 1 where |e| <= delta
  float *input_square[MEMORY_DEPTH], *delta_square[MEMORY_DEPTH];
  float *lr, *rate, *decay, *momentum;                    // theta, theta kappa, alpha, eta by lane
  float *kappa, *kappa_slope;                             // the slope over n
  float *beta, *sigma, *mu;                               // after each token
  float *c, *m, *c_turned;  // [panel of i][j][i], the same, and -c as [panel of j][i][j]

  static ChunkKeys take(const MemoryArgs& a, bool is_backward, Arena& arena) {
    const int64_t lanes = round_up(a.chunk, NV * VL);
    ChunkKeys k{};
    for (int64_t l = 0; l < a.depth; ++l) {
      k.input[l] = arena.take(a.width[l] * lanes);
      k.input_rows[l] = arena.take(row_stride(a.width[l]) * lanes);
      k.delta[l] = arena.take(a.width[l + 1] * lanes);
      k.scaled[l] = arena.take(a.width[l + 1] * lanes);
      k.input_square[l] = arena.take(lanes), k.delta_square[l] = arena.take(lanes);
      if (l + 1 == a.depth) continue;
      k.first[l] = arena.take(a.width[l + 1] * lanes);
      if (is_backward) k.second[l] = arena.take(a.width[l + 1] * lanes);
    }
    if (is_backward && a.is_huber) k.inside = arena.take(a.width[a.depth] * lanes);
    for (float** one : {&k.lr, &k.rate, &k.decay, &k.momentum, &k.kappa, &k.kappa_slope, &k.beta,
                        &k.sigma, &k.mu})
      *one = arena.take(lanes);
    k.c = arena.take(lanes * lanes), k.c_turned = arena.take(lanes * lanes);
    if (a.has_momentum) k.m = arena.take(lanes * lanes);
    return k;
  }
};

// ---- products -----------------------------------------------------------------------------------

// to[m][lane] (=, +=, alpha[lane] to +) sum over k of W[m][k] x[k][lane].
template <int NV, Store STORE>
static void forth(const ChunkTokens& t, int64_t M, int64_t K, const float* W, const float* x,
                  float* to, const float* alpha = nullptr) {
  constexpr int PL = NV * VL;
  for (int64_t p = 0; p < t.panels; ++p)
    product<NV, STORE, true>(M, 1, K, W, row_stride(K), 0, x + p * K * PL, PL, 0, to + p * M * PL,
                             PL, alpha ? alpha + p * PL : nullptr);
}

// to[k][lane] (=, +=) sum over m of W[m][k] x[m][lane].
template <int NV, Store STORE>
static void back(const ChunkTokens& t, int64_t M, int64_t K, const float* W, const float* x,
                 float* to) {
  constexpr int PL = NV * VL;
  for (int64_t p = 0; p < t.panels; ++p)
    product<NV, STORE, false>(K, 1, M, W, row_stride(K), 0, x + p * M * PL, PL, 0,
                              to + p * K * PL, PL, nullptr);
}

// W[m][k] += sum over lanes of x[m][lane] rows[lane][k].
template <int NV>
static void add_outer(const ChunkTokens& t, int64_t M, int64_t K, const float* x,
                      const float* rows, float* W) {
  constexpr int PL = NV * VL;
  const int64_t ld = row_stride(K), run = t.panels == 1 ? t.n : PL;
  for (int64_t k = 0; k < K; k += 2 * VL) {
    if (K - k > VL)
      product<2, Store::add, true>(M, t.panels, run, x, PL, M * PL, rows + k, ld, PL * ld, W + k,
                                   ld, nullptr);
    else
      product<1, Store::add, true>(M, t.panels, run, x, PL, M * PL, rows + k, ld, PL * ld, W + k,
                                   ld, nullptr);
  }
}

// pairs[panel of column][row][column] = sum over d of x[d][row] y[d][column], in blocks whose rows
// are not before their columns (LOWER) or not behind: others are left alone.
template <int NV, bool LOWER>
static void pair_products(const ChunkTokens& t, int64_t width, const float* x, const float* y,
                          float* pairs) {
  constexpr int PL = NV * VL;
  for (int64_t column = 0; column < t.panels; ++column)
    for (int64_t row = LOWER ? column : 0; row < (LOWER ? t.panels : column + 1); ++row)
      product<NV, Store::set, false>(PL, 1, width, x + row * width * PL, PL, 0,
                                     y + column * width * PL, PL, 0,
                                     pairs + (column * t.lanes + row * PL) * PL, PL, nullptr);
}

// to[m][column] += sum over rows of x[m][row] pairs[panel of column][row][column].
template <int NV, bool LOWER>
static void add_pairs(const ChunkTokens& t, int64_t M, const float* x, const float* pairs,
                      float* to) {
  constexpr int PL = NV * VL;
  for (int64_t column = 0; column < t.panels; ++column) {
    const int64_t from = LOWER ? column : 0, n = LOWER ? t.panels - column : column + 1;
    product<NV, Store::add, true>(M, n, t.panels == 1 ? t.n : PL, x + from * M * PL, PL, M * PL,
                                  pairs + (column * t.lanes + from * PL) * PL, PL, PL * PL,
                                  to + column * M * PL, PL, nullptr);
  }
}

// Lower pairs [panel of i][j][i], times `sign`, as upper ones [panel of j][i][j].
template <int NV>
static void turn_pairs(const ChunkTokens& t, float sign, const float* lower, float* upper) {
  constexpr int PL = NV * VL;
  for (int64_t i = 0; i < t.lanes; i += VL)
    for (int64_t j = i / PL * PL; j < t.lanes; j += VL) {
      vf square[VL];
#pragma GCC unroll 16
      for (int k = 0; k < VL; ++k)
        square[k] = sign * *(const vf*)(lower + (i / PL * t.lanes + j + k) * PL + i % PL);
      transpose(square);
#pragma GCC unroll 16
      for (int k = 0; k < VL; ++k)
        *(vf*)(upper + (j / PL * t.lanes + i + k) * PL + j % PL) = square[k];
    }
}

// Calls visit(vf* at, panel, v) for every vector of an activation.
template <int NV, class Visit>
static MEMATTN_INLINE void each_vector(const ChunkTokens& t, int64_t width, Visit visit) {
  for (int64_t p = 0; p < t.panels; ++p)
    for (int64_t d = 0; d < width; ++d)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) visit((p * width + d) * NV + v, p * NV + v);
}

// to = factor[lane] * x
template <int NV>
static void scale_lanes(const ChunkTokens& t, int64_t width, const float* x, const float* factor,
                        float* to) {
  each_vector<NV>(t, width, [&](int64_t i, int64_t lane) {
    ((vf*)to)[i] = ((const vf*)x)[i] * ((const vf*)factor)[lane];
  });
}

// sums[lane] += sum over features of x y
template <int NV>
static void add_lane_products(const ChunkTokens& t, int64_t width, const float* x, const float* y,
                              float* sums) {
  for (int64_t p = 0; p < t.panels; ++p) {
    vf sum[NV] = {};
    for (int64_t d = 0; d < width; ++d)
      for (int v = 0; v < NV; ++v) {
        const int64_t i = (p * width + d) * NV + v;
        sum[v] = fma(((const vf*)x)[i], ((const vf*)y)[i], sum[v]);
      }
    for (int v = 0; v < NV; ++v) ((vf*)sums)[p * NV + v] += sum[v];
  }
}

// ---- loading and storing ------------------------------------------------------------------------

static MEMATTN_INLINE int64_t token_at(const View& view, int64_t b, int64_t h, int64_t token) {
  return b * view.stride[0] + h * view.stride[1] + token * view.stride[2];
}

// The new tokens of a chunk, 0 in all other lanes; `rows` is scratch.
template <int NV>
static void load_tokens(const View& view, int64_t b, int64_t h, const ChunkTokens& t, int64_t width,
                        float* rows, float* to) {
  const int64_t ld = row_stride(width);
  for (int64_t i = 0; i < t.lanes; ++i) {
    float* row = rows + i * ld;
    int64_t filled = 0;
    if (i >= t.pending && i < t.n) {
      load_row(view, token_at(view, b, h, t.first + i - t.pending), view.stride[3], width, row);
      filled = width;
    }
    for (int64_t d = filled; d < ld; ++d) row[d] = 0.0f;
  }
  to_panels(rows, ld, t.lanes, width, NV * VL, to);
}

template <int NV>
static void store_tokens(const View& view, int64_t b, int64_t h, const ChunkTokens& t,
                         int64_t width, const float* x, float* rows) {
  const int64_t ld = row_stride(width);
  from_panels(x, NV * VL, t.lanes, width, ld, rows);
  for (int64_t i = t.pending; i < t.n; ++i)
    store_row(view, token_at(view, b, h, t.first + i - t.pending), view.stride[3], width,
              rows + i * ld);
}

// One value per new token: at[lane], and `else_value` in all other lanes.
static void load_scalars(const View& view, int64_t b, int64_t h, const ChunkTokens& t,
                         float else_value, float* at) {
  for (int64_t i = 0; i < t.lanes; ++i) {
    const bool is_new = view.data && i >= t.pending && i < t.n;
    at[i] = is_new ? load(view, token_at(view, b, h, t.first + i - t.pending)) : else_value;
  }
}

// Lane `lane` of an activation from or to contiguous features.
template <int NV>
static MEMATTN_INLINE float& lane_at(float* x, int64_t width, int64_t lane, int64_t d) {
  constexpr int PL = NV * VL;
  return x[(lane / PL * width + d) * PL + lane % PL];
}
