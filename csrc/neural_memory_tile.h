// Neural memory, the forward of one head of one sequence, chunk after chunk, and what the backward
// computes again: the pass over the keys of a chunk, its coefficients, its end.
//
// Included once per instruction set after neural_memory_chunk.h. Definition: memattn/reference/neural_memory.py.

// kappa, and its derivative over n, for a gradient of norm n.
static void clamp_of(const MemoryArgs& a, double n, float& kappa, float& slope) {
  const double c = a.max_norm;
  kappa = 1.0f, slope = 0.0f;
  if (n != n) kappa = slope = (float)n;
  if (!(n > 0.0)) return;
  if (!a.is_soft) {
    if (n > c) kappa = (float)(c / n), slope = (float)(-c / n / n / n);
    return;
  }
  const double x = n / c, tanh = __builtin_tanh(x);
  kappa = (float)(tanh / x);
  // tanh(x) / x = 1 - x^2 / 3 + 2 x^4 / 15 - ..., where the difference below would cancel
  slope = (float)(x < 1e-3 ? (-2.0 / 3.0 + x * x * (8.0 / 15.0)) / (c * c)
                           : (1.0 - tanh * tanh - tanh / x) / n / n);
}

// The factors of the open chunk's tokens take their lanes.
template <int NV>
static void load_pending(const MemoryArgs& a, int64_t row, int64_t h, const ChunkTokens& t,
                         const ChunkKeys<NV>& keys) {
  const int64_t head = (row * a.H + h) * (a.chunk - 1);
  for (int64_t i = 0; i < t.pending; ++i) {
    const float *input = a.pending_h + (head + i) * a.inputs_width();
    const float *delta = a.pending_delta + (head + i) * a.outputs_width();
    for (int64_t l = 0; l < a.depth; ++l) {
      const int64_t K = a.width[l], M = a.width[l + 1];
      for (int64_t d = 0; d < K; ++d) lane_at<NV>(keys.input[l], K, i, d) = input[d];
      for (int64_t d = 0; d < M; ++d) lane_at<NV>(keys.scaled[l], M, i, d) = delta[d];
      input += K, delta += M;
    }
    keys.decay[i] = a.pending_decay[head + i];
    keys.momentum[i] = a.has_momentum ? a.pending_eta[head + i] : 0.0f;
  }
}

// A token whose gradient is not finite leaves no trace.
template <int NV>
static void skip_token(const MemoryArgs& a, int64_t i, const ChunkKeys<NV>& keys) {
  auto clear = [&](float* x, int64_t width) {
    for (int64_t d = 0; x && d < width; ++d) lane_at<NV>(x, width, i, d) = 0.0f;
  };
  for (int64_t l = 0; l < a.depth; ++l) {
    clear(keys.input[l], a.width[l]), clear(keys.delta[l], a.width[l + 1]);
    keys.input_square[l][i] = keys.delta_square[l][i] = 0.0f;
    if (l + 1 < a.depth) clear(keys.first[l], a.width[l + 1]);
    if (l + 1 < a.depth) clear(keys.second[l], a.width[l + 1]);
  }
  clear(keys.inside, a.width[a.depth]);
  keys.rate[i] = 0.0f, keys.kappa[i] = keys.kappa_slope[i] = 0.0f;
}

// Whether what a token adds to the weights is finite.
template <int NV>
static bool is_finite(const MemoryArgs& a, int64_t i, const ChunkKeys<NV>& keys) {
  auto is_sound = [](float x) { return x - x == 0.0f; };
  bool sound = is_sound(keys.rate[i]);
  for (int64_t l = 0; l < a.depth; ++l) {
    const int64_t K = a.width[l], M = a.width[l + 1];
    for (int64_t d = 0; d < K; ++d) sound &= is_sound(lane_at<NV>(keys.input[l], K, i, d));
    for (int64_t d = 0; d < M; ++d)
      sound &= is_sound(keys.rate[i] * lane_at<NV>(keys.delta[l], M, i, d));
  }
  return sound;
}

