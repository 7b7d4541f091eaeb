// Tiles of attention in bfloat16: pairs of numbers, whose products are added in float32.
//
// Included after attention_rows.h for instruction sets with dot products of pairs. A pair is 32 bits,
// so it takes the place of a float in the products and the transposition of tile_engine.h. Scores
// need pairs along the head dimension: a row of the tensor is one already. Sums over keys need
// pairs of keys, sums over queries pairs of queries: two rows, interleaved. Weights and gradients of
// scores are rounded to bfloat16 for these sums, as plain PyTorch does; softmax states, log-sum-exp
// and all sums are float32. Denormal numbers count as zero.

struct Pairs {
  static constexpr int64_t NUMBERS = 2;
#if defined(MEMATTN_AMX)
  static constexpr bool HAS_TILES = true;
  template <int NV, Store STORE, bool A_ALONG_K>
  static void product(int64_t M, int64_t KO, int64_t K, const float* A, int64_t a_stride, int64_t a_ko,
                      const float* B, int64_t ldb, int64_t b_ko, float* C, int64_t ldc,
                      const float* alpha);
#else
  static constexpr bool HAS_TILES = false;
#endif
  static MEMATTN_INLINE vf all(const float* x) { return (vf)_mm512_set1_ps(*x); }
  static MEMATTN_INLINE vf add_product(vf a, vf b, vf c) {
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};

static MEMATTN_INLINE int64_t pairs_in(int64_t width) { return (width + 1) / 2; }

// a in the low 16 lanes, b in the high ones, rounded to bfloat16
static MEMATTN_INLINE __m512i rounded(vf a, vf b) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
}

// Of numbers 0 … 31 of `a` and 32 … 63 of `b`: the pairs (i, 32 + i), from i = FIRST on.
template <int FIRST>
static MEMATTN_INLINE __m512i interleaved(__m512i a, __m512i b) {
  alignas(64) static constexpr struct Order {
    int16_t at[32] = {};
    constexpr Order() {
      for (int i = 0; i < 32; ++i) at[i] = (int16_t)(FIRST + i / 2 + i % 2 * 32);
    }
  } order;
  return _mm512_permutex2var_epi16(a, _mm512_load_si512(order.at), b);
}

// The pairs (a of lane i, b of lane i), rounded to bfloat16.
static MEMATTN_INLINE __m512i paired(vf a, vf b) {
  const __m512i both = rounded(a, b);
  return interleaved<0>(both, _mm512_alignr_epi64(both, both, 4));
}

// ---- rows ----------------------------------------------------------------------------------

// One row of bfloat16 to contiguous pairs, zero from `n` on up to 2 * `pairs` numbers.
static MEMATTN_INLINE void load_pairs(const View& view, int64_t offset, int64_t stride, int64_t n,
                                      int64_t pairs, float* to) {
  const uint16_t* from = (const uint16_t*)view.data + offset;
  char* at = (char*)to;
  if (stride == 1) __builtin_memcpy(at, from, n * 2);
  else for (int64_t i = 0; i < n; ++i) __builtin_memcpy(at + i * 2, from + i * stride, 2);
  __builtin_memset(at + n * 2, 0, pairs * 4 - n * 2);
}

// Rows [0, n) of a matrix as rows of pairs: in place where they are so already.
static Rows pair_rows(const View& view, int64_t offset, int64_t row_stride, int64_t col_stride,
                      int64_t n, int64_t width, float* scratch) {
  const uint16_t* from = (const uint16_t*)view.data + offset;
  // rows further apart could share few sets of the cache
  if (col_stride == 1 && width % 2 == 0 && row_stride == width && (uintptr_t)from % 4 == 0)
    return {(const float*)from, width / 2};
  const int64_t ld = pairs_in(width);
  for (int64_t r = 0; r < n; ++r)
    load_pairs(view, offset + r * row_stride, col_stride, width, ld, scratch + r * ld);
  return {scratch, ld};
}

// Rows of `view` as pairs [lanes][ld], zero past `width` and in lanes that see nothing.
template <class QueryRows>
static void load_pair_rows(const View& view, const Tile& tile, const QueryRows& rows, int64_t width,
                           int64_t ld, float* to) {
  for (int64_t i = 0; i < rows.lanes; ++i, to += ld) {
    const bool empty = i >= rows.n || rows.empty(i);  // an empty row may hold anything
    load_pairs(view, empty ? 0 : place_of(view, tile, rows, i), column_step(view, rows),
               empty ? 0 : width, ld, to);
  }
}

