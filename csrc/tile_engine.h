// Tiles of attention in float32 vectors: products, exponentials, conversion.
//
// Included once per instruction set, inside its own namespace, after MEMATTN_VL (floats in a
// vector), MEMATTN_REGISTERS (vector registers), the larger of two vectors, MEMATTN_MAX, and the
// fused a * b + c of vectors and scalars, MEMATTN_FMA and MEMATTN_FMA1, are defined. Nothing else
// is fused (-ffp-contract=off), so that the same number is rounded the same way wherever it is
// computed.
//
// Scores are held transposed, [keys][queries]: one vector lane is one query. So the row maximum,
// the exponential, the sum and every mask are plain vertical operations, keys and values are read
// in place, and only the queries of a tile are repacked. A panel is NV vectors of queries.

typedef float vf __attribute__((vector_size(MEMATTN_VL * 4)));
typedef int32_t vi __attribute__((vector_size(MEMATTN_VL * 4)));
typedef vf vf_unaligned __attribute__((aligned(4)));
constexpr int VL = MEMATTN_VL;

#define MEMATTN_INLINE inline __attribute__((always_inline))

static MEMATTN_INLINE vf broadcast(float x) { return x - vf{}; }
static MEMATTN_INLINE vf fma(vf a, vf b, vf c) { return MEMATTN_FMA(a, b, c); }
static MEMATTN_INLINE vf fma(vf a, float b, vf c) { return fma(a, broadcast(b), c); }
static MEMATTN_INLINE vf select(vi condition, vf a, vf b) { return condition ? a : b; }
// a > b ? a : b, so b where either is NaN
static MEMATTN_INLINE vf greater(vf a, vf b) { return MEMATTN_MAX(a, b); }

// 2^(n + f) with n = round(x) for x <= 0, and f = fraction(n), which is about x - n. Exactly 0 where
// x is below -126.5; NaN stays NaN.
template <class Fraction>
static MEMATTN_INLINE vf exp2_nonpositive(vf x, Fraction fraction) {
  x = greater(broadcast(-127.0f), x);
  const vf shifted = x + 12582912.0f;  // 1.5 * 2^23: the low bits now hold round(x)
  vf f = fraction(shifted - 12582912.0f);
  f = greater(broadcast(-1.0f), f);  // where x was cut
  // minimax polynomial of 2^f on [-0.5, 0.5], relative error 1.9e-09
  vf p = broadcast(0x1.41d332p-13f);
  p = fma(p, f, broadcast(0x1.5f456ap-10f));
  p = fma(p, f, broadcast(0x1.3b2dbcp-7f));
  p = fma(p, f, broadcast(0x1.c6aed4p-5f));
  p = fma(p, f, broadcast(0x1.ebfbdap-3f));
  p = fma(p, f, broadcast(0x1.62e43p-1f));
  p = fma(p, f, broadcast(0x1.0p+0f));
  const vi exponent = ((vi)shifted + 127) << 23;
  return p * (vf)exponent;
}

enum class Store { set, add, scale_add, scale_rows };

// What a product multiplies: floats. Another unit of 32 bits may hold several numbers, whose products
// with those of the other factor are all added to one sum.
struct Floats {
  static constexpr int64_t NUMBERS = 1;  // in a unit
  static constexpr bool HAS_TILES = false;  // whether products of its own replace those below
  static MEMATTN_INLINE vf all(const float* x) { return broadcast(*x); }
  static MEMATTN_INLINE vf add_product(vf a, vf b, vf c) { return fma(a, b, c); }
};

// C[MR][NV vectors] (=, +=, or alpha * C +) sum over ko, k of A[m, ko, k] * B[ko, k, :]. alpha is that of
// a column, or with scale_rows that of a row.
// A is contiguous along k (a_stride steps m) or along m (a_stride steps k). The sum starts from 0 and
// is added to C at the end: long sums are made of short ones, which keeps their rounding small.
template <int MR, int NV, Store STORE, bool A_ALONG_K, class Unit>
static MEMATTN_INLINE void micro(int64_t KO, int64_t K, const float* A, int64_t a_stride,
                                 int64_t a_ko, const float* B, int64_t ldb, int64_t b_ko, float* C,
                                 int64_t ldc, const float* alpha) {
  vf acc[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[m][v] = vf{};
  for (int64_t ko = 0; ko < KO; ++ko) {
    const float* a = A + ko * a_ko;
    const float* b = B + ko * b_ko;
#pragma GCC unroll 4
    for (int64_t k = 0; k < K; ++k) {
      vf bv[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) bv[v] = ((const vf_unaligned*)b)[v];
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const vf av = Unit::all(A_ALONG_K ? a + m * a_stride + k : a + m);
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) acc[m][v] = Unit::add_product(av, bv[v], acc[m][v]);
      }
      b += ldb;
      if (!A_ALONG_K) a += a_stride;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      vf* c = (vf*)(C + m * ldc) + v;
      if (STORE == Store::set) *c = acc[m][v];
      if (STORE == Store::add) *c += acc[m][v];
      if (STORE == Store::scale_add) *c = fma(*c, ((const vf*)alpha)[v], acc[m][v]);
      if (STORE == Store::scale_rows) *c = fma(*c, alpha[m], acc[m][v]);
    }
}