// The gradients of a chunk's tokens at the weights w. Returns how many were skipped.
template <int NV, bool BACKWARD>
static int64_t key_pass(const MemoryArgs& a, int64_t row, int64_t b, int64_t h,
                        const ChunkTokens& t, const MemoryWeights& w, const ChunkKeys<NV>& keys,
                        float* values, float* rows) {
  const int64_t N = a.depth, Dv = a.width[N], vectors = t.panels * NV;
  load_tokens<NV>(a.key, b, h, t, a.width[0], rows, keys.input[0]);
  load_tokens<NV>(a.value, b, h, t, Dv, rows, values);
  for (int64_t l = 0; l < N; ++l) {
    float* to = l + 1 < N ? keys.input[l + 1] : keys.delta[l];
    forth<NV, Store::set>(t, a.width[l + 1], a.width[l], w.W[l], keys.input[l], to);
    if (l + 1 < N)
      activate<BACKWARD ? 2 : 1>(a.is_silu, vectors * a.width[l + 1], to, keys.first[l],
                                 keys.second[l]);
  }
  each_vector<NV>(t, Dv, [&](int64_t i, int64_t) {
    vf e = ((const vf*)keys.delta[N - 1])[i];
    if (a.residual) e += ((const vf*)keys.input[0])[i];
    e -= ((const vf*)values)[i];
    if (a.is_huber) {
      const float delta = a.huber_delta;
      const vi above = e > delta, below = e < -delta;
      if (BACKWARD)
        ((vf*)keys.inside)[i] = select(above | below, vf{}, broadcast(1.0f));
      e = select(above, broadcast(delta), select(below, broadcast(-delta), e));
    }
    ((vf*)keys.delta[N - 1])[i] = e;
  });
  for (int64_t l = N - 2; l >= 0; --l) {
    float* delta = keys.delta[l];
    back<NV, Store::set>(t, a.width[l + 2], a.width[l + 1], w.W[l + 1], keys.delta[l + 1], delta);
    for (int64_t i = 0; i < vectors * a.width[l + 1]; ++i) {
      const vf before = ((const vf*)delta)[i];
      ((vf*)delta)[i] = ((const vf*)keys.first[l])[i] * before;
      if (BACKWARD) ((vf*)keys.second[l])[i] *= before;
    }
  }

  load_scalars(a.lr, b, h, t, 0.0f, keys.lr);
  load_scalars(a.decay, b, h, t, 0.0f, keys.decay);
  load_scalars(a.momentum, b, h, t, 0.0f, keys.momentum);
  for (int64_t l = 0; l < N; ++l) {
    for (int64_t i = 0; i < t.lanes; ++i) keys.input_square[l][i] = keys.delta_square[l][i] = 0.0f;
    add_lane_products<NV>(t, a.width[l], keys.input[l], keys.input[l], keys.input_square[l]);
    add_lane_products<NV>(t, a.width[l + 1], keys.delta[l], keys.delta[l], keys.delta_square[l]);
  }
  int64_t skipped = 0;
  for (int64_t i = 0; i < t.lanes; ++i) {
    double square = 0.0;
    for (int64_t l = 0; l < N; ++l)
      square += (double)keys.input_square[l][i] * (double)keys.delta_square[l][i];
    const double norm = __builtin_sqrt(square);
    const bool is_new = i >= t.pending && i < t.n;
    keys.kappa[i] = 1.0f, keys.kappa_slope[i] = 0.0f;
    if (a.max_norm > 0.0) clamp_of(a, norm, keys.kappa[i], keys.kappa_slope[i]);
    keys.rate[i] = keys.lr[i] * keys.kappa[i];
    if (!BACKWARD && is_new)
      a.surprise[(b * a.H + h) * a.T + t.first + i - t.pending] = (float)norm;
    if (is_new && a.skips_nonfinite && !(norm <= (double)__FLT_MAX__)) {
      skip_token<NV>(a, i, keys);
      ++skipped;
    } else if (is_new && !(__builtin_fabs(norm * keys.rate[i]) <= (double)__FLT_MAX__) &&
               !is_finite<NV>(a, i, keys)) {
      // the weights from here on are NaN; as a factor it would reach earlier tokens as 0 * NaN
      skip_token<NV>(a, i, keys);
      keys.decay[i] = __builtin_nanf("");
      if (a.has_momentum) keys.momentum[i] = __builtin_nanf("");
    }
  }
  for (int64_t l = 0; l < N; ++l)
    scale_lanes<NV>(t, a.width[l + 1], keys.delta[l], keys.rate, keys.scaled[l]);
  load_pending<NV>(a, row, h, t, keys);
  for (int64_t l = 0; l < N; ++l)
    from_panels(keys.input[l], NV * VL, t.lanes, a.width[l], row_stride(a.width[l]),
                keys.input_rows[l]);
  return skipped;
}

// beta, sigma, mu, c and m of a chunk, by recurrence.
template <int NV>
static void coefficients(const MemoryArgs& a, const ChunkTokens& t, const ChunkKeys<NV>& keys) {
  constexpr int PL = NV * VL;
  float beta = 1.0f, sigma = 0.0f, mu = 1.0f;
  for (int64_t j = 0; j < t.lanes; ++j) {
    const float kept = 1.0f - keys.decay[j], eta = keys.momentum[j];
    beta *= kept, mu *= eta, sigma = kept * sigma + mu;
    keys.beta[j] = beta, keys.sigma[j] = sigma, keys.mu[j] = mu;
    for (int64_t p = 0; p < t.panels; ++p) {
      const int64_t at = (p * t.lanes + j) * PL;
      vf *c = (vf*)(keys.c + at), *m = (vf*)(keys.m + at);
      for (int v = 0; v < NV; ++v) {
        const bool is_first = j == 0;
        if (j >= t.n) c[v] = vf{};
        else c[v] = is_first ? vf{} : kept * (c - NV)[v];
        if (!a.has_momentum) continue;
        m[v] = is_first || j >= t.n ? vf{} : eta * (m - NV)[v];
        c[v] += m[v];
      }
      if (p == j / PL && j < t.n) {
        keys.c[at + j % PL] += 1.0f;
        if (a.has_momentum) keys.m[at + j % PL] += 1.0f;
      }
    }
  }
}

