// The causal filter over tokens, with SiLU and unit vectors behind it, forward and backward.
//
// Included once per instruction set after training_rows_tile.h.

static constexpr float SHORTEST = 1e-12f;  // a shorter vector is divided by this, as torch does

static MEMATTN_INLINE vf filtered(const FilteredToken& t, int64_t f) {
  vf sum{};
  for (int64_t k = 0; k < t.taps; ++k)
    sum = fma(load_most(t.x - k * t.F + f, t.F - f), load_most(t.weight + k * t.F + f, t.F - f), sum);
  return sum;
}

// the length of a vector, at least SHORTEST
static MEMATTN_INLINE float length_of(const float* x, int64_t n) {
  vf squares{};
  for (int64_t i = 0; i < n; i += VL) {
    const vf part = load_most(x + i, n - i);
    squares = fma(part, part, squares);
  }
  const float length = __builtin_sqrtf(lane_sum(squares));
  return length > SHORTEST ? length : SHORTEST;
}

static void filter_forward(const FilteredToken& t, float* out) {
  const Split log2e(1.4426950408889634);
  for (int64_t f = 0; f < t.F; f += VL) {
    const vf x = filtered(t, f);
    store_most(out + f, x * rows_sigmoid(x, log2e), t.F - f);
  }
  for (int64_t h = 0; h < t.unit; h += t.head_dim) {
    const float length = length_of(out + h, t.head_dim);
    for (int64_t i = 0; i < t.head_dim; i += VL) {
      const int64_t n = t.head_dim - i;
      store_most(out + h + i, load_most(out + h + i, n) / length, n);
    }
  }
}

static void filter_backward(const FilteredToken& t, const float* d_out, float* work,
                            float* d_filtered, float* d_weight) {
  const Split log2e(1.4426950408889634);
  for (int64_t f = 0; f < t.F; f += VL) {
    const int64_t n = t.F - f;
    const vf x = filtered(t, f), sigmoid = rows_sigmoid(x, log2e);
    store_most(work + f, x * sigmoid, n);
    // the derivative of SiLU, until it is multiplied
    store_most(d_filtered + f, sigmoid * (1.0f + x * (1.0f - sigmoid)), n);
  }
  for (int64_t h = 0; h < t.unit; h += t.head_dim) {
    const float length = length_of(work + h, t.head_dim);
    vf along{};
    for (int64_t i = 0; i < t.head_dim; i += VL) {
      const int64_t n = t.head_dim - i;
      along = fma(load_most(d_out + h + i, n), load_most(work + h + i, n), along);
    }
    // the length of a vector shorter than SHORTEST is not followed
    const float back = length > SHORTEST ? lane_sum(along) / length / length : 0.0f;
    for (int64_t i = 0; i < t.head_dim; i += VL) {
      const int64_t n = t.head_dim - i, at = h + i;
      const vf d = (load_most(d_out + at, n) - load_most(work + at, n) * back) / length;
      store_most(d_filtered + at, d * load_most(d_filtered + at, n), n);
    }
  }
  for (int64_t f = t.unit; f < t.F; f += VL) {
    const int64_t n = t.F - f;
    store_most(d_filtered + f, load_most(d_out + f, n) * load_most(d_filtered + f, n), n);
  }
  for (int64_t k = 0; k < t.taps; ++k)
    for (int64_t f = 0; f < t.F; f += VL) {
      const int64_t n = t.F - f;
      float* to = d_weight + k * t.F + f;
      store_most(to, fma(load_most(d_filtered + f, n), load_most(t.x - k * t.F + f, n), load_most(to, n)),
                 n);
    }
}

static void filter_inputs(int64_t F, int64_t taps, const float* const* d_filtered,
                          const float* weight, float* d_x) {
  for (int64_t f = 0; f < F; f += VL) {
    vf sum{};
    for (int64_t k = 0; k < taps; ++k)
      if (d_filtered[k])
        sum = fma(load_most(d_filtered[k] + f, F - f), load_most(weight + k * F + f, F - f), sum);
    store_most(d_x + f, sum, F - f);
  }
}
