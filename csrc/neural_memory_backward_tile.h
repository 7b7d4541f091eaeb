// Neural memory, the backward of one head of one sequence: chunks in reverse, with the gradients of
// weights and momentum carried. A group of chunks is computed again from its checkpoint.
//
// Included once per instruction set after neural_memory_tile.h. Definition: memattn/reference/neural_memory.py.

// Gradients of the factors and coefficients of one chunk, and scratch.
template <int NV>
struct ChunkGrads {
  float *input[MEMORY_DEPTH], *scaled[MEMORY_DEPTH];  // of ChunkKeys' own
  float *beta, *sigma, *decay, *momentum, *lr;        // by lane
  float *last_c, *last_m;                             // of the end's coefficients, by lane
  float beta_end, sigma_end, mu_end;
  float *c, *m;                                       // [panel of i][j][i]
  float *pairs, *masked, *turned;                     // the same, scratch
  float *out, *wide, *other, *rows;                   // activations, scratch
  float* factors;

  static ChunkGrads take(const MemoryArgs& a, Arena& arena) {
    const int64_t lanes = round_up(a.chunk, NV * VL), widest = a.most_width() * lanes;
    ChunkGrads g{};
    for (int64_t l = 0; l < a.depth; ++l) {
      g.input[l] = arena.take(a.width[l] * lanes);
      g.scaled[l] = arena.take(a.width[l + 1] * lanes);
    }
    for (float** one : {&g.beta, &g.sigma, &g.decay, &g.momentum, &g.lr, &g.last_c, &g.last_m,
                        &g.factors})
      *one = arena.take(lanes);
    for (float** one : {&g.c, &g.m, &g.pairs, &g.masked, &g.turned})
      *one = arena.take(lanes * lanes);
    for (float** one : {&g.out, &g.wide, &g.other}) *one = arena.take(widest);
    g.rows = arena.take(row_stride(a.most_width()) * lanes);
    return g;
  }
};

static void fill(float* x, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i) x[i] = value;
}

// sum of x y over `vectors` vectors
static float total_product(int64_t vectors, const float* x, const float* y) {
  vf sum[4] = {};
  int64_t i = 0;
  for (; i + 4 <= vectors; i += 4)
    for (int k = 0; k < 4; ++k) sum[k] = fma(((const vf*)x)[i + k], ((const vf*)y)[i + k], sum[k]);
  for (; i < vectors; ++i) sum[0] = fma(((const vf*)x)[i], ((const vf*)y)[i], sum[0]);
  const vf all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  float total = 0.0f;
  for (int k = 0; k < VL; ++k) total += all[k];
  return total;
}

// The end of a full chunk: `d` comes with the gradients of what follows and leaves with those of
// the chunk's start, as far as they take this way.
template <int NV>
static void end_backward(const MemoryArgs& a, const ChunkTokens& t, const MemoryWeights& w,
                         const MemoryWeights& d, const ChunkKeys<NV>& keys, ChunkGrads<NV>& g) {
  const int64_t last = t.n - 1;
  const float beta = keys.beta[last], sigma = keys.sigma[last], mu = keys.mu[last];
  for (int64_t l = 0; l < a.depth; ++l) {
    const int64_t K = a.width[l], M = a.width[l + 1], n = MemoryWeights::floats(a, l) / VL;
    // of scaled: -(c dW + m dS) input, of c and m: the products with scaled
    auto pass = [&](const float* weights, const float* pairs, float* sums, bool is_first) {
      last_row<NV>(t, pairs, -1.0f, g.factors);
      forth<NV, Store::set>(t, M, K, weights, keys.input[l], g.wide);
      add_lane_products<NV>(t, M, g.wide, keys.scaled[l], sums);
      each_vector<NV>(t, M, [&](int64_t i, int64_t lane) {
        const vf factor = ((const vf*)g.factors)[lane], from = ((const vf*)g.wide)[i] * factor;
        vf& to = ((vf*)g.scaled[l])[i];
        to = is_first ? from : to + from;
        ((vf*)g.other)[i] = ((const vf*)keys.scaled[l])[i] * factor;
      });
      if (is_first) back<NV, Store::set>(t, M, K, weights, g.other, g.input[l]);
      else back<NV, Store::add>(t, M, K, weights, g.other, g.input[l]);
    };
    pass(d.W[l], keys.c, g.last_c, true);
    g.beta_end += total_product(n, d.W[l], w.W[l]);
    if (a.has_momentum) {
      pass(d.S[l], keys.m, g.last_m, false);
      g.sigma_end += total_product(n, d.W[l], w.S[l]);
      g.mu_end += total_product(n, d.S[l], w.S[l]);
    }
    for (int64_t i = 0; i < n; ++i) {
      vf& weight = ((vf*)d.W[l])[i];
      if (a.has_momentum) ((vf*)d.S[l])[i] = fma(weight, sigma, mu * ((vf*)d.S[l])[i]);
      weight *= beta;
    }
  }
}