// Rows 2 i and 2 i + 1 of n rows as row i of pairs: to[i][d] is (rows[2 i][d], rows[2 i + 1][d]), with
// a row of zeros behind an odd last one. Writes `ld` pairs of each, at least `width`.
static void interleave(const Rows& rows, int64_t n, int64_t width, int64_t ld, float* to) {
  for (int64_t j = 0; j < n; j += 2, to += ld) {
    const float *low = rows.data + j * rows.stride, *high = low + rows.stride;
    const bool has_high = j + 1 < n;
    for (int64_t d = 0; d < ld; d += 2 * VL) {
      const int64_t left = pairs_in(width) - d / 2, out = ld - d;
      const auto mask = [](int64_t n) {
        return (__mmask16)(n >= VL ? 0xffff : n <= 0 ? 0 : (1 << n) - 1);
      };
      const __m512i a = _mm512_maskz_loadu_epi32(mask(left), low + d / 2);
      const __m512i b = _mm512_maskz_loadu_epi32(has_high ? mask(left) : 0, high + d / 2);
      _mm512_mask_storeu_epi32(to + d, mask(out), interleaved<0>(a, b));
      _mm512_mask_storeu_epi32(to + d + VL, mask(out - VL), interleaved<VL>(a, b));
    }
  }
}

// ---- blocks of keys ------------------------------------------------------------------------

// Where blocks are made: [BLOCK_KEYS][3 * (pairs of D and of Dv)] and two rows of pairs of keys.
struct PairScratch {
  float* data;
  bool is_backward;
};

static int64_t pair_scratch(int64_t D, int64_t Dv) {
  const int64_t wide = D > Dv ? D : Dv;
  return BLOCK_KEYS * (pairs_in(D) + pairs_in(Dv)) + (BLOCK_KEYS / 2 + 3) * round_up(wide, 16);
}

// A block whose keys and values are pairs along their rows.
template <class Base>
struct PairBlock : Base {
  float* by_two;  // pairs of keys [n / 2][D], in the forward of values [n / 2][Dv]
  float* spare;   // two such rows
};

// Pairs of keys of a block, from its rows.
template <class AnyBlock>
static MEMATTN_INLINE void pair_keys(AnyBlock& block, int64_t D, int64_t Dv,
                                     const PairScratch& scratch) {
  const bool of_keys = scratch.is_backward;
  const int64_t width = of_keys ? D : Dv;
  block.by_two = scratch.data + BLOCK_KEYS * (pairs_in(D) + pairs_in(Dv));
  block.spare = block.by_two + BLOCK_KEYS / 2 * width;
  interleave(of_keys ? block.key : block.value, block.n, width, width, block.by_two);
}

static MEMATTN_INLINE PairBlock<Block> load_block(const Source& s, int64_t j, int64_t n, int64_t D,
                                                  int64_t Dv, const PairScratch& scratch) {
  const int64_t key_step = s.key.stride[s.row_axis], value_step = s.value.stride[s.row_axis];
  PairBlock<Block> block;
  block.n = n;
  block.key = pair_rows(s.key, s.key_at + j * key_step, key_step, s.key.stride[s.row_axis + 1], n, D,
                        scratch.data);
  block.value = pair_rows(s.value, s.value_at + j * value_step, value_step,
                          s.value.stride[s.row_axis + 1], n, Dv,
                          scratch.data + BLOCK_KEYS * pairs_in(D));
  pair_keys(block, D, Dv, scratch);
  return block;
}

// The keys [skip, skip + n) of a block that a panel sees, as whole pairs [begin, begin + pairs).
struct PairSpan {
  int64_t skip, n, lead, begin, pairs;
  PairSpan(int64_t skip, int64_t n)
      : skip(skip), n(n), lead(skip % 2), begin(skip / 2), pairs(pairs_in(lead + n)) {}
  bool ends_odd() const { return (lead + n) % 2; }
};

