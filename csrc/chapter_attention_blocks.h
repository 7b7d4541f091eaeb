// Blocks of a chapter's keys, and how weighted sums of them are computed.
//
// Included once per instruction set after chapter_attention_rows.h.

// The keys and values of a chapter, a block of them at a time: where they lie if the kernels can read
// them there.
template <class How>
struct ChapterBlocks {
  const ChapterArgs& a;
  int64_t c, hkv;
  bool is_backward;
  float *key_copy, *value_copy, *summed_copy;  // [CHAPTER_KEYS][widths rounded up]
  Rows key{}, value{};            // rows of units along D or Dv
  const float* summed = nullptr;  // values, in the backward keys, as units of keys [units][width rounded up]
  int64_t n = 0, units = 0;       // keys of the block
  int64_t loaded = -1;

  bool is_one() const { return a.M <= CHAPTER_KEYS; }
  int64_t count() const { return (a.M + CHAPTER_KEYS - 1) / CHAPTER_KEYS; }

  void turn_to(int64_t chapter) {
    if (c != chapter) c = chapter, loaded = -1;
  }

  void load(int64_t block) {
    if (loaded == block) return;
    loaded = block;
    const int64_t first = block * CHAPTER_KEYS, left = a.M - first;
    n = left < CHAPTER_KEYS ? left : CHAPTER_KEYS;
    units = How::units(n);
    key = rows_of(a.key, first, a.D, key_copy);
    value = rows_of(a.value, first, a.Dv, value_copy);
    summed = is_backward ? How::summed(key, n, a.D, summed_copy)
                         : How::summed(value, n, a.Dv, summed_copy);
  }

 private:
  Rows rows_of(const BankView& bank, int64_t first, int64_t width, float* copy) {
    const int64_t* stride = bank.view.stride;
    const int64_t ld = round_up(How::units(width), VL), numbers = How::Unit::NUMBERS;
    const int64_t offset = c * stride[0] + hkv * stride[1] + first * stride[2];
    const char* in_place = (const char*)bank.view.data + offset * 4 / numbers;
    // rows further apart could share few sets of the cache
    if (!bank.bits && How::lies_in_units(bank.view) && width == ld * numbers && stride[3] == 1 &&
        stride[2] == width && (uintptr_t)in_place % sizeof(vf) == 0)
      return {(const float*)in_place, ld};
    for (int64_t j = 0; j < n; ++j) How::bank_row(bank, c, hkv, first + j, width, ld, copy + j * ld);
    return {copy, ld};
  }
};

// Weights and gradients of scores of a tile as sums over its lanes read them.
struct ChapterSums {
  const float *weights, *ds;  // of the panels: [CHAPTER_KEYS][units of lanes]
};

// How chapters are computed in floats; ChapterPairs has the same for bfloat16.
struct ChapterFloats : InFloats {
  using Unit = Floats;
  static MEMATTN_INLINE bool lies_in_units(const View& view) { return view.dtype == Dtype::float32; }
  static MEMATTN_INLINE void keep_rows(const vf* square, int64_t lane, int64_t d, int64_t ld,
                                       float* rows) {
#pragma GCC unroll 16
    for (int k = 0; k < VL; ++k) *(vf*)(rows + (lane + k) * ld + d) = square[k];
  }
  static void bank_row(const BankView& bank, int64_t c, int64_t hkv, int64_t j, int64_t width,
                       int64_t ld, float* to) {
    load_bank_row(bank, c, hkv, j, width, ld, to);
  }
  static const float* summed(const Rows& rows, int64_t, int64_t, float*) { return rows.data; }
  static int64_t more_scratch(const ChapterArgs&) { return 0; }

  // scores of n keys, or gradients of their weights, from a panel of queries or cotangents
  template <int NV>
  static void products(const Rows& keys, int64_t n, int64_t width, const SumRuns& runs,
                       const float* panel, float* to) {
    dot_products<NV>(n, width, runs.dims, keys.data, keys.stride, panel, NV * VL, to, NV * VL);
  }
  // takes scores into the state; returns their weights in the layout of a weighted sum
  template <int NV>
  static const float* weigh(float* scores, int64_t n, Split scale2, SoftmaxState<NV>* state,
                            vf* alpha) {
    softmax_step<NV>(scores, n, scale2, state, alpha);
    return scores;
  }
  // units that are summed in one go where floats are by `run`
  static int64_t run(int64_t run) { return run; }

  static ChapterSums sums(const ChapterArgs&, const float* weights, const float* ds, float*) {
    return {weights, ds};
  }
  // keeps the weights and gradients of a panel for sums over lanes; returns the latter for sums over keys
  template <int NV>
  static const float* keep_panel(const ChapterSums&, const Panel& panel, int64_t, const float*,
                                 const float* ds) {
    return ds + panel.first * CHAPTER_KEYS;
  }
};

// rows [lanes][ld] (=, or with `add` +=) sum over n units of keys of weights[unit][lane] * keys[unit][:],
// in runs of `run` units. PANEL: lanes of the panel of weights.
template <int PANEL, class Unit>
static void weighted_rows(int64_t lanes, int64_t n, int64_t run, const float* weights,
                          const float* keys, int64_t ld, bool add, float* rows) {
  auto part = [&](auto nv, int64_t d, int64_t k) {
    const int64_t terms = n - k < run ? n - k : run;
    const float *w = weights + k * PANEL, *from = keys + k * ld + d;
    if (k || add)
      product<nv, Store::add, false, Unit>(lanes, 1, terms, w, PANEL, 0, from, ld, 0, rows + d, ld,
                                           nullptr);
    else
      product<nv, Store::set, false, Unit>(lanes, 1, terms, w, PANEL, 0, from, ld, 0, rows + d, ld,
                                           nullptr);
  };
  int64_t d = 0;
  for (; d + 2 * VL <= ld; d += 2 * VL)
    for (int64_t k = 0; k < n; k += run) part(std::integral_constant<int, 2>(), d, k);
  if (d < ld)
    for (int64_t k = 0; k < n; k += run) part(std::integral_constant<int, 1>(), d, k);
}

// to = alpha * to + beta * from
static MEMATTN_INLINE void scale_and_add(float* to, const float* from, int64_t width, float alpha,
                                         float beta) {
  int64_t d = 0;
  for (; d + VL <= width; d += VL) {
    vf_unaligned* row = (vf_unaligned*)(to + d);
    *row = *row * alpha + *(const vf_unaligned*)(from + d) * beta;
  }
  for (; d < width; ++d) to[d] = to[d] * alpha + from[d] * beta;
}