// What the queries of a chunk read.
template <int NV>
static void read_backward(const MemoryArgs& a, int64_t b, int64_t h, const ChunkTokens& t,
                          const MemoryWeights& w, const MemoryWeights& d,
                          const ChunkKeys<NV>& keys, const ChunkReads<NV>& reads,
                          ChunkGrads<NV>& g) {
  constexpr int PL = NV * VL;
  const int64_t N = a.depth;
  float *d_out = reads.out, *own = d_out;
  load_tokens<NV>(a.d_out, b, h, t, a.width[N], g.rows, d_out);
  for (int64_t l = N - 1; l >= 0; --l) {
    const int64_t K = a.width[l], M = a.width[l + 1];
    if (l + 1 < N)
      for (int64_t i = 0; i < t.panels * NV * M; ++i)
        ((vf*)own)[i] *= ((const vf*)reads.first[l])[i];
    float* to = own == g.out ? g.wide : g.out;  // the gradient of layer l's inputs
    if (a.reads_chunk) {
      add_outer<NV>(t, M, K, own, reads.input_rows[l], d.W[l]);
      back<NV, Store::set>(t, M, K, w.W[l], own, to);
    } else {
      scale_lanes<NV>(t, M, own, keys.beta, g.other);
      add_outer<NV>(t, M, K, g.other, reads.input_rows[l], d.W[l]);
      if (a.has_momentum) {
        scale_lanes<NV>(t, M, own, keys.sigma, g.other);
        add_outer<NV>(t, M, K, g.other, reads.input_rows[l], d.S[l]);
      }
      back<NV, Store::set>(t, M, K, w.W[l], own, to);
      add_lane_products<NV>(t, K, to, reads.input[l], g.beta);
      if (a.has_momentum) {
        back<NV, Store::set>(t, M, K, w.S[l], own, g.other);
        add_lane_products<NV>(t, K, g.other, reads.input[l], g.sigma);
      }
      each_vector<NV>(t, K, [&](int64_t i, int64_t lane) {
        vf& at = ((vf*)to)[i];
        at *= ((const vf*)keys.beta)[lane];
        if (a.has_momentum) at = fma(((const vf*)g.other)[i], ((const vf*)keys.sigma)[lane], at);
      });
      // pairs: <input, query input>; of these: -c <delta, own>; of c: -pairs <delta, own>
      pair_products<NV, true>(t, K, reads.input[l], keys.input[l], g.pairs);
      pair_products<NV, true>(t, M, own, keys.scaled[l], g.masked);
      for (int64_t p = 0; p < t.panels; ++p)
        for (int64_t i = (p * t.lanes + p * PL) * NV; i < (p + 1) * t.lanes * NV; ++i) {
          const vf pair = ((const vf*)g.pairs)[i], product = -((const vf*)g.masked)[i];
          const vf c = ((const vf*)keys.c)[i];
          ((vf*)g.c)[i] = fma(pair, product, ((const vf*)g.c)[i]);
          ((vf*)g.masked)[i] = c * product;
          ((vf*)g.pairs)[i] = -(c * pair);
        }
      add_pairs<NV, true>(t, M, own, g.pairs, g.scaled[l]);
      add_pairs<NV, true>(t, K, reads.input[l], g.masked, g.input[l]);
      turn_pairs<NV>(t, 1.0f, g.masked, g.turned);
      add_pairs<NV, false>(t, K, keys.input[l], g.turned, to);
    }
    own = to;
  }
  if (a.residual)
    for (int64_t i = 0; i < t.panels * NV * a.width[0]; ++i)
      ((vf*)own)[i] += ((const vf*)d_out)[i];
  store_tokens<NV>(a.d_query, b, h, t, a.width[0], own, g.rows);
}

