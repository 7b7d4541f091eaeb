// The query rows that selected a chapter, gathered to tiles, and the rows of a chapter.
//
// Included once per instruction set after attention_rows.h. Derivation: docs/chapter_attention.md.

constexpr int64_t CHAPTER_KEYS = 128;  // keys of a chapter that a tile has at a time

typedef vf vf_unaligned __attribute__((aligned(4)));

// How the rows of a class are summed.
static MEMATTN_INLINE SumRuns class_runs(int row_class) {
  return {row_class + 1 < ROW_CLASSES ? ROW_CLASS_KEYS[row_class] : INT32_MAX, false};
}

// The query rows of a tile, row i in lane i.
struct ChapterLanes {
  int64_t n = 0;
  int32_t b[TILE_ROWS], head[TILE_ROWS], t[TILE_ROWS];
  int32_t entry[TILE_ROWS];  // of the chapter's list
  // slots of the row that hold the chapter, and the sum of their weights
  float number[TILE_ROWS], weight[TILE_ROWS];
};

// A panel of a tile: lanes [first, first + n), n no more than a panel has.
struct Panel {
  int64_t first, n;
};

// Calls visit(panel, number of vectors) for the panels of a tile: thin ones have a single vector.
template <class Visit>
static MEMATTN_INLINE void for_each_panel(int64_t lanes, Visit visit) {
  for (int64_t first = 0; first < lanes;) {
    const int64_t left = lanes - first;
    if (left <= VL) {
      visit(Panel{first, left}, std::integral_constant<int, 1>());
      return;
    }
    visit(Panel{first, left < 2 * VL ? left : 2 * VL}, std::integral_constant<int, 2>());
    first += 2 * VL;
  }
}

// How many slots of a routing row hold chapter c, and the sum of their weights, whatever their order.
static void count_slots(const ChapterArgs& a, int64_t row, int64_t c, float* number, float* weight) {
  const int32_t* slots = a.indices + row * a.K;
  const float* weights = a.weights ? a.weights + row * a.K : nullptr;
  int64_t n = 0;
  float sum = 0.0f;
  bool is_nan = false;
  // a slot without weight is empty where chapters share a softmax
  auto is_held = [&](int64_t s) { return slots[s] == c && !(a.is_joint && weights && weights[s] <= 0.0f); };
  for (int64_t s = 0; s < a.K; ++s) {
    if (!is_held(s)) continue;
    ++n;
    if (weights) sum += weights[s], is_nan |= weights[s] != weights[s];
  }
  if (!weights) sum = (float)n;
  if (weights && n > 2 && !is_nan) {  // smallest first
    sum = 0.0f;
    float last = -__builtin_inff();
    for (int64_t added = 0; added < n;) {
      float next = __builtin_inff();
      int64_t times = 0;
      for (int64_t s = 0; s < a.K; ++s) {
        if (!is_held(s) || weights[s] < last || (weights[s] == last && added)) continue;
        if (weights[s] < next || !times) next = weights[s], times = 0;
        times += weights[s] == next;
      }
      for (int64_t i = 0; i < times; ++i) sum += next;
      added += times, last = next;
    }
  }
  *number = (float)n, *weight = sum;
}

// Entries of a list.
struct Entries {
  int64_t begin, end;
};

// The first i in [begin, end) that holds, where all behind it do; else end.
template <class Holds>
static MEMATTN_INLINE int64_t first_that(int64_t begin, int64_t end, Holds holds) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (holds(middle)) end = middle;
    else begin = middle + 1;
  }
  return begin;
}

// Routing rows b * N + n that have queries of a range.
static Entries rows_of(const ChapterArgs& a, const QueryRange& range) {
  const int64_t first = range.b * a.N, last = first + a.N;
  return {first_that(first, last, [&](int64_t r) { return a.row_end[r] > range.t0; }),
          first_that(first, last, [&](int64_t r) { return a.row_start[r] >= range.t1; })};
}

// Those of them that selected chapter c.
static Entries entries_of(const ChapterArgs& a, int64_t c, const Entries& rows) {
  const int64_t begin = a.chapter_begin[c], end = a.chapter_begin[c + 1];
  return {first_that(begin, end, [&](int64_t e) { return a.entries[e] >= rows.begin; }),
          first_that(begin, end, [&](int64_t e) { return a.entries[e] >= rows.end; })};
}

// Calls visit(lanes) for the tiles of rows of one class that selected chapter c, in the order of the
// entries, with queries [t0, t1) of each sequence.
template <class Visit>
static MEMATTN_INLINE void for_each_tile(const ChapterArgs& a, int64_t c, int64_t hkv,
                                         const Entries& entries, int64_t t0, int64_t t1,
                                         int row_class, Visit visit) {
  const int64_t G = a.H / a.Hkv;
  ChapterLanes lanes;
  int64_t b = 0;
  for (int64_t e = entries.begin; e < entries.end; ++e) {
    const int64_t row = a.entries[e];
    if (a.row_class[row] != row_class) continue;
    if (row >= (b + 1) * a.N) b = row / a.N;
    const int64_t first = a.row_start[row] > t0 ? a.row_start[row] : t0;
    const int64_t last = a.row_end[row] < t1 ? a.row_end[row] : t1;
    float number = 1.0f, weight = 1.0f;
    if (a.counts_slots && first < last) count_slots(a, row, c, &number, &weight);
    for (int64_t h = hkv * G; h < (hkv + 1) * G; ++h)
      for (int64_t t = first; t < last; ++t) {
        const int64_t i = lanes.n++;
        lanes.b[i] = (int32_t)b, lanes.head[i] = (int32_t)h, lanes.t[i] = (int32_t)t;
        lanes.entry[i] = (int32_t)e;
        lanes.number[i] = number, lanes.weight[i] = weight;
        if (lanes.n == TILE_ROWS) visit(lanes), lanes.n = 0;
      }
  }
  if (lanes.n) visit(lanes);
}