// Tokens' coefficients in the weights at the end of the chunk: row n - 1 of c or m, and 0 behind.
template <int NV>
static void last_row(const ChunkTokens& t, const float* pairs, float factor, float* to) {
  constexpr int PL = NV * VL;
  for (int64_t i = 0; i < t.lanes; ++i)
    to[i] = factor * pairs[(i / PL * t.lanes + t.n - 1) * PL + i % PL];
}

// The weights behind a full chunk; `to` may be `from`.
template <int NV>
static void end_of_chunk(const MemoryArgs& a, const ChunkTokens& t, const MemoryWeights& from,
                         const ChunkKeys<NV>& keys, const MemoryWeights& to, float* factors,
                         float* scaled) {
  const int64_t last = t.n - 1;
  const float beta = keys.beta[last], sigma = keys.sigma[last], mu = keys.mu[last];
  for (int64_t l = 0; l < a.depth; ++l) {
    const int64_t K = a.width[l], M = a.width[l + 1], n = MemoryWeights::floats(a, l) / VL;
    for (int64_t i = 0; i < n; ++i) {
      vf weight = beta * ((const vf*)from.W[l])[i];
      if (a.has_momentum) {
        const vf speed = ((const vf*)from.S[l])[i];
        weight = fma(speed, sigma, weight);
        ((vf*)to.S[l])[i] = mu * speed;
      }
      ((vf*)to.W[l])[i] = weight;
    }
    last_row<NV>(t, keys.c, -1.0f, factors);
    scale_lanes<NV>(t, M, keys.scaled[l], factors, scaled);
    add_outer<NV>(t, M, K, scaled, keys.input_rows[l], to.W[l]);
    if (!a.has_momentum) continue;
    last_row<NV>(t, keys.m, -1.0f, factors);
    scale_lanes<NV>(t, M, keys.scaled[l], factors, scaled);
    add_outer<NV>(t, M, K, scaled, keys.input_rows[l], to.S[l]);
  }
}

// What the queries of a chunk read.
template <int NV>
struct ChunkReads {
  float *input[MEMORY_DEPTH], *input_rows[MEMORY_DEPTH];  // of layer l, the second as rows
  float* first[MEMORY_DEPTH];                             // phi' of its outputs
  float *scaled, *pairs, *rows;                           // scratch
  float* out;

  static ChunkReads take(const MemoryArgs& a, bool is_backward, Arena& arena) {
    const int64_t lanes = round_up(a.chunk, NV * VL);
    ChunkReads r{};
    for (int64_t l = 0; l < a.depth; ++l) {
      r.input[l] = arena.take(a.width[l] * lanes);
      if (!is_backward) continue;
      r.input_rows[l] = arena.take(row_stride(a.width[l]) * lanes);
      if (l + 1 < a.depth) r.first[l] = arena.take(a.width[l + 1] * lanes);
    }
    r.scaled = arena.take(a.most_width() * lanes), r.pairs = arena.take(lanes * lanes);
    r.rows = arena.take(row_stride(a.most_width()) * lanes);
    r.out = arena.take(a.width[a.depth] * lanes);
    return r;
  }
};

