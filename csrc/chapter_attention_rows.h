// The query rows that selected a chapter, gathered to tiles, and the rows of a chapter.
//
// Included once per instruction set after attention_rows.h. Derivation: docs/chapter_attention.md.

constexpr int64_t CHAPTER_KEYS = 128;  // keys of a chapter that a tile has at a time

// How the rows of a class are summed.
static MEMATTN_INLINE SumRuns class_runs(int row_class) {
  return {row_class + 1 < ROW_CLASSES ? ROW_CLASS_KEYS[row_class] : INT32_MAX, false};
}

// The query rows of a tile, row i in lane i.
struct ChapterLanes {
  int64_t n = 0;
  int64_t c = 0;  // the chapter
  int64_t key_begin = 0, key_end = 0;  // keys of the next chapter to bring nearer meanwhile
  int32_t b[TILE_ROWS], head[TILE_ROWS], t[TILE_ROWS];
  int32_t entry[TILE_ROWS];  // of the chapter's list
  // slots of the row that hold the chapter, and the sum of their weights
  alignas(64) float number[TILE_ROWS] = {}, weight[TILE_ROWS] = {};
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

// Entries of a list, or routing rows.
struct Entries {
  int64_t begin = 0, end = 0;
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
  if (rows.begin == 0 && rows.end == a.B * a.N) return {begin, end};
  return {first_that(begin, end, [&](int64_t e) { return a.entries[e] >= rows.begin * a.K; }),
          first_that(begin, end, [&](int64_t e) { return a.entries[e] >= rows.end * a.K; })};
}

static MEMATTN_INLINE void fetch_bank_row(const BankView& bank, int64_t c, int64_t hkv, int64_t j,
                                          int64_t width) {
  const int64_t* stride = bank.view.stride;
  const int64_t offset = c * stride[0] + hkv * stride[1] + j * stride[2];
  if (bank.bits) fetch_bytes((const int8_t*)bank.view.data + offset, width * bank.bits / 8);
  else fetch_row(bank.view, offset, width);
}

// The tiles of rows of one class with queries [t0, t1), chapter by chapter, in the order of the entries.
class TileWalk {
 public:
  // Chapters [begin, end), and the routing rows `rows` with the tokens and the key head of a range.
  TileWalk(const ChapterArgs& a, const QueryRange& range, const Entries& rows, int row_class,
           int64_t begin, int64_t end)
      : a(a), t0(range.t0), t1(range.t1), h0(range.hkv * (a.H / a.Hkv)), h1(h0 + a.H / a.Hkv),
        row_class(row_class), end(end), rows(rows), c(begin - 1), ahead(list_of(begin)) {
    next_chapter();
  }

  // Calls visit(lanes, next) for the tiles of chapters below `last`, where `next` is the tile behind.
  template <class Visit>
  MEMATTN_INLINE void for_each(int64_t last, Visit visit) {
    ChapterLanes tiles[2];
    fill(tiles[0]);
    for (int i = 0; tiles[i].n && tiles[i].c < last; i ^= 1) {
      fill(tiles[i ^ 1]);
      visit((const ChapterLanes&)tiles[i], (const ChapterLanes&)tiles[i ^ 1]);
    }
  }

 private:
  const ChapterArgs& a;
  const int64_t t0, t1, h0, h1;
  const int row_class;
  const int64_t end;
  const Entries rows;
  int64_t c;            // the chapter,
  Entries list, ahead;  // its list and that of the next one
  int64_t e = 0, h = 0, t = 0;  // where the next tile begins
  bool is_entered = false;      // whether the row of entry e has been read
  int64_t b = 0, t_begin = 0, t_end = 0;
  float number = 1.0f, weight = 1.0f;

  Entries list_of(int64_t i) const { return i < end ? entries_of(a, i, rows) : Entries(); }

  void next_chapter() {
    ++c, list = ahead, ahead = list_of(c + 1), e = list.begin, b = 0;
  }

  // Reads the row of entry e; false where the walk passes it over.
  MEMATTN_INLINE bool enter() {
    const int64_t row = a.row_of(e);
    if (a.row_class[row] != row_class) return false;
    if (row >= (b + 1) * a.N) b = row / a.N;
    t_begin = a.row_start[row] > t0 ? a.row_start[row] : t0;
    t_end = a.row_end[row] < t1 ? a.row_end[row] : t1;
    if (a.has_repeats) count_slots(a, row, c, &number, &weight);
    else if (a.counts_slots) weight = a.weights[a.entries[e]];
    h = h0, t = t_begin;
    return t_begin < t_end;
  }

