// Neural memory, one more token of one head: its gradient at the weights of the chunk's start, and
// what its query reads, from these, the momentum and the factors of the open chunk. The newest
// weights are written where the chunk ends, and nowhere else.
//
// Included once per instruction set after neural_memory_tile.h. A feature is a lane here; vectors
// in scratch are padded with zeros.

typedef float vf_anywhere __attribute__((vector_size(MEMATTN_VL * 4), aligned(4)));

// n floats, n <= VL, and zeros behind them.
static MEMATTN_INLINE vf load_part(const float* from, int64_t n) {
  vf part{};
  for (int64_t i = 0; i < n; ++i) part[i] = from[i];
  return part;
}

// Lane i of the result is the sum of rows[i].
template <int STEP = 1>
static MEMATTN_INLINE vf sums_of_rows(vf* rows) {
  if constexpr (STEP < VL) {
    constexpr auto lanes = std::make_index_sequence<VL>();
#pragma GCC unroll 16
    for (int i = 0; i < VL; i += 2 * STEP)
      rows[i] = exchange<STEP, true>(rows[i], rows[i + STEP], lanes) +
                exchange<STEP, false>(rows[i], rows[i + STEP], lanes);
    return sums_of_rows<2 * STEP>(rows);
  }
  return rows[0];
}