// Reverse recurrences: gradients of decay and momentum from those of the coefficients.
template <int NV>
static void coefficients_backward(const MemoryArgs& a, const ChunkTokens& t,
                                  const ChunkKeys<NV>& keys, bool has_end, ChunkGrads<NV>& g) {
  constexpr int PL = NV * VL;
  float beta = has_end ? g.beta_end : 0.0f, sigma = has_end ? g.sigma_end : 0.0f;
  float mu = has_end ? g.mu_end : 0.0f;
  for (int64_t j = t.n - 1; j >= 0; --j) {
    const bool is_last = j == t.n - 1;
    const float kept = 1.0f - keys.decay[j], eta = keys.momentum[j];
    vf of_decay{}, of_momentum{};
    for (int64_t p = 0; p <= j / PL; ++p)
      for (int v = 0; v < NV; ++v) {
        const int64_t at = (p * t.lanes + j) * NV + v;
        vf c = ((vf*)g.c)[at], m{};
        if (is_last && has_end) c -= ((const vf*)g.last_c)[p * NV + v];
        if (a.has_momentum) {
          m = ((vf*)g.m)[at] + c;
          if (is_last && has_end) m -= ((const vf*)g.last_m)[p * NV + v];
        }
        if (j == 0) continue;
        of_decay = fma(((const vf*)keys.c)[at - NV], c, of_decay);
        ((vf*)g.c)[at - NV] = fma(c, kept, ((vf*)g.c)[at - NV]);
        if (!a.has_momentum) continue;
        of_momentum = fma(((const vf*)keys.m)[at - NV], m, of_momentum);
        ((vf*)g.m)[at - NV] = fma(m, eta, ((vf*)g.m)[at - NV]);
      }
    float d_decay = 0.0f, d_momentum = 0.0f;
    for (int k = 0; k < VL; ++k) d_decay += of_decay[k], d_momentum += of_momentum[k];
    beta += g.beta[j], sigma += g.sigma[j], mu += sigma;
    d_decay += (j ? keys.beta[j - 1] : 1.0f) * beta + (j ? keys.sigma[j - 1] : 0.0f) * sigma;
    d_momentum += (j ? keys.mu[j - 1] : 1.0f) * mu;
    g.decay[j] -= d_decay, g.momentum[j] += d_momentum;
    beta *= kept, sigma *= kept, mu *= eta;
  }
}

// Gradients of the open chunk's tokens in the state at the start, whose lanes then are 0.
template <int NV>
static void store_pending_grads(const MemoryArgs& a, int64_t row, int64_t h, const ChunkTokens& t,
                                const ChunkGrads<NV>& g) {
  const int64_t head = (row * a.H + h) * (a.chunk - 1);
  for (int64_t i = 0; i < t.pending; ++i) {
    float *input = a.d_pending_h + (head + i) * a.inputs_width();
    float *delta = a.d_pending_delta + (head + i) * a.outputs_width();
    auto take = [&](float* x, int64_t width, float*& to) {
      for (int64_t d = 0; d < width; ++d) {
        float& at = lane_at<NV>(x, width, i, d);
        *to++ = at, at = 0.0f;
      }
    };
    for (int64_t l = 0; l < a.depth; ++l)
      take(g.input[l], a.width[l], input), take(g.scaled[l], a.width[l + 1], delta);
    a.d_pending_decay[head + i] = g.decay[i];
    a.d_pending_eta[head + i] = a.has_momentum ? g.momentum[i] : 0.0f;
  }
}

// The gradients of an open chunk's factors that the state at the end has.
template <int NV>
static void load_pending_grads(const MemoryArgs& a, int64_t row, int64_t h, const ChunkTokens& t,
                               const ChunkGrads<NV>& g) {
  const int64_t head = (row * a.H + h) * (a.chunk - 1);
  auto take = [&](const float* from, int64_t width, float* const* to, int shift) {
    if (!from) return;
    for (int64_t i = 0; i < t.n; ++i) {
      const float* own = from + (head + i) * width;
      for (int64_t l = 0; l < a.depth; own += a.width[l + shift], ++l)
        for (int64_t d = 0; d < a.width[l + shift]; ++d)
          lane_at<NV>(to[l], a.width[l + shift], i, d) = own[d];
    }
  };
  take(a.d_end_h, a.inputs_width(), g.input, 0);
  take(a.d_end_delta, a.outputs_width(), g.scaled, 1);
  for (int64_t i = 0; i < t.n; ++i) {
    if (a.d_end_decay) g.decay[i] = a.d_end_decay[head + i];
    if (a.d_end_eta) g.momentum[i] = a.d_end_eta[head + i];
  }
}