  void fill(ChapterLanes& lanes) {
    const int64_t first = e, keys = a.M < CHAPTER_KEYS ? a.M : CHAPTER_KEYS;
    lanes.n = 0;
    for (; c < end; next_chapter()) {
      lanes.c = c;
      for (; e < list.end; ++e, is_entered = false) {
        if (!is_entered && !enter()) continue;
        is_entered = true;
        for (; h < h1; ++h, t = t_begin)
          for (; t < t_end; ++t) {
            if (lanes.n == TILE_ROWS) return share(lanes, keys, first);
            const int64_t i = lanes.n++;
            lanes.b[i] = (int32_t)b, lanes.head[i] = (int32_t)h, lanes.t[i] = (int32_t)t;
            lanes.entry[i] = (int32_t)e;
            lanes.number[i] = number, lanes.weight[i] = weight;
          }
      }
      if (lanes.n) return share(lanes, keys, first);
    }
  }

  // Gives a tile, begun at entry `first`, its share of the next chapter's keys.
  void share(ChapterLanes& lanes, int64_t keys, int64_t first) {
    const int64_t begin = first < list.begin ? 0 : first - list.begin, n = list.end - list.begin;
    const bool is_wanted = ahead.begin < ahead.end;
    lanes.key_begin = is_wanted ? keys * begin / n : 0;
    lanes.key_end = is_wanted ? keys * (e - list.begin) / n : 0;
  }
};

// Brings nearer what the next tile reads, whose rows lie scattered, and keys of the next chapter: a part
// of it before the products of each panel. fetch(b, head, t) does so for a row.
template <class Fetch>
static MEMATTN_INLINE void fetch_ahead(const ChapterArgs& a, int64_t hkv, const ChapterLanes& lanes,
                                       const ChapterLanes& next, const Panel& panel, Fetch fetch) {
  const int64_t end = panel.first + panel.n, keys = lanes.key_end - lanes.key_begin;
  for (int64_t i = panel.first; i < next.n && (i < end || end == lanes.n); ++i)
    fetch(next.b[i], next.head[i], next.t[i]);
  for (int64_t j = keys * panel.first / lanes.n; j < keys * end / lanes.n; ++j) {
    fetch_bank_row(a.key, lanes.c + 1, hkv, lanes.key_begin + j, a.D);
    fetch_bank_row(a.value, lanes.c + 1, hkv, lanes.key_begin + j, a.Dv);
  }
}

// Query rows of `view` for the lanes of a panel, as panel [units of width][NV * VL], zero in lanes without
// a row; and, unless `rows` is null, as weighted sums of rows read them: [lanes rounded up][ld] numbers,
// zero past `width`. spare: [VL][ld].
template <class How, int NV>
static void gather_panel(const View& view, const ChapterLanes& lanes, const Panel& panel,
                         int64_t width, int64_t ld, float* spare, float* rows, float* to) {
  const int64_t units = How::units(width), step = round_up(units, VL);
  const bool in_place = How::lies_in_units(view) && view.stride[3] == 1 &&
                        width == step * How::Unit::NUMBERS;
  for (int64_t lane = 0; lane < panel.n; lane += VL) {
    const float* from[VL];
    for (int64_t k = 0; k < VL; ++k) {
      const int64_t i = panel.first + lane + k;
      const bool is_row = lane + k < panel.n;
      const int64_t offset = is_row ? at(view, lanes.b[i], lanes.head[i], lanes.t[i]) : 0;
      if (is_row && in_place) {
        from[k] = (const float*)((const char*)view.data + offset * 4 / How::Unit::NUMBERS);
        continue;
      }
      float* row = spare + k * step;
      if (is_row) How::row(view, offset, view.stride[3], width, row);
      __builtin_memset(row + (is_row ? units : 0), 0, (is_row ? step - units : step) * 4);
      from[k] = row;
    }
    for (int64_t d = 0; d < units; d += VL) {
      vf square[VL];
#pragma GCC unroll 16
      for (int k = 0; k < VL; ++k) square[k] = *(const vf_unaligned*)(from[k] + d);
      if (rows) How::keep_rows(square, lane, d, ld, rows);
      transpose(square);
      float* column = to + d * NV * VL + lane;
#pragma GCC unroll 16
      for (int k = 0; k < VL; ++k)
        if (d + k < units) *(vf*)(column + k * NV * VL) = square[k];
    }
  }
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