// rows of C that fill the registers, with NV vectors each
template <int NV>
constexpr int micro_rows() {
  return MEMATTN_REGISTERS >= 32 ? 12 : (NV == 2 ? 6 : 12);
}

// One panel of a product: C[M][NV vectors], the rows in the largest groups that fit.
template <int NV, Store STORE, bool A_ALONG_K, class Unit = Floats>
static void product(int64_t M, int64_t KO, int64_t K, const float* A, int64_t a_stride,
                    int64_t a_ko, const float* B, int64_t ldb, int64_t b_ko, float* C, int64_t ldc,
                    const float* alpha) {
  if constexpr (Unit::HAS_TILES) {
    Unit::template product<NV, STORE, A_ALONG_K>(M, KO, K, A, a_stride, a_ko, B, ldb, b_ko, C, ldc,
                                                 alpha);
    return;
  }
  constexpr int MR = micro_rows<NV>();
  const int64_t a_row = A_ALONG_K ? a_stride : 1;
  int64_t m = 0;
#define MEMATTN_MICRO(R)                                                                      \
  micro<R, NV, STORE, A_ALONG_K, Unit>(KO, K, A + m * a_row, a_stride, a_ko, B, ldb, b_ko,    \
                                       C + m * ldc, ldc,                                      \
                                       STORE == Store::scale_rows ? alpha + m : alpha);       \
  m += R
  while (M - m >= MR) {
    MEMATTN_MICRO(MR);
  }
  if constexpr (MR > 8) {
    if (M - m >= 8) {
      MEMATTN_MICRO(8);
    }
  }
  // the remaining rows in one group: two small groups would wait twice for the latency of a sum
#define MEMATTN_REST(R)                             \
  case R:                                           \
    if constexpr (R < MR) {                         \
      MEMATTN_MICRO(R);                             \
    }                                               \
    break;
  switch (M - m) {
    MEMATTN_REST(7)
    MEMATTN_REST(6)
    MEMATTN_REST(5)
    MEMATTN_REST(4)
    MEMATTN_REST(3)
    MEMATTN_REST(2)
    MEMATTN_REST(1)
  }
#undef MEMATTN_REST
#undef MEMATTN_MICRO
}

// One panel of dot products, C[M][NV vectors] = A[M][K] B[K], summed in runs of `run` terms: short
// sums keep the rounding of scores and their gradients small.
template <int NV>
static MEMATTN_INLINE void dot_products(int64_t M, int64_t K, int64_t run, const float* A,
                                        int64_t a_stride, const float* B, int64_t ldb, float* C,
                                        int64_t ldc) {
  product<NV, Store::set, true>(M, 1, K < run ? K : run, A, a_stride, 0, B, ldb, 0, C, ldc,
                                nullptr);
  for (int64_t k = run; k < K; k += run)
    product<NV, Store::add, true>(M, 1, K - k < run ? K - k : run, A + k, a_stride, 0,
                                  B + k * ldb, ldb, 0, C, ldc, nullptr);
}

// One panel of weighted sums, C[M][NV vectors] (alpha * C, without alpha C) += sum over k of
// A[k][M] * B[k], in runs of `run` terms.
template <int NV>
static MEMATTN_INLINE void add_weighted(int64_t M, int64_t K, int64_t run, const float* A,
                                        int64_t a_stride, const float* B, int64_t ldb, float* C,
                                        int64_t ldc, const float* alpha) {
  for (int64_t k = 0; k < K; k += run) {
    const int64_t n = K - k < run ? K - k : run;
    const float *a = A + k * a_stride, *b = B + k * ldb;
    if (alpha && k == 0)
      product<NV, Store::scale_add, false>(M, 1, n, a, a_stride, 0, b, ldb, 0, C, ldc, alpha);
    else
      product<NV, Store::add, false>(M, 1, n, a, a_stride, 0, b, ldb, 0, C, ldc, nullptr);
  }
}