// Rows of `view` as float32 [lanes rounded up][ld], zero past `width` and in lanes without a row.
static void gather_rows(const View& view, const ChapterLanes& lanes, int64_t width, int64_t ld,
                        float* to) {
  const int64_t n = round_up(lanes.n, VL);
  for (int64_t i = 0; i < n; ++i, to += ld) {
    const int64_t m = i < lanes.n ? width : 0;
    if (m) load_row(view, at(view, lanes.b[i], lanes.head[i], lanes.t[i]), view.stride[3], m, to);
    __builtin_memset(to + m, 0, (ld - m) * 4);
  }
}

// Those rows as panels, each [width][lanes of the panel], one behind the other.
static void rows_to_panels(const float* rows, int64_t ld, int64_t lanes, int64_t width,
                           float* panels) {
  for_each_panel(lanes, [&](const Panel& panel, auto nv) {
    constexpr int64_t PANEL = nv * VL;
    // what lies behind the last row is zero for a whole number of vectors only
    to_panels(rows + panel.first * ld, ld, round_up(panel.n, VL), width, PANEL,
              panels + panel.first * width);
  });
}

// Row j of chapter c as float32, zero past `width`.
static void load_bank_row(const BankView& bank, int64_t c, int64_t hkv, int64_t j, int64_t width,
                          int64_t ld, float* to) {
  const int64_t* stride = bank.view.stride;
  const int64_t offset = c * stride[0] + hkv * stride[1] + j * stride[2];
  __builtin_memset(to + width, 0, (ld - width) * 4);
  if (!bank.bits) {
    load_row(bank.view, offset, stride[3], width, to);
    return;
  }
  const int8_t* codes = (const int8_t*)bank.view.data + offset;
  const float scale = bank.scale[c * bank.scale_stride[0] + hkv * bank.scale_stride[1] +
                                 j * bank.scale_stride[2]];
  if (bank.bits == 8) {
    if (stride[3] == 1) for (int64_t i = 0; i < width; ++i) to[i] = (float)codes[i] * scale;
    else for (int64_t i = 0; i < width; ++i) to[i] = (float)codes[i * stride[3]] * scale;
    return;
  }
  for (int64_t i = 0; i < width / 2; ++i) {
    const int8_t pair = codes[i * stride[3]];
    to[2 * i] = (float)((int8_t)(pair << 4) >> 4) * scale;
    to[2 * i + 1] = (float)(pair >> 4) * scale;
  }
}

// The keys and values of a chapter, a block of them at a time.
struct ChapterBlocks {
  const ChapterArgs& a;
  int64_t c, hkv, ldk, ldv;
  float *key, *value;  // [CHAPTER_KEYS][ldk or ldv]
  int64_t n = 0;       // keys of the block
  int64_t loaded = -1;

  bool is_one() const { return a.M <= CHAPTER_KEYS; }
  int64_t count() const { return (a.M + CHAPTER_KEYS - 1) / CHAPTER_KEYS; }

  void load(int64_t block) {
    if (loaded == block) return;
    loaded = block;
    const int64_t first = block * CHAPTER_KEYS, left = a.M - first;
    n = left < CHAPTER_KEYS ? left : CHAPTER_KEYS;
    for (int64_t j = 0; j < n; ++j) {
      load_bank_row(a.key, c, hkv, first + j, a.D, ldk, key + j * ldk);
      load_bank_row(a.value, c, hkv, first + j, a.Dv, ldv, value + j * ldv);
    }
  }
};

// rows [lanes][ld] (=, or with `add` +=) sum over n keys of weights[key][lane] * keys[key][:], in runs
// of `run` keys. PANEL: lanes of the panel of weights.
template <int PANEL>
static void weighted_rows(int64_t lanes, int64_t n, int64_t run, const float* weights,
                          const float* keys, int64_t ld, bool add, float* rows) {
  auto part = [&](auto nv, int64_t d, int64_t k) {
    const int64_t terms = n - k < run ? n - k : run;
    const float *w = weights + k * PANEL, *from = keys + k * ld + d;
    if (k || add)
      product<nv, Store::add, false>(lanes, 1, terms, w, PANEL, 0, from, ld, 0, rows + d, ld,
                                     nullptr);
    else
      product<nv, Store::set, false>(lanes, 1, terms, w, PANEL, 0, from, ld, 0, rows + d, ld,
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

// Hands out aligned pieces of a thread's scratch.
struct Pieces {
  float* next;
  float* take(int64_t floats) {
    float* from = next;
    next += round_up(floats, 16);
    return from;
  }
};