// The pass over the keys.
template <int NV>
static void key_backward(const MemoryArgs& a, int64_t b, int64_t h, const ChunkTokens& t,
                         const MemoryWeights& w, const MemoryWeights& d,
                         const ChunkKeys<NV>& keys, ChunkGrads<NV>& g) {
  const int64_t N = a.depth, Dv = a.width[N], vectors = t.panels * NV;
  fill(g.lr, t.lanes, 0.0f);
  for (int64_t l = 0; l < N; ++l)
    add_lane_products<NV>(t, a.width[l + 1], g.scaled[l], keys.delta[l], g.lr);
  for (int64_t i = 0; i < t.lanes; ++i) {
    g.factors[i] = keys.lr[i] * g.lr[i] * keys.kappa_slope[i];
    g.lr[i] *= keys.kappa[i];
  }
  for (int64_t l = 0; l < N; ++l) {
    const bool is_clamped = a.max_norm > 0.0;
    each_vector<NV>(t, a.width[l + 1], [&](int64_t i, int64_t lane) {
      vf& at = ((vf*)g.scaled[l])[i];
      at *= ((const vf*)keys.rate)[lane];
      if (is_clamped)
        at = fma(((const vf*)g.factors)[lane] * ((const vf*)keys.input_square[l])[lane],
                 ((const vf*)keys.delta[l])[i], at);
    });
    if (is_clamped)
      each_vector<NV>(t, a.width[l], [&](int64_t i, int64_t lane) {
        vf& at = ((vf*)g.input[l])[i];
        at = fma(((const vf*)g.factors)[lane] * ((const vf*)keys.delta_square[l])[lane],
                 ((const vf*)keys.input[l])[i], at);
      });
  }
  // from here on g.scaled[l] is the gradient of delta, then that of layer l's outputs
  for (int64_t l = 0; l + 1 < N; ++l) {
    const int64_t K = a.width[l + 1], M = a.width[l + 2];
    for (int64_t i = 0; i < vectors * K; ++i) {
      vf& at = ((vf*)g.scaled[l])[i];
      ((vf*)g.wide)[i] = ((const vf*)keys.first[l])[i] * at;
      at *= ((const vf*)keys.second[l])[i];
    }
    forth<NV, Store::add>(t, M, K, w.W[l + 1], g.wide, g.scaled[l + 1]);
    from_panels(g.wide, NV * VL, t.lanes, K, row_stride(K), g.rows);
    add_outer<NV>(t, M, K, keys.delta[l + 1], g.rows, d.W[l + 1]);
  }
  float* error = g.scaled[N - 1];
  for (int64_t i = 0; i < vectors * Dv; ++i) {
    if (a.is_huber) ((vf*)error)[i] *= ((const vf*)keys.inside)[i];
    ((vf*)g.out)[i] = -((const vf*)error)[i];
    if (a.residual) ((vf*)g.input[0])[i] += ((const vf*)error)[i];
  }
  store_tokens<NV>(a.d_value, b, h, t, Dv, g.out, g.rows);
  for (int64_t l = N - 1; l >= 0; --l) {
    const int64_t K = a.width[l], M = a.width[l + 1];
    add_outer<NV>(t, M, K, g.scaled[l], keys.input_rows[l], d.W[l]);
    back<NV, Store::add>(t, M, K, w.W[l], g.scaled[l], g.input[l]);
    if (l > 0)
      for (int64_t i = 0; i < vectors * K; ++i)
        ((vf*)g.scaled[l - 1])[i] =
            fma(((const vf*)keys.first[l - 1])[i], ((const vf*)g.input[l])[i],
                ((const vf*)g.scaled[l - 1])[i]);
  }
  store_tokens<NV>(a.d_key, b, h, t, a.width[0], g.input[0], g.rows);
  for (int64_t i = t.pending; i < t.n; ++i) {
    const int64_t token = t.first + i - t.pending;
    store(a.d_lr, token_at(a.d_lr, b, h, token), g.lr[i]);
    if (a.decay.data) store(a.d_decay, token_at(a.d_decay, b, h, token), g.decay[i]);
    if (a.has_momentum) store(a.d_momentum, token_at(a.d_momentum, b, h, token), g.momentum[i]);
  }
}

// Scratch of the backward of one head: the weights at the start of each chunk of a group too.
template <int NV>
struct MemoryBackward {
  MemoryWeights d;
  ChunkKeys<NV> keys;
  ChunkReads<NV> reads;
  ChunkGrads<NV> grads;
  float* values;
  MemoryWeights* starts;