// The products of VL rows with x, one in each lane; the rows behind them are on their way.
template <bool PREFETCH>
static MEMATTN_INLINE vf products_of_rows(int64_t K, const float* W, int64_t ld, const vf* x) {
  constexpr int AT_ONCE = VL < 8 ? VL : 8;  // sums that stay in registers beside their rows
  const int64_t whole = K / VL;
  vf sums[VL];
#pragma GCC unroll 2
  for (int first = 0; first < VL; first += AT_ONCE) {
    vf own[AT_ONCE];
    const float* rows = W + first * ld;
#pragma GCC unroll 8
    for (int i = 0; i < AT_ONCE; ++i) own[i] = vf{};
    for (int64_t k = 0; k < whole; ++k) {
      const vf factor = x[k];
#pragma GCC unroll 8
      for (int i = 0; i < AT_ONCE; ++i) {
        const float* at = rows + i * ld + k * VL;
        if (PREFETCH) __builtin_prefetch(at + VL * ld);
        own[i] = fma((vf) * (const vf_anywhere*)at, factor, own[i]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < AT_ONCE; ++i) sums[first + i] = own[i];
  }
  if (whole * VL < K)
    for (int i = 0; i < VL; ++i)
      sums[i] = fma(load_part(W + i * ld + whole * VL, K - whole * VL), x[whole], sums[i]);
  return sums_of_rows(sums);
}

// to[m] = <row m of W, x> for one or two vectors x: rows are read from memory once.
static void row_products(int64_t M, int64_t K, const float* W, int64_t ld, const float* x,
                         float* to, const float* x2 = nullptr, float* to2 = nullptr) {
  int64_t m = 0;
  for (; m + VL <= M; m += VL) {
    ((vf*)to)[m / VL] = products_of_rows<true>(K, W + m * ld, ld, (const vf*)x);
    if (x2) ((vf*)to2)[m / VL] = products_of_rows<false>(K, W + m * ld, ld, (const vf*)x2);
  }
  if (m == M) return;
  // what is left, and zeros behind it
  auto last = [&](const float* with) {
    vf sums[VL];
    for (int64_t i = 0; i < VL; ++i) {
      sums[i] = vf{};
      for (int64_t k = 0; k < K && m + i < M; k += VL) {
        const float* at = W + (m + i) * ld + k;
        const vf own = K - k < VL ? load_part(at, K - k) : (vf) * (const vf_anywhere*)at;
        sums[i] = fma(own, *(const vf*)(with + k), sums[i]);
      }
    }
    return sums_of_rows(sums);
  };
  *(vf*)(to + m) = last(x);
  if (x2) *(vf*)(to2 + m) = last(x2);
}

// to[k] += sum over m of factor[m] W[m][k].
static void add_rows(int64_t M, int64_t K, const float* W, int64_t ld, const float* factor,
                     float* to) {
  constexpr int64_t WIDE = 4 * VL;
  int64_t k = 0;
  for (; k + WIDE <= K; k += WIDE) {
    vf sum[4], odd[4];
    for (int v = 0; v < 4; ++v) sum[v] = ((const vf*)(to + k))[v], odd[v] = vf{};
    int64_t m = 0;
    for (; m + 2 <= M; m += 2) {
      const auto *row = (const vf_anywhere*)(W + m * ld + k);
      const auto *next = (const vf_anywhere*)(W + (m + 1) * ld + k);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        sum[v] = fma((vf)row[v], factor[m], sum[v]);
        odd[v] = fma((vf)next[v], factor[m + 1], odd[v]);
      }
    }
    if (m < M)
      for (int v = 0; v < 4; ++v)
        sum[v] = fma((vf)((const vf_anywhere*)(W + m * ld + k))[v], factor[m], sum[v]);
    for (int v = 0; v < 4; ++v) ((vf*)(to + k))[v] = sum[v] + odd[v];
  }
  for (; k < K; k += VL) {
    vf sum = *(const vf*)(to + k);
    for (int64_t m = 0; m < M; ++m) {
      const float* row = W + m * ld + k;
      const vf own = K - k < VL ? load_part(row, K - k) : (vf) * (const vf_anywhere*)row;
      sum = fma(own, factor[m], sum);
    }
    *(vf*)(to + k) = sum;
  }
}

static double square_of(int64_t n, const float* x) {
  vf sum{};
  for (int64_t i = 0; i < n; i += VL) sum = fma(*(const vf*)(x + i), *(const vf*)(x + i), sum);
  float total = 0.0f;
  for (int k = 0; k < VL; ++k) total += sum[k];
  return total;
}

// What one token of one head needs.
struct MemoryStep {
  float *key[MEMORY_DEPTH], *query[MEMORY_DEPTH];    // inputs of layer l
  float *delta[MEMORY_DEPTH], *first[MEMORY_DEPTH];  // of layer l's outputs
  float *value, *weighted, *moved;                   // scratch and W q, S q of a layer
  float *dots, *c, *m;                               // by token of the open chunk
  float *inputs, *deltas;                            // the same as rows, for the end of a chunk
  MemoryWeights end;

  MemoryStep(const MemoryArgs& a, Arena& arena) {
    const int64_t widest = round_up(a.most_width(), VL), tokens = round_up(a.chunk, VL);
    for (int64_t l = 0; l < a.depth; ++l) {
      key[l] = arena.take(round_up(a.width[l], VL));
      query[l] = arena.take(round_up(a.width[l], VL));
      delta[l] = arena.take(round_up(a.width[l + 1], VL));
      first[l] = arena.take(round_up(a.width[l + 1], VL));
    }
    for (float** one : {&value, &weighted, &moved}) *one = arena.take(widest);
    for (float** one : {&dots, &c, &m}) *one = arena.take(tokens);
    inputs = deltas = nullptr;
    if (!a.end_weights) return;
    inputs = arena.take(a.chunk * row_stride(a.most_width()));
    deltas = arena.take(a.chunk * row_stride(a.most_width()));
    end = MemoryWeights::take(a, arena);
  }
};

static void load_token(const View& view, int64_t b, int64_t h, int64_t width, float* to) {
  load_row(view, token_at(view, b, h, 0), view.stride[3], width, to);
  for (int64_t d = width; d < round_up(width, VL); ++d) to[d] = 0.0f;
}

// Where layer l begins among layers beside each other: in inputs, or with 1 in outputs.
static int64_t layer_begin(const MemoryArgs& a, int64_t l, int64_t outputs) {
  int64_t at = 0;
  for (int64_t i = 0; i < l; ++i) at += a.width[i + outputs];
  return at;
}

// The weights after a chunk of a.chunk tokens, whose last token is this one.
static void step_end(const MemoryArgs& a, int64_t row, int64_t h, const MemoryStep& s, float beta,
                     float sigma, float mu) {
  const int64_t pending = a.chunk - 1, head = row * a.H + h;
  s.end.load(a, a.start_of(row, h), a.momentum_of(row, h));
  for (int64_t l = 0; l < a.depth; ++l) {
    const int64_t K = a.width[l], M = a.width[l + 1], ld = row_stride(K), ldm = row_stride(M);
    const int64_t PH = a.inputs_width(), PD = a.outputs_width(), at = head * pending;
    const float* input = a.pending_h + at * PH + layer_begin(a, l, 0);
    const float* delta = a.pending_delta + at * PD + layer_begin(a, l, 1);
    for (int64_t i = 0; i < MemoryWeights::floats(a, l) / VL; ++i) {
      vf& weight = ((vf*)s.end.W[l])[i];
      weight *= beta;
      if (!a.has_momentum) continue;
      vf& speed = ((vf*)s.end.S[l])[i];
      weight = fma(speed, sigma, weight);
      speed *= mu;
    }
    for (int64_t i = 0; i <= pending; ++i) {
      const float* from = i < pending ? input + i * PH : s.key[l];
      for (int64_t d = 0; d < ld; ++d) s.inputs[i * ld + d] = d < K ? from[d] : 0.0f;
    }
    for (const bool is_momentum : {false, true}) {
      if (is_momentum && !a.has_momentum) continue;
      const float* factor = is_momentum ? s.m : s.c;
      for (int64_t i = 0; i <= pending; ++i) {
        const float* from = i < pending ? delta + i * PD : s.delta[l];
        for (int64_t d = 0; d < M; ++d) s.deltas[i * ldm + d] = -factor[i] * from[d];
      }
      float* to = is_momentum ? s.end.S[l] : s.end.W[l];
      for (int64_t k = 0; k < K; k += 2 * VL) {
        const float* x = s.inputs + k;
        if (K - k > VL)
          product<2, Store::add, false>(M, 1, a.chunk, s.deltas, ldm, 0, x, ld, 0, to + k, ld,
                                        nullptr);
        else
          product<1, Store::add, false>(M, 1, a.chunk, s.deltas, ldm, 0, x, ld, 0, to + k, ld,
                                        nullptr);
      }
    }
  }
  s.end.store(a, a.end_weights + head * a.weights_size(), a.end_momentum + head * a.weights_size());
}

static void memory_step(const MemoryArgs& a, int64_t row, int64_t h, float* scratch) {
  Arena arena{scratch};
  const MemoryStep s(a, arena);
  const int64_t N = a.depth, n = a.count[row], head = row * a.H + h, Dv = a.width[N];
  const int64_t PH = a.inputs_width(), PD = a.outputs_width(), at = head * (a.chunk - 1);
  const float *W = a.start_of(row, h), *S = a.momentum_of(row, h);
  const float *layer[MEMORY_DEPTH], *speed[MEMORY_DEPTH];
  for (int64_t l = 0, from = 0; l < N; from += a.width[l] * a.width[l + 1], ++l)
    layer[l] = W + from, speed[l] = S ? S + from : nullptr;

  // the gradient; the first layer multiplies the query in the same pass
  load_token(a.key, row, h, a.width[0], s.key[0]);
  load_token(a.query, row, h, a.width[0], s.query[0]);
  load_token(a.value, row, h, Dv, s.value);
  for (int64_t l = 0; l < N; ++l) {
    const int64_t K = a.width[l], M = a.width[l + 1];
    float* to = l + 1 < N ? s.key[l + 1] : s.delta[l];
    if (l == 0) row_products(M, K, layer[l], K, s.key[l], to, s.query[l], s.weighted);
    else row_products(M, K, layer[l], K, s.key[l], to);
    if (l + 1 < N) activate<1>(a.is_silu, round_up(M, VL) / VL, to, s.first[l], nullptr);
  }
  for (int64_t d = 0; d < Dv; ++d) {
    float e = s.delta[N - 1][d] + (a.residual ? s.key[0][d] : 0.0f) - s.value[d];
    if (a.is_huber) {
      e = e > a.huber_delta ? a.huber_delta : e;
      e = e < -a.huber_delta ? -a.huber_delta : e;
    }
    s.delta[N - 1][d] = e;
  }
  for (int64_t l = N - 2; l >= 0; --l) {
    const int64_t K = a.width[l + 1], M = a.width[l + 2];
    for (int64_t d = 0; d < round_up(K, VL); ++d) s.delta[l][d] = 0.0f;
    add_rows(M, K, layer[l + 1], K, s.delta[l + 1], s.delta[l]);
    for (int64_t d = 0; d < K; ++d) s.delta[l][d] *= s.first[l][d];
  }
  double square = 0.0;
  for (int64_t l = 0; l < N; ++l)
    square += square_of(a.width[l], s.key[l]) * square_of(a.width[l + 1], s.delta[l]);
  const double norm = __builtin_sqrt(square);
  a.surprise[head] = (float)norm;
  float kappa = 1.0f, slope;
  if (a.max_norm > 0.0) clamp_of(a, norm, kappa, slope);
  const bool is_skipped = a.skips_nonfinite && !(norm <= (double)__FLT_MAX__);
  a.skipped_of[head] = is_skipped;
  const float rate = kappa * load(a.lr, token_at(a.lr, row, h, 0));
  float is_sound = 0.0f;  // NaN where what is added to the weights is not finite
  for (int64_t l = 0; l < N; ++l) {
    for (int64_t d = 0; d < a.width[l + 1]; d += VL) {
      vf& delta = *(vf*)(s.delta[l] + d);
      delta *= rate;
    }
    if (__builtin_fabs(norm * rate) <= (double)__FLT_MAX__) continue;
    for (int64_t d = 0; d < a.width[l + 1]; ++d) is_sound += s.delta[l][d] - s.delta[l][d];
    for (int64_t d = 0; d < a.width[l]; ++d) is_sound += s.key[l][d] - s.key[l][d];
  }
  const bool is_lost = !is_skipped && is_sound != 0.0f;  // the weights from here on are NaN
  for (int64_t l = 0; l < N && (is_skipped || is_lost); ++l) {
    for (int64_t d = 0; d < a.width[l + 1]; ++d) s.delta[l][d] = 0.0f;
    for (int64_t d = 0; d < a.width[l]; ++d) s.key[l][d] = 0.0f;
  }

  // coefficients of this token's weights, from the last token to the first
  float decay = a.decay.data ? load(a.decay, token_at(a.decay, row, h, 0)) : 0.0f;
  float eta = a.has_momentum ? load(a.momentum, token_at(a.momentum, row, h, 0)) : 0.0f;
  if (is_lost) decay = __builtin_nanf("");
  if (is_lost && a.has_momentum) eta = decay;
  float beta = 1.0f, mu = 1.0f, c = 0.0f;
  s.c[n] = s.m[n] = c = 1.0f;
  for (int64_t i = n; i >= 0; --i) {
    const float own_eta = i == n ? eta : a.has_momentum ? a.pending_eta[at + i] : 0.0f;
    beta *= 1.0f - (i == n ? decay : a.pending_decay[at + i]), mu *= own_eta;
    c = own_eta * c;  // of what came before, through the momentum
    if (i > 0) s.m[i - 1] = mu, s.c[i - 1] = c = beta + c;
  }
  const float sigma = c;

  const float *inputs = a.pending_h + at * PH, *deltas = a.pending_delta + at * PD;
  for (int64_t l = 0; l < N; ++l) {
    const int64_t K = a.width[l], M = a.width[l + 1];
    const int64_t input_at = layer_begin(a, l, 0), delta_at = layer_begin(a, l, 1);
    float* to = l + 1 < N ? s.query[l + 1] : s.value;
    if (l > 0 || a.reads_chunk) row_products(M, K, layer[l], K, s.query[l], s.weighted);
    if (a.reads_chunk) {
      for (int64_t d = 0; d < round_up(M, VL); ++d) to[d] = s.weighted[d];
    } else {
      if (S) row_products(M, K, speed[l], K, s.query[l], s.moved);
      row_products(n, K, inputs + input_at, PH, s.query[l], s.dots);
      for (int64_t i = 0; i < n; ++i) s.dots[i] *= -s.c[i];
      float own = 0.0f;
      for (int64_t d = 0; d < K; ++d) own += s.key[l][d] * s.query[l][d];
      for (int64_t d = 0; d < M; ++d)
        to[d] = beta * s.weighted[d] + (S ? sigma * s.moved[d] : 0.0f) - own * s.delta[l][d];
      for (int64_t d = M; d < round_up(M, VL); ++d) to[d] = 0.0f;
      add_rows(n, M, deltas + delta_at, PD, s.dots, to);
    }
    if (l + 1 < N) activate<0>(a.is_silu, round_up(M, VL) / VL, to, nullptr, nullptr);
  }
  for (int64_t d = 0; d < Dv && a.residual; ++d) s.value[d] += s.query[0][d];
  store_row(a.out, token_at(a.out, row, h, 0), a.out.stride[3], Dv, s.value);

  if (n + 1 < a.chunk) {
    for (int64_t l = 0; l < N; ++l) {
      __builtin_memcpy(a.end_h + (at + n) * PH + layer_begin(a, l, 0), s.key[l], a.width[l] * 4);
      __builtin_memcpy(a.end_delta + (at + n) * PD + layer_begin(a, l, 1), s.delta[l],
                       a.width[l + 1] * 4);
    }
    a.end_decay[at + n] = decay, a.end_eta[at + n] = eta;
    if (!a.end_weights) return;
    __builtin_memcpy(a.end_weights + head * a.weights_size(), W, a.weights_size() * 4);
    if (!a.has_momentum) return;
    float* to = a.end_momentum + head * a.weights_size();
    for (int64_t i = 0; i < a.weights_size(); ++i) to[i] = S ? S[i] : 0.0f;
  } else {
    step_end(a, row, h, s, beta, sigma, mu);
  }
}

static int64_t memory_step_scratch(const MemoryArgs& a) {
  Arena arena;
  MemoryStep own(a, arena);
  return arena.used;
}

// ---- the table ----------------------------------------------------------------------------------

template <template <int> class Own, int NV>
static int64_t memory_floats(const MemoryArgs& a) {
  Arena arena;
  Own<NV> own(a, arena);
  return arena.used;
}

static int64_t memory_forward_scratch(const MemoryArgs& a) {
  return a.chunk <= VL ? memory_floats<MemoryForward, 1>(a) : memory_floats<MemoryForward, 2>(a);
}

static int64_t memory_backward_scratch(const MemoryArgs& a) {
  return a.chunk <= VL ? memory_floats<MemoryBackward, 1>(a) : memory_floats<MemoryBackward, 2>(a);
}

static void memory_forward(const MemoryArgs& a, int64_t row, int64_t h, float* scratch) {
  a.chunk <= VL ? forward_head<1>(a, row, h, scratch) : forward_head<2>(a, row, h, scratch);
}

static void memory_backward(const MemoryArgs& a, int64_t row, int64_t h, float* scratch) {
  a.chunk <= VL ? backward_head<1>(a, row, h, scratch) : backward_head<2>(a, row, h, scratch);
}