// ---- transposition -------------------------------------------------------------------------

// Row i (LOW) or row i + STEP of two rows a and b whose off-diagonal runs of STEP change places.
template <int STEP, bool LOW, size_t... J>
static MEMATTN_INLINE vf exchange(vf a, vf b, std::index_sequence<J...>) {
#define MEMATTN_FROM (LOW ? (J & STEP ? VL + J - STEP : J) : (J & STEP ? VL + J : J + STEP))
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (int)MEMATTN_FROM...);
#else
  return __builtin_shuffle(a, b, vi{(int32_t)MEMATTN_FROM...});
#endif
#undef MEMATTN_FROM
}

// A square of VL rows, transposed in place.
template <int STEP = 1>
static MEMATTN_INLINE void transpose(vf* rows) {
  if constexpr (STEP < VL) {
    constexpr auto lanes = std::make_index_sequence<VL>();
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i)
      if (!(i & STEP)) {
        const vf a = rows[i], b = rows[i + STEP];
        rows[i] = exchange<STEP, true>(a, b, lanes);
        rows[i + STEP] = exchange<STEP, false>(a, b, lanes);
      }
    transpose<2 * STEP>(rows);
  }
}

// Calls visit(lane, d, square) for the squares of rows [lanes][ld]: square[k] holds element d + k of
// the lanes from `lane` on. ld is a multiple of VL.
template <class Visit>
static MEMATTN_INLINE void for_each_square(const float* rows, int64_t ld, int64_t lanes,
                                           int64_t width, Visit visit) {
  for (int64_t lane = 0; lane < lanes; lane += VL)
    for (int64_t d = 0; d < width; d += VL) {
      vf square[VL];
#pragma GCC unroll 16
      for (int k = 0; k < VL; ++k) square[k] = *(const vf*)(rows + (lane + k) * ld + d);
      transpose(square);
      visit(lane, d, square);
    }
}

// Rows [lanes][ld] to panels [panel][width][lanes of a panel].
static void to_panels(const float* rows, int64_t ld, int64_t lanes, int64_t width, int64_t panel,
                      float* panels) {
  for_each_square(rows, ld, lanes, width, [&](int64_t lane, int64_t d, const vf* square) {
    float* to = panels + lane / panel * width * panel + d * panel + lane % panel;
#pragma GCC unroll 16
    for (int k = 0; k < VL; ++k)
      if (d + k < width) *(vf*)(to + k * panel) = square[k];
  });
}

// And back.
static void from_panels(const float* panels, int64_t panel, int64_t lanes, int64_t width,
                        int64_t ld, float* rows) {
  for (int64_t lane = 0; lane < lanes; lane += VL)
    for (int64_t d = 0; d < width; d += VL) {
      const float* from = panels + lane / panel * width * panel + d * panel + lane % panel;
      vf square[VL];
#pragma GCC unroll 16
      for (int k = 0; k < VL; ++k)
        square[k] = d + k < width ? *(const vf*)(from + k * panel) : vf{};
      transpose(square);
#pragma GCC unroll 16
      for (int k = 0; k < VL; ++k) *(vf*)(rows + (lane + k) * ld + d) = square[k];
    }
}

// The dot products of rows [lanes][ld] with the lanes of panels, rounded as dot_products() does.
static inline void row_dot_products(const float* rows, int64_t ld, const float* panels, int64_t panel,
                             int64_t lanes, int64_t width, int64_t run, float* totals) {
  vf total{}, sum{};
  for_each_square(rows, ld, lanes, width, [&](int64_t lane, int64_t d, const vf* square) {
    const float* with = panels + lane / panel * width * panel + d * panel + lane % panel;
    for (int64_t k = 0; k < VL && d + k < width; ++k) {
      sum = fma(square[k], *(const vf*)(with + k * panel), sum);
      if ((d + k + 1) % run == 0 || d + k + 1 == width) total += sum, sum = vf{};
    }
    if (d + VL >= width) *(vf*)(totals + lane) = total, total = vf{};
  });
}

// ---- conversion ----------------------------------------------------------------------------

