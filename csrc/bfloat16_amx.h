// Products of pairs in the tiles of AMX: 16 rows of 16 units of 32 bits.
//
// Included after bfloat16_tile.h. A panel of B has a row of lanes for each pair: that is how a tile holds
// the second factor. Rows of A along k are how it holds the first; rows of A along m are transposed
// before. Parts smaller than a tile are copied into a tile of zeros, so that every sum is added in the
// same order. The sum begins with C and takes 16 units of k at a time.

constexpr int64_t SIDE = 16;       // rows of a tile, and units of a row
constexpr int64_t TILE_STEPS = 4;  // tiles of k that are transposed at a time

// What the processor reads of the shapes of tiles. A constant: GCC's _tile_loadconfig() names 8 of its
// 64 bytes, and stores to the others would be dropped.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
  constexpr TileShapes() {
    for (int i = 0; i < 8; ++i) bytes[i] = SIDE * 4, rows[i] = SIDE;
  }
};
alignas(64) static constexpr TileShapes TILE_SHAPES;

// While one is alive, this thread has tiles, all of one shape.
struct PairProducts {
  PairProducts() { _tile_loadconfig(&TILE_SHAPES); }
  ~PairProducts() { _tile_release(); }
};

// Tiles 0 to 3 are C, of row tile r and vector v number 2 r + v; 4 and 5 are A, 6 and 7 are B.
template <int RT, int NV>
struct CTiles {
  static MEMATTN_INLINE void clear() {
    _tile_zero(0);
    if constexpr (NV > 1) _tile_zero(1);
    if constexpr (RT > 1) _tile_zero(2);
    if constexpr (RT > 1 && NV > 1) _tile_zero(3);
  }
  static MEMATTN_INLINE void load(const float* c, int64_t ldc) {
    _tile_loadd(0, c, ldc * 4);
    if constexpr (NV > 1) _tile_loadd(1, c + SIDE, ldc * 4);
    if constexpr (RT > 1) _tile_loadd(2, c + SIDE * ldc, ldc * 4);
    if constexpr (RT > 1 && NV > 1) _tile_loadd(3, c + SIDE * ldc + SIDE, ldc * 4);
  }
  static MEMATTN_INLINE void store(float* c, int64_t ldc) {
    _tile_stored(0, c, ldc * 4);
    if constexpr (NV > 1) _tile_stored(1, c + SIDE, ldc * 4);
    if constexpr (RT > 1) _tile_stored(2, c + SIDE * ldc, ldc * 4);
    if constexpr (RT > 1 && NV > 1) _tile_stored(3, c + SIDE * ldc + SIDE, ldc * 4);
  }
  // adds the products of 16 units of k
  static MEMATTN_INLINE void add(const float* const* a, const int64_t* a_stride, const float* b,
                                 int64_t ldb) {
    _tile_loadd(6, b, ldb * 4);
    _tile_loadd(4, a[0], a_stride[0] * 4);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (NV > 1) {
      _tile_loadd(7, b + SIDE, ldb * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (RT > 1) {
      _tile_loadd(5, a[1], a_stride[1] * 4);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (NV > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
};

// Memory is written before tiles are loaded from it, and read after they are stored.
static MEMATTN_INLINE void settle_memory() { __asm__ volatile("" ::: "memory"); }

static MEMATTN_INLINE __mmask16 first_lanes(int64_t n) {
  return (__mmask16)(n >= SIDE ? 0xffff : n <= 0 ? 0 : (1 << n) - 1);
}

// `rows` rows of `n` units to a tile of its own, zeros behind.
static MEMATTN_INLINE void fill_tile(const float* from, int64_t ld, int64_t rows, int64_t n,
                                     float* tile, int64_t tile_ld) {
  for (int64_t r = 0; r < SIDE; ++r)
    *(vf*)(tile + r * tile_ld) =
        r < rows ? (vf)_mm512_maskz_loadu_ps(first_lanes(n), from + r * ld) : vf{};
}

// And `n` rows of `rows` units, transposed.
static MEMATTN_INLINE void turn_tile(const float* from, int64_t ld, int64_t rows, int64_t n,
                                     float* tile) {
  vf square[SIDE];
  if (rows >= SIDE && n >= SIDE) {
#pragma GCC unroll 16
    for (int k = 0; k < SIDE; ++k) square[k] = *(const vf_unaligned*)(from + k * ld);
  } else {
    for (int64_t k = 0; k < SIDE; ++k)
      square[k] = k < n ? (vf)_mm512_maskz_loadu_ps(first_lanes(rows), from + k * ld) : vf{};
  }
  transpose(square);
#pragma GCC unroll 16
  for (int m = 0; m < SIDE; ++m) ((vf*)tile)[m] = square[m];
}

// `rows` rows of a product, no more than RT tiles have.
template <int RT, int NV, Store STORE, bool A_ALONG_K>
static MEMATTN_INLINE void tile_rows(int64_t rows, int64_t KO, int64_t K, const float* A,
                                     int64_t a_stride, int64_t a_ko, const float* B, int64_t ldb,
                                     int64_t b_ko, float* C, int64_t ldc, const float* alpha) {
  using Tiles = CTiles<RT, NV>;
  constexpr int64_t AREA = SIDE * SIDE;
  alignas(64) float a_tiles[A_ALONG_K ? RT * AREA : TILE_STEPS * RT * AREA], b_tiles[NV * AREA];
  alignas(64) float c_tiles[RT * NV * AREA];
  const bool is_whole = rows == RT * SIDE;
  if constexpr (STORE == Store::scale_add || STORE == Store::scale_rows)
    for (int64_t m = 0; m < rows; ++m)
      for (int v = 0; v < NV; ++v) {
        vf* c = (vf*)(C + m * ldc) + v;
        *c *= STORE == Store::scale_add ? ((const vf*)alpha)[v] : broadcast(alpha[m]);
      }
  float* c = is_whole ? C : c_tiles;
  const int64_t c_ld = is_whole ? ldc : NV * SIDE;
  if constexpr (STORE == Store::set) {
    Tiles::clear();
  } else {
    if (!is_whole)
      for (int64_t m = 0; m < RT * SIDE; ++m)
        for (int v = 0; v < NV; ++v)
          ((vf*)c_tiles)[m * NV + v] = m < rows ? ((const vf*)(C + m * ldc))[v] : vf{};
    settle_memory();
    Tiles::load(c, c_ld);
  }
  const float* a[RT];
  int64_t strides[RT];
  for (int64_t ko = 0; ko < KO; ++ko)
    for (int64_t first = 0; first < K; first += TILE_STEPS * SIDE) {
      const int64_t end = K - first < TILE_STEPS * SIDE ? K : first + TILE_STEPS * SIDE;
      if constexpr (!A_ALONG_K)
        for (int64_t k = first; k < end; k += SIDE)
          for (int r = 0; r < RT; ++r)
            turn_tile(A + ko * a_ko + k * a_stride + r * SIDE, a_stride, rows - r * SIDE, K - k,
                      a_tiles + ((k - first) / SIDE * RT + r) * AREA);
      for (int64_t k = first; k < end; k += SIDE) {
        const bool is_full = K - k >= SIDE;
        for (int r = 0; r < RT; ++r) {
          a[r] = A_ALONG_K ? A + ko * a_ko + k + r * SIDE * a_stride
                           : a_tiles + ((k - first) / SIDE * RT + r) * AREA;
          strides[r] = A_ALONG_K ? a_stride : SIDE;
          if (A_ALONG_K && !(is_full && rows - r * SIDE >= SIDE)) {
            fill_tile(a[r], a_stride, rows - r * SIDE, K - k, a_tiles + r * AREA, SIDE);
            a[r] = a_tiles + r * AREA, strides[r] = SIDE;
          }
        }
        const float* b = B + ko * b_ko + k * ldb;
        if (!is_full)
          for (int v = 0; v < NV; ++v)
            fill_tile(b + v * SIDE, ldb, K - k, SIDE, b_tiles + v * SIDE, NV * SIDE);
        settle_memory();
        Tiles::add(a, strides, is_full ? b : b_tiles, is_full ? ldb : NV * SIDE);
      }
    }
  Tiles::store(c, c_ld);
  settle_memory();
  if (!is_whole)
    for (int64_t m = 0; m < rows; ++m)
      for (int v = 0; v < NV; ++v) ((vf*)(C + m * ldc))[v] = ((const vf*)c_tiles)[m * NV + v];
}

template <int NV, Store STORE, bool A_ALONG_K>
void Pairs::product(int64_t M, int64_t KO, int64_t K, const float* A, int64_t a_stride, int64_t a_ko,
                    const float* B, int64_t ldb, int64_t b_ko, float* C, int64_t ldc,
                    const float* alpha) {
  for (int64_t m = 0; m < M; m += 2 * SIDE) {
    const int64_t rows = M - m < 2 * SIDE ? M - m : 2 * SIDE;
    const float *a = A + m * (A_ALONG_K ? a_stride : 1),
                *factors = STORE == Store::scale_rows ? alpha + m : alpha;
    if (rows > SIDE)
      tile_rows<2, NV, STORE, A_ALONG_K>(rows, KO, K, a, a_stride, a_ko, B, ldb, b_ko, C + m * ldc,
                                         ldc, factors);
    else
      tile_rows<1, NV, STORE, A_ALONG_K>(rows, KO, K, a, a_stride, a_ko, B, ldb, b_ko, C + m * ldc,
                                         ldc, factors);
  }
}
