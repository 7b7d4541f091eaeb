// Rows of a decoder's hidden states between its matrix products, for training: norms, rotations,
// gates and cross-entropy, forward and backward, each in one pass over memory.
//
// Included once per instruction set after neural_memory_step_tile.h.

static MEMATTN_INLINE float lane_sum(vf x) {
  float sum = 0.0f;
  for (int k = 0; k < VL; ++k) sum += x[k];
  return sum;
}

// 0 behind the first n floats
static MEMATTN_INLINE vf load_most(const float* x, int64_t n) {
  return n >= VL ? (vf) * (const vf_unaligned*)x : load_part(x, n);
}

static MEMATTN_INLINE void store_most(float* to, vf x, int64_t n) {
  if (n >= VL) *(vf_unaligned*)to = x;
  else __builtin_memcpy(to, &x, n * sizeof(float));
}

static float rows_norm(int64_t E, const float* x, const float* weight, float eps, float* out) {
  vf squares{};
  for (int64_t e = 0; e < E; e += VL) {
    const vf part = load_most(x + e, E - e);
    squares = fma(part, part, squares);
  }
  const float scale = 1.0f / __builtin_sqrtf(lane_sum(squares) / (float)E + eps);
  for (int64_t e = 0; e < E; e += VL)
    store_most(out + e, load_most(x + e, E - e) * scale * load_most(weight + e, E - e), E - e);
  return scale;
}

static void rows_norm_again(int64_t E, const float* x, const float* weight, float scale, float* out) {
  for (int64_t e = 0; e < E; e += VL)
    store_most(out + e, load_most(x + e, E - e) * scale * load_most(weight + e, E - e), E - e);
}

static void rows_norm_backward(int64_t E, const float* d_out, const float* x, const float* weight,
                               float scale, const float* residual, float* d_x, float* d_weight) {
  vf along{};
  for (int64_t e = 0; e < E; e += VL) {
    const vf d = load_most(d_out + e, E - e), at = load_most(x + e, E - e);
    along = fma(d * load_most(weight + e, E - e), at, along);
    store_most(d_weight + e, fma(d, at * scale, load_most(d_weight + e, E - e)), E - e);
  }
  const float back = lane_sum(along) * scale * scale / (float)E;
  for (int64_t e = 0; e < E; e += VL) {
    const vf d = load_most(d_out + e, E - e) * load_most(weight + e, E - e);
    vf found = (d - load_most(x + e, E - e) * back) * scale;
    if (residual) found += load_most(residual + e, E - e);
    store_most(d_x + e, found, E - e);
  }
}

// Features d and d + D/2 turn by cos[d] and sign * sin[d]; x and out may be the same.
static void rows_rotate(int64_t D, const float* x, const float* cos, const float* sin, float sign,
                        float* out) {
  const int64_t half = D / 2;
  for (int64_t d = 0; d < half; d += VL) {
    const int64_t n = half - d;
    const vf first = load_most(x + d, n), second = load_most(x + d + half, n);
    const vf c = load_most(cos + d, n), s = load_most(sin + d, n) * sign;
    store_most(out + d, first * c - second * s, n);
    store_most(out + d + half, second * c + first * s, n);
  }
}

// 1 / (1 + exp(-x)) by exp(-|x|), which does not overflow
static MEMATTN_INLINE vf rows_sigmoid(vf x, const Split& log2e) {
  const vf size = x < 0.0f ? x : -x;
  const vf power = weight(greater(broadcast(-0x1p120f), size), log2e, vf{}, vf{});
  return (x < 0.0f ? power : broadcast(1.0f)) / (1.0f + power);
}

static void rows_gate(int64_t n, const float* gate, const float* up, float* to) {
  const Split log2e(1.4426950408889634);
  for (int64_t i = 0; i < n; i += VL) {
    const vf x = load_most(gate + i, n - i);
    store_most(to + i, x * rows_sigmoid(x, log2e) * load_most(up + i, n - i), n - i);
  }
}

static void rows_gate_backward(int64_t n, const float* d_out, const float* gate, const float* up,
                               float* d_gate, float* d_up, float* out) {
  const Split log2e(1.4426950408889634);
  for (int64_t i = 0; i < n; i += VL) {
    const vf d = load_most(d_out + i, n - i), x = load_most(gate + i, n - i);
    const vf times = load_most(up + i, n - i), sigmoid = rows_sigmoid(x, log2e), silu = x * sigmoid;
    store_most(out + i, silu * times, n - i);
    store_most(d_up + i, d * silu, n - i);
    store_most(d_gate + i, d * times * sigmoid * (1.0f + x * (1.0f - sigmoid)), n - i);
  }
}

// -log softmax(logits)[label]; the logits become its gradient.
static float rows_cross_entropy(int64_t V, int64_t label, float* logits) {
  const Split log2e(1.4426950408889634);
  vf highest = broadcast(-__builtin_inff());
  int64_t i = 0;
  for (; i + VL <= V; i += VL) highest = greater(*(const vf_unaligned*)(logits + i), highest);
  for (; i < V; ++i) highest[0] = logits[i] > highest[0] ? logits[i] : highest[0];
  float top = highest[0];
  for (int k = 1; k < VL; ++k) top = highest[k] > top ? highest[k] : top;
  const float picked = top - logits[label];
  vf sums{};
  for (i = 0; i < V; i += VL) {
    // finite, since the split scale would make NaN of an infinite logit
    const vf below = greater(broadcast(-0x1p120f), load_most(logits + i, V - i) - top);
    const vf power = weight(below, log2e, vf{}, vf{});
    store_most(logits + i, power, V - i);
    sums += V - i >= VL ? power : load_part(logits + i, V - i);
  }
  const float sum = lane_sum(sums), part = 1.0f / sum;
  for (i = 0; i < V; i += VL) store_most(logits + i, load_most(logits + i, V - i) * part, V - i);
  logits[label] -= 1.0f;
  return picked + __builtin_logf(sum);
}