  MemoryBackward(const MemoryArgs& a, Arena& arena)
      : d(MemoryWeights::take(a, arena)), keys(ChunkKeys<NV>::take(a, true, arena)),
        reads(ChunkReads<NV>::take(a, true, arena)), grads(ChunkGrads<NV>::take(a, arena)) {
    values = arena.take(a.width[a.depth] * round_up(a.chunk, NV * VL));
    starts = (MemoryWeights*)arena.take(a.group * sizeof(MemoryWeights) / sizeof(float));
    for (int64_t i = 0; i < a.group; ++i) {
      const MemoryWeights own = MemoryWeights::take(a, arena);
      if (arena.base) starts[i] = own;
    }
  }
};

template <int NV>
static void chunk_backward(const MemoryArgs& a, int64_t row, int64_t b, int64_t h,
                           const ChunkTokens& t, bool has_end, const MemoryWeights& w,
                           MemoryBackward<NV>& own) {
  ChunkGrads<NV>& g = own.grads;
  const int64_t pairs = t.lanes * t.lanes;
  key_pass<NV, true>(a, row, b, h, t, w, own.keys, own.values, own.reads.rows);
  coefficients<NV>(a, t, own.keys);
  read_pass<NV, true>(a, b, h, t, w, own.keys, own.reads);
  for (float* one : {g.beta, g.sigma, g.decay, g.momentum, g.last_c, g.last_m})
    fill(one, t.lanes, 0.0f);
  fill(g.c, pairs, 0.0f), fill(g.m, pairs, 0.0f);
  g.beta_end = g.sigma_end = g.mu_end = 0.0f;
  if (has_end) {
    end_backward<NV>(a, t, w, own.d, own.keys, g);
  } else {
    for (int64_t l = 0; l < a.depth; ++l) {
      fill(g.input[l], a.width[l] * t.lanes, 0.0f);
      fill(g.scaled[l], a.width[l + 1] * t.lanes, 0.0f);
    }
    if (!t.is_full) load_pending_grads<NV>(a, row, h, t, g);
  }
  if (a.d_out.data) read_backward<NV>(a, b, h, t, w, own.d, own.keys, own.reads, g);
  coefficients_backward<NV>(a, t, own.keys, has_end, g);
  if (t.pending) store_pending_grads<NV>(a, row, h, t, g);
  key_backward<NV>(a, b, h, t, w, own.d, own.keys, g);
}

template <int NV>
static void backward_head(const MemoryArgs& a, int64_t row, int64_t h, float* scratch) {
  Arena arena{scratch};
  MemoryBackward<NV> own(a, arena);
  const MemoryRow tokens(a, row);
  const int64_t chunks = tokens.chunks(a), at = (row * a.H + h) * a.weights_size();
  const bool has_end_grads = a.d_end_weights || a.d_end_momentum;
  own.d.load(a, a.d_end_weights ? a.d_end_weights + at : nullptr,
             a.d_end_momentum ? a.d_end_momentum + at : nullptr);
  for (int64_t group = (chunks - 1) / a.group; chunks > 0 && group >= 0; --group) {
    const int64_t first = group * a.group;
    const int64_t n = chunks - first < a.group ? chunks - first : a.group;
    if (group == 0) {
      own.starts[0].load(a, a.start_of(row, h), a.momentum_of(row, h));
    } else {
      const float* from = a.checkpoint_of(tokens.b, tokens.slot(a, group), h);
      own.starts[0].load(a, from, from + a.weights_size());
    }
    for (int64_t i = 0; i + 1 < n; ++i) {
      const ChunkTokens t = tokens.chunk(a, first + i, NV * VL);
      key_pass<NV, true>(a, row, tokens.b, h, t, own.starts[i], own.keys, own.values,
                         own.reads.rows);
      coefficients<NV>(a, t, own.keys);
      end_of_chunk<NV>(a, t, own.starts[i], own.keys, own.starts[i + 1], own.grads.factors,
                       own.grads.wide);
    }
    for (int64_t i = n - 1; i >= 0; --i) {
      const ChunkTokens t = tokens.chunk(a, first + i, NV * VL);
      const bool has_end = t.is_full && (first + i + 1 < chunks || has_end_grads);
      chunk_backward<NV>(a, row, tokens.b, h, t, has_end, own.starts[i], own);
    }
  }
  own.d.store(a, a.d_weights + at, a.d_start_momentum ? a.d_start_momentum + at : nullptr);
}