template <int NV, bool BACKWARD>
static void read_pass(const MemoryArgs& a, int64_t b, int64_t h, const ChunkTokens& t,
                      const MemoryWeights& w, const ChunkKeys<NV>& keys,
                      const ChunkReads<NV>& reads) {
  const int64_t N = a.depth;
  load_tokens<NV>(a.query, b, h, t, a.width[0], reads.rows, reads.input[0]);
  if (!a.reads_chunk) turn_pairs<NV>(t, -1.0f, keys.c, keys.c_turned);
  for (int64_t l = 0; l < N; ++l) {
    const int64_t K = a.width[l], M = a.width[l + 1];
    const float* x = reads.input[l];
    float* to = l + 1 < N ? reads.input[l + 1] : reads.out;
    if (BACKWARD)
      from_panels(x, NV * VL, t.lanes, K, row_stride(K), reads.input_rows[l]);
    if (BACKWARD && l + 1 == N) return;
    if (a.reads_chunk) {
      forth<NV, Store::set>(t, M, K, w.W[l], x, to);
    } else {
      scale_lanes<NV>(t, K, x, keys.beta, reads.scaled);
      if (a.has_momentum) {
        forth<NV, Store::set>(t, M, K, w.S[l], x, to);
        forth<NV, Store::scale_add>(t, M, K, w.W[l], reads.scaled, to, keys.sigma);
      } else {
        forth<NV, Store::set>(t, M, K, w.W[l], reads.scaled, to);
      }
      pair_products<NV, false>(t, K, keys.input[l], x, reads.pairs);
      for (int64_t p = 0; p < t.panels; ++p) {
        constexpr int PL = NV * VL;
        const int64_t at = p * t.lanes * PL / VL;
        for (int64_t i = at; i < at + (p + 1) * PL * NV; ++i)
          ((vf*)reads.pairs)[i] *= ((const vf*)keys.c_turned)[i];
      }
      add_pairs<NV, false>(t, M, keys.scaled[l], reads.pairs, to);
    }
    if (l + 1 < N) {
      activate<BACKWARD ? 1 : 0>(a.is_silu, t.panels * NV * M, to, reads.first[l], nullptr);
    } else {
      if (a.residual)
        each_vector<NV>(t, M, [&](int64_t i, int64_t) {
          ((vf*)to)[i] += ((const vf*)reads.input[0])[i];
        });
      store_tokens<NV>(a.out, b, h, t, M, to, reads.rows);
    }
  }
}

// Everything of the open chunk that the state keeps.
template <int NV>
static void store_pending(const MemoryArgs& a, int64_t row, int64_t h, const ChunkTokens& t,
                          const ChunkKeys<NV>& keys) {
  const int64_t head = (row * a.H + h) * (a.chunk - 1);
  for (int64_t i = 0; i < a.chunk - 1; ++i) {
    float *input = a.end_h + (head + i) * a.inputs_width();
    float *delta = a.end_delta + (head + i) * a.outputs_width();
    const bool is_there = i < t.n;
    for (int64_t l = 0; l < a.depth; ++l) {
      const int64_t K = a.width[l], M = a.width[l + 1];
      for (int64_t d = 0; d < K; ++d)
        input[d] = is_there ? lane_at<NV>(keys.input[l], K, i, d) : 0.0f;
      for (int64_t d = 0; d < M; ++d)
        delta[d] = is_there ? lane_at<NV>(keys.scaled[l], M, i, d) : 0.0f;
      input += K, delta += M;
    }
    a.end_decay[head + i] = is_there ? keys.decay[i] : 0.0f;
    a.end_eta[head + i] = is_there ? keys.momentum[i] : 0.0f;
  }
}

// Scratch of the forward of one head.
template <int NV>
struct MemoryForward {
  MemoryWeights w;
  ChunkKeys<NV> keys;
  ChunkReads<NV> reads;
  float *values, *factors;

  MemoryForward(const MemoryArgs& a, Arena& arena)
      : w(MemoryWeights::take(a, arena)), keys(ChunkKeys<NV>::take(a, false, arena)),
        reads(ChunkReads<NV>::take(a, false, arena)) {
    const int64_t lanes = round_up(a.chunk, NV * VL);
    values = arena.take(a.width[a.depth] * lanes), factors = arena.take(lanes);
  }
};

template <int NV>
static void forward_head(const MemoryArgs& a, int64_t row, int64_t h, float* scratch) {
  Arena arena{scratch};
  const MemoryForward<NV> own(a, arena);
  const MemoryRow tokens(a, row);
  const int64_t chunks = tokens.chunks(a), head = row * a.H + h;
  own.w.load(a, a.start_of(row, h), a.momentum_of(row, h));
  ChunkTokens open{};
  int64_t skipped = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    const ChunkTokens t = tokens.chunk(a, i, NV * VL);
    if (i > 0 && i % a.group == 0 && a.checkpoints) {
      float* to = a.checkpoint_of(tokens.b, tokens.slot(a, i / a.group), h);
      own.w.store(a, to, to + a.weights_size());
    }
    skipped += key_pass<NV, false>(a, row, tokens.b, h, t, own.w, own.keys, own.values,
                                   own.reads.rows);
    coefficients<NV>(a, t, own.keys);
    read_pass<NV, false>(a, tokens.b, h, t, own.w, own.keys, own.reads);
    if (!t.is_full) open = t;
    else if (a.end_weights || i + 1 < chunks)
      end_of_chunk<NV>(a, t, own.w, own.keys, own.w, own.factors, own.reads.scaled);
  }
  a.skipped_of[head] = skipped;
  if (!a.end_weights) return;
  own.w.store(a, a.end_weights + head * a.weights_size(), a.end_momentum + head * a.weights_size());
  store_pending<NV>(a, row, h, open, own.keys);
  if (h == 0) a.end_count[row] = (int32_t)open.n;
}