// Calls use(pairs of keys) with zeros for neighbours that the panel does not see: they may hold
// anything, and a weight 0 does not make it 0.
template <class AnyBlock, class Use>
static MEMATTN_INLINE void with_own_keys(const AnyBlock& block, const PairSpan& span, int64_t width,
                                         Use use) {
  float* first = block.by_two + span.begin * width;
  float* last = first + (span.pairs - 1) * width;
  const bool has_next = span.ends_odd() && span.skip + span.n < block.n;
  float* kept = block.spare;
  if (span.lead) {
    __builtin_memcpy(kept, first, width * 4);
    for (int64_t d = 0; d < width; ++d) __builtin_memset((char*)(first + d), 0, 2);
  }
  if (has_next) {
    __builtin_memcpy(kept + width, last, width * 4);
    for (int64_t d = 0; d < width; ++d) __builtin_memset((char*)(last + d) + 2, 0, 2);
  }
  use((const float*)first);
  if (has_next) __builtin_memcpy(last, kept + width, width * 4);
  if (span.lead) __builtin_memcpy(first, kept, width * 4);
}

// ---- weights -------------------------------------------------------------------------------

// 2^x for x <= 0, to 3e-6 of itself. Exactly 1 for 0, exactly 0 below -127; NaN stays NaN.
static MEMATTN_INLINE vf short_exp2(vf x) {
  x = greater(broadcast(-127.0f), x);
  const vf shifted = x + 12582912.0f;  // 1.5 * 2^23: the low bits now hold round(x)
  const vf f = x - (shifted - 12582912.0f);
  // minimax polynomial of 2^f on [-0.5, 0.5] that is 1 at 0
  vf p = broadcast(0x1.3a02dp-7f);
  p = fma(p, f, broadcast(0x1.c9fc48p-5f));
  p = fma(p, f, broadcast(0x1.ec0378p-3f));
  p = fma(p, f, broadcast(0x1.62e12cp-1f));
  p = fma(p, f, broadcast(1.0f));
  return (vf)((vi)p + ((vi)shifted << 23));
}

static MEMATTN_INLINE vf floats_of(__m256i numbers) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16);
}

// What is left of a and b when they are rounded to bfloat16, as pairs; see paired().
static MEMATTN_INLINE __m512i paired_rest(vf a, vf b) {
  const __m512i both = rounded(a, b);
  return paired(a - floats_of(_mm512_castsi512_si256(both)),
                b - floats_of(_mm512_extracti64x4_epi64(both, 1)));
}

// Takes in one panel of scores, whole pairs of keys without their scale, and stores their weights as
// pairs of keys [n / 2][PANEL], with FINE also what their rounding left, `rest`. Exponents are
// products and differences rounded one by one, as in plain float32: so the largest key has weight 1
// exactly at any size of the scores.
template <int NV, bool FINE>
static MEMATTN_INLINE void pair_softmax_step(const float* scores, int64_t pairs, float scale2,
                                             SoftmaxState<NV>* state, vf* alpha, float* weights,
                                             float* rest) {
  const vf* s = (const vf*)scores;
  vf high[NV], sum[NV], more[NV];
  for (int v = 0; v < NV; ++v) high[v] = more[v] = broadcast(-__builtin_inff());
  for (int64_t j = 0; j < 2 * pairs * NV; j += 2 * NV)
    for (int v = 0; v < NV; ++v) {
      high[v] = greater(s[j + v], high[v]);
      more[v] = greater(s[j + NV + v], more[v]);
    }
  for (int v = 0; v < NV; ++v) {
    high[v] = greater(high[v], more[v]) * scale2;
    high[v] = select(high[v] > state->high[v], high[v], state->high[v]);
    sum[v] = more[v] = vf{};
  }
#pragma GCC unroll 2
  for (int64_t i = 0; i < pairs; ++i)
    for (int v = 0; v < NV; ++v) {
      const vf a = short_exp2(s[2 * i * NV + v] * scale2 - high[v]);
      const vf b = short_exp2(s[2 * i * NV + NV + v] * scale2 - high[v]);
      sum[v] += a, more[v] += b;
      _mm512_store_si512((vf*)weights + i * NV + v, paired(a, b));
      if constexpr (FINE) _mm512_store_si512((vf*)rest + i * NV + v, paired_rest(a, b));
    }
  for (int v = 0; v < NV; ++v) {
    alpha[v] = short_exp2(state->high[v] - high[v]);
    state->sum[v] = fma(state->sum[v], alpha[v], sum[v] + more[v]);
    state->high[v] = high[v];
  }
}