static MEMATTN_INLINE float half_to_float(uint16_t h) {
  return (float)torch::headeronly::Half(h, torch::headeronly::Half::from_bits());
}

typedef uint16_t bfloat16_bits __attribute__((may_alias));  // of a number in a row of pairs

static MEMATTN_INLINE float bfloat16_to_float(uint16_t h) {
  const uint32_t bits = (uint32_t)h << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

static MEMATTN_INLINE float load(const View& view, int64_t offset) {
  switch (view.dtype) {
    case Dtype::float32: return ((const float*)view.data)[offset];
    case Dtype::float16: return half_to_float(((const uint16_t*)view.data)[offset]);
    default: return bfloat16_to_float(((const uint16_t*)view.data)[offset]);
  }
}

static MEMATTN_INLINE void store(const View& view, int64_t offset, float x) {
  switch (view.dtype) {
    case Dtype::float32: ((float*)view.data)[offset] = x; break;
    case Dtype::float16: ((uint16_t*)view.data)[offset] = torch::headeronly::Half(x).x; break;
    default: ((uint16_t*)view.data)[offset] = bfloat16_of(x);
  }
}

// One row of `n` elements, `stride` apart, to contiguous float32.
static void load_row(const View& view, int64_t offset, int64_t stride, int64_t n, float* to) {
  if (view.dtype == Dtype::float32) {
    const float* from = (const float*)view.data + offset;
    if (stride == 1) __builtin_memcpy(to, from, n * 4);
    else for (int64_t i = 0; i < n; ++i) to[i] = from[i * stride];
    return;
  }
  const uint16_t* from = (const uint16_t*)view.data + offset;
  int64_t i = 0;
  if (view.dtype == Dtype::bfloat16) {
    if (stride == 1) for (; i < n; ++i) to[i] = bfloat16_to_float(from[i]);
    for (; i < n; ++i) to[i] = bfloat16_to_float(from[i * stride]);
    return;
  }
#if defined(MEMATTN_F16C)
  if (stride == 1)
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
  for (; i < n; ++i) to[i] = half_to_float(from[i * stride]);
}

// And back: one row of contiguous float32, rounded to the type of `view`.
static void store_row(const View& view, int64_t offset, int64_t stride, int64_t n,
                      const float* from) {
  if (view.dtype == Dtype::float32 && stride == 1) {
    __builtin_memcpy((float*)view.data + offset, from, n * 4);
    return;
  }
  if (view.dtype == Dtype::bfloat16 && stride == 1) {
    uint16_t* to = (uint16_t*)view.data + offset;
    for (int64_t i = 0; i < n; ++i) to[i] = bfloat16_of(from[i]);
    return;
  }
  for (int64_t i = 0; i < n; ++i) store(view, offset + i * stride, from[i]);
}

// `rows` rows of `width` floats, `ld` apart, times `factor` to numbers side by side.
static inline void store_scaled(const View& to, int64_t offset, int64_t rows, int64_t width,
                                const float* from, int64_t ld, float factor) {
  if (ld == width) width *= rows, rows = 1;
  for (int64_t r = 0; r < rows; ++r, from += ld, offset += width) {
    if (to.dtype == Dtype::bfloat16) {
      uint16_t* row = (uint16_t*)to.data + offset;
      for (int64_t d = 0; d < width; ++d) row[d] = bfloat16_of(from[d] * factor);
    } else if (to.dtype == Dtype::float16) {
      uint16_t* row = (uint16_t*)to.data + offset;
      for (int64_t d = 0; d < width; ++d) row[d] = torch::headeronly::Half(from[d] * factor).x;
    } else {
      float* row = (float*)to.data + offset;
      for (int64_t d = 0; d < width; ++d) row[d] = from[d] * factor;
    }
  }
}

// Rows [0, n) of a matrix as float32 with contiguous rows: in place where they are so already.
struct Rows {
  const float* data;
  int64_t stride;
  Rows from(int64_t row) const { return {data + row * stride, stride}; }
};

static Rows float_rows(const View& view, int64_t offset, int64_t row_stride, int64_t col_stride,
                       int64_t n, int64_t width, float* scratch) {
  if (view.dtype == Dtype::float32 && col_stride == 1)
    return {(const float*)view.data + offset, row_stride};
  for (int64_t r = 0; r < n; ++r)
    load_row(view, offset + r * row_stride, col_stride, width, scratch + r * width);
  return {scratch, width};
}

static MEMATTN_INLINE int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}
