// One more token of each sequence through a sublayer of a decoder: norms, rotations, and attention of
// one query. Products with the weights are row_products() of neural_memory_step_tile.h.
//
// Included once per instruction set after that file. Vectors are padded with zeros to lanes.

static void step_products(int64_t M, int64_t K, const float* W, int64_t ld, const float* x, float* to) {
  row_products(M, K, W, ld, x, to);
}

// out = x / sqrt(mean(x^2) + eps) * weight, zeros behind it.
static void step_norm(int64_t E, const float* x, const float* weight, float eps, float* out) {
  vf squares{};
  int64_t e = 0;
  for (; e + VL <= E; e += VL) {
    const vf part = (vf) * (const vf_anywhere*)(x + e);
    squares = fma(part, part, squares);
  }
  const vf last = load_part(x + e, E - e);
  squares = fma(last, last, squares);
  float sum = 0.0f;
  for (int k = 0; k < VL; ++k) sum += squares[k];
  const float scale = 1.0f / __builtin_sqrtf(sum / (float)E + eps);
  for (int64_t i = 0; i < E; ++i) out[i] = x[i] * scale * weight[i];
  for (int64_t i = E; i < round_up(E, VL); ++i) out[i] = 0.0f;
}

// Rotates features d and d + D/2 of x by cos[d] and sin[d].
static void step_rotate(int64_t D, const float* x, const float* cos, const float* sin, float* out) {
  const int64_t half = D / 2;
  for (int64_t d = 0; d < half; ++d) {
    const float first = x[d], second = x[d + half];
    out[d] = first * cos[d] - second * sin[d];
    out[d + half] = second * cos[d] + first * sin[d];
  }
}

// to[n] = silu(gate[n]) * up[n].
static void step_gate(int64_t n, const float* gate, const float* up, float* to) {
  const Split log2e(1.4426950408889634);
  for (int64_t i = 0; i < n; i += VL) {
    const vf x = *(const vf*)(gate + i);
    // 1 / (1 + exp(-x)) by exp(-|x|), which does not overflow
    const vf size = x < 0.0f ? x : -x;
    const vf power = weight(greater(broadcast(-0x1p120f), size), log2e, vf{}, vf{});
    const vf sigmoid = (x < 0.0f ? power : broadcast(1.0f)) / (1.0f + power);
    *(vf*)(to + i) = x * sigmoid * *(const vf*)(up + i);
  }
}

static int64_t step_scratch(const StepAttention& a) {
  const int64_t keys = 4 * VL + a.S + a.P + a.ahead;
  return keys + 3 * round_up(a.D, VL) + round_up(a.Dv, VL) * 3 + a.ahead * a.D + 8 * VL;
}

// One query head against its keys: tokens, persistent ones, and rows of a table. `query` is padded.
static void step_attend(const StepAttention& a, int64_t b, int64_t h, const StepRange& r,
                        const float* query, float* scratch, float* out) {
  const int64_t hkv = h / (a.H / a.Hkv), ahead = r.ahead_end - r.ahead_begin;
  struct Source {
    const float *key, *value;
    int64_t n, key_stride, value_stride;
  };
  float* scores = scratch;
  float* values = scores + round_up(r.hi - r.lo, VL) + round_up(a.P, VL) + round_up(ahead, VL);
  float* run = values + round_up(a.Dv, VL);
  float* turned = run + round_up(a.Dv, VL);
  Source sources[3] = {
      {a.key + b * a.key_stride[0] + hkv * a.key_stride[1] + r.lo * a.key_stride[2],
       a.value + b * a.value_stride[0] + hkv * a.value_stride[1] + r.lo * a.value_stride[2],
       r.hi - r.lo, a.key_stride[2], a.value_stride[2]},
      {a.persistent_key + hkv * a.P * a.D, a.persistent_value + hkv * a.P * a.Dv, a.P, a.D, a.Dv},
      {turned, a.table_value + (h * a.R + r.ahead_begin) * a.Dv, ahead, a.D, a.Dv}};
  for (int64_t c = 0; c < ahead; ++c) {  // the rows turn by their own positions
    const float* row = a.table_key + (h * a.R + r.ahead_begin + c) * a.D;
    if (a.cos)
      step_rotate(a.D, row, a.cos + (r.ahead_begin + c + 1) * (a.D / 2),
                  a.sin + (r.ahead_begin + c + 1) * (a.D / 2), turned + c * a.D);
    else
      for (int64_t d = 0; d < a.D; ++d) turned[c * a.D + d] = row[d];
  }
  // scores; the lanes behind the last of each source repeat its first
  vf highest = broadcast(-__builtin_inff());
  float* at = scores;
  for (const Source& s : sources) {
    if (!s.n) continue;
    row_products(s.n, a.D, s.key, s.key_stride, query, at);
    for (int64_t i = s.n; i < round_up(s.n, VL); ++i) at[i] = at[0];
    for (int64_t i = 0; i < s.n; i += VL) highest = greater(*(const vf*)(at + i), highest);
    at += round_up(s.n, VL);
  }
  float top = highest[0];
  for (int k = 1; k < VL; ++k) top = highest[k] > top ? highest[k] : top;
  // weights
  const Split scale2(a.scale * 1.4426950408889634);
  vf sums{};
  at = scores;
  for (const Source& s : sources) {
    for (int64_t i = 0; i < s.n; i += VL) {
      // finite, since the split scale would make NaN of an infinite score
      const vf score = greater(broadcast(-0x1p120f), *(const vf*)(at + i) - top);
      *(vf*)(at + i) = weight(score, scale2, vf{}, vf{});
    }
    for (int64_t i = s.n; i < round_up(s.n, VL); ++i) at[i] = 0.0f;
    for (int64_t i = 0; i < s.n; i += VL) sums += *(const vf*)(at + i);
    at += round_up(s.n, VL);
  }
  float sum = 0.0f;
  for (int k = 0; k < VL; ++k) sum += sums[k];
  // values, in short runs, which keeps their rounding small
  constexpr int64_t RUN = 128;
  const int64_t wide = round_up(a.Dv, VL);
  for (int64_t d = 0; d < wide; ++d) values[d] = 0.0f;
  const float* weights = scores;
  for (const Source& s : sources) {
    for (int64_t i = 0; i < s.n; i += RUN) {
      for (int64_t d = 0; d < wide; ++d) run[d] = 0.0f;
      add_rows(s.n - i < RUN ? s.n - i : RUN, a.Dv, s.value + i * s.value_stride, s.value_stride,
               weights + i, run);
      for (int64_t d = 0; d < wide; ++d) values[d] += run[d];
    }
    weights += round_up(s.n, VL);
  }
  for (int64_t d = 0; d < a.Dv; ++d) out[d] = values[d] / sum;
}
