// Weighted sums of the keys and rows of a tile that leave out what lanes do not see.
//
// Included once per instruction set after attention_tile.h. Where the rows of a panel lie far apart, most
// of them see far fewer keys than the last one does. Scores are made for whole panels; these sums take
// lanes one by one, so that they cost what is seen. They have the bits of the sums of whole panels, in
// which what is left out has weight 0. Vectors lie along a row here: its width is a multiple of VL.

struct Lanes {
  int64_t first, last;
};

// The first and the last of the given lanes that sees one of the keys [begin, end), and those between.
static MEMATTN_INLINE Lanes lanes_that_see(const Interval& seen, Lanes lanes, int64_t begin,
                                           int64_t end) {
  auto sees = [&](int64_t i) { return seen.hi[i] > begin && seen.lo[i] < end; };
  while (lanes.first < lanes.last && !sees(lanes.first)) ++lanes.first;
  while (lanes.last > lanes.first && !sees(lanes.last - 1)) --lanes.last;
  return lanes;
}

// Zeros what the lanes of panel p hold in [n][units of TILE_ROWS] for keys that it does not see.
template <int NV, class Unit = Floats>
static MEMATTN_INLINE void clear_lanes_outside(float* panel, int64_t n, const PanelSpans& spans,
                                               int64_t p) {
  const int64_t first = spans.first[p], last = spans.last[p];
  for (int64_t j = first ? 0 : last; j < n; j = j + 1 == first ? last : j + 1)
    __builtin_memset(panel + j * TILE_ROWS / Unit::NUMBERS, 0, NV * VL / Unit::NUMBERS * 4);
}

// Calls part(number of vectors, d) for the columns of rows, two vectors at a time.
template <class Part>
static MEMATTN_INLINE void for_columns(int64_t width, Part part) {
  int64_t d = 0;
  for (; d + 2 * VL <= width; d += 2 * VL) part(std::integral_constant<int, 2>(), d);
  if (d < width) part(std::integral_constant<int, 1>(), d);
}

// rows[lane, :] (with `alpha`: alpha[lane] * rows[lane, :]) += sum over n units of keys, `begin` the first
// key, of weights[unit][lane] * keys[unit, :], in runs of `run` units. A row of weights has STEP lanes, of
// which those of all arguments are counted from lane 0 of the tile.
template <int STEP, class Unit = Floats>
static MEMATTN_INLINE void add_to_rows(const Interval& seen, Lanes panel, int64_t begin, int64_t n,
                                       int64_t run, const float* weights, Rows keys, int64_t width,
                                       const float* alpha, float* rows) {
  for (int64_t k = 0; k < n; k += run) {
    const int64_t terms = n - k < run ? n - k : run;
    const int64_t first = begin + k * Unit::NUMBERS;
    const Lanes lanes = lanes_that_see(seen, panel, first, first + terms * Unit::NUMBERS);
    const float* w = weights + k * STEP + lanes.first;
    for_columns(width, [&](auto nv, int64_t d) {
      const float* from = keys.data + k * keys.stride + d;
      float* to = rows + lanes.first * width + d;
      const int64_t m = lanes.last - lanes.first;
      if (alpha && k == 0)
        product<nv, Store::scale_rows, false, Unit>(m, 1, terms, w, STEP, 0, from, keys.stride, 0,
                                                    to, width, alpha + lanes.first);
      else
        product<nv, Store::add, false, Unit>(m, 1, terms, w, STEP, 0, from, keys.stride, 0, to, width,
                                             nullptr);
    });
  }
}

// keys[j, :] += sum over `lanes` of weights[j][lane] * rows[lane, :] for n keys, `begin` the first, both in
// units of lanes; at most `run` units are summed in one go, counted from lane 0.
template <class Unit = Floats>
static void add_to_keys(const Interval& seen, Lanes lanes, int64_t begin, int64_t n, int64_t run,
                        const float* weights, const float* rows, int64_t width, float* keys) {
  constexpr int64_t GROUP = Unit::HAS_TILES ? 32 : 24;  // keys handled with one choice of lanes
  constexpr int64_t STEP = TILE_ROWS / Unit::NUMBERS;
  for (int64_t j = 0; j < n; j += GROUP) {
    const int64_t here = n - j < GROUP ? n - j : GROUP;
    Lanes some = lanes_that_see(seen, lanes, begin + j, begin + j + here);
    some.first /= Unit::NUMBERS, some.last = (some.last + Unit::NUMBERS - 1) / Unit::NUMBERS;
    for (int64_t i = some.first, end; i < some.last; i = end) {
      end = i / run * run + run < some.last ? i / run * run + run : some.last;
      for_columns(width, [&](auto nv, int64_t d) {
        product<nv, Store::add, true, Unit>(here, 1, end - i, weights + j * STEP + i, STEP, 0,
                                            rows + i * width + d, width, 0, keys + j * width + d, width,
                                            nullptr);
      });
    }
  }
}
