// What attention kernels share inside a tile: blocks of keys, and the masks of what lanes see.
//
// Included once per instruction set after tile_engine.h.

constexpr int64_t TILE_ROWS = 64;   // query rows of a tile; a multiple of every panel
constexpr int64_t BLOCK_KEYS = 96;  // keys of a block; a multiple of the micro-tile rows

// How many terms a tile sums in one go, by the keys that its rows see. The fewer they are, the less
// rounding errors average out, and the less time matters.
struct SumRuns {
  int64_t dims;    // of a dot product
  int64_t keys;    // of a weighted sum
  int64_t panels;  // of queries, in the gradient of a key
  bool few_keys;   // also goes through the keys twice in the backward

  static constexpr int64_t FEW = 64;
  SumRuns(int64_t n_keys, bool few_for_a_row) : few_keys(n_keys <= FEW || few_for_a_row) {
    if (few_keys) dims = 8, keys = 24, panels = 1;
    else if (n_keys <= 256) dims = 16, keys = 24, panels = 1;
    else dims = 64, keys = BLOCK_KEYS, panels = TILE_ROWS;  // all that a tile has at a time
  }
};

// Keys that one query lane may see, [lo, hi) counted in its source.
struct Interval {
  int32_t lo[TILE_ROWS], hi[TILE_ROWS];
  // bounds over each panel: of the union, and of what all lanes see
  int32_t any_lo[TILE_ROWS], any_hi[TILE_ROWS], all_lo[TILE_ROWS], all_hi[TILE_ROWS];
  int32_t min_lo, max_hi;

  void summarise(int64_t lanes, int64_t panel) {
    min_lo = INT32_MAX, max_hi = INT32_MIN;
    for (int64_t p = 0; p * panel < lanes; ++p) {
      any_lo[p] = INT32_MAX, any_hi[p] = INT32_MIN, all_lo[p] = INT32_MIN, all_hi[p] = INT32_MAX;
      for (int64_t i = p * panel; i < (p + 1) * panel; ++i) {
        if (lo[i] < hi[i]) {
          any_lo[p] = lo[i] < any_lo[p] ? lo[i] : any_lo[p];
          any_hi[p] = hi[i] > any_hi[p] ? hi[i] : any_hi[p];
        }
        all_lo[p] = lo[i] > all_lo[p] ? lo[i] : all_lo[p];
        all_hi[p] = hi[i] < all_hi[p] ? hi[i] : all_hi[p];
      }
      min_lo = any_lo[p] < min_lo ? any_lo[p] : min_lo;
      max_hi = any_hi[p] > max_hi ? any_hi[p] : max_hi;
    }
  }
};

// A block of keys, and where its gradients are summed.
struct KeyBlock {
  static constexpr bool FETCHES = false;  // whether fetch_some() brings later keys nearer
  Rows key, value;
  int64_t begin, n;  // keys [begin, begin + n) of their source
  float *d_key, *d_value;
};

// A block of keys; each lane sees an interval of them.
struct Block : KeyBlock {
  const Interval* seen;
};

// A block of keys with a mask for each key: the lanes that see it. Its keys are counted from 0.
struct LaneBlock : KeyBlock {
  const uint64_t* lanes;  // [n], bit i for lane i; null where all rows see all keys
  uint64_t rows;          // the lanes that hold a row
  int64_t panel;
};

// Keys of one source, row by row, and where their gradients are summed, from row `sums_begin` on.
struct Source {
  const View &key, &value;
  int64_t key_at, value_at;  // row 0
  int64_t row_axis;
  float *d_key, *d_value;  // null without gradients
  int64_t sums_begin;
};

// Brings `n` bytes nearer.
static MEMATTN_INLINE void fetch_bytes(const void* from, int64_t n) {
  for (int64_t i = 0; i < n; i += 64) __builtin_prefetch((const char*)from + i, 0, 2);
}

static MEMATTN_INLINE void fetch_row(const View& view, int64_t offset, int64_t width) {
  const int64_t size = view.dtype == Dtype::float32 ? 4 : 2;
  fetch_bytes((const char*)view.data + offset * size, width * size);
}

// Keys [j, j + n) of a source as float32; scratch: [BLOCK_KEYS][D + Dv].
static MEMATTN_INLINE Block load_block(const Source& s, int64_t j, int64_t n, int64_t D, int64_t Dv,
                                       float* scratch) {
  const int64_t key_step = s.key.stride[s.row_axis], value_step = s.value.stride[s.row_axis];
  Block block;
  block.key = float_rows(s.key, s.key_at + j * key_step, key_step, s.key.stride[s.row_axis + 1], n,
                         D, scratch);
  block.value = float_rows(s.value, s.value_at + j * value_step, value_step,
                           s.value.stride[s.row_axis + 1], n, Dv, scratch + BLOCK_KEYS * D);
  return block;
}

// Calls visit(block) for the blocks of a source that some lane sees, as load_block() has them.
template <class Scratch, class Visit>
static MEMATTN_INLINE void walk_source(const Source& s, const Interval& seen, int64_t D, int64_t Dv,
                                       Scratch scratch, Visit visit) {
  for (int64_t j = seen.min_lo; j < seen.max_hi; j += BLOCK_KEYS) {
    const int64_t left = seen.max_hi - j;
    const int64_t n = left < BLOCK_KEYS ? left : BLOCK_KEYS;
    auto block = load_block(s, j, n, D, Dv, scratch);
    block.begin = j, block.n = n, block.seen = &seen;
    block.d_key = s.d_key ? s.d_key + (j - s.sums_begin) * round_up(D, VL) : nullptr;
    block.d_value = s.d_value ? s.d_value + (j - s.sums_begin) * round_up(Dv, VL) : nullptr;
    visit(block);
  }
}

// Scores -inf outside the lanes' intervals; key j of the source in row j - first of `scores`. Keys
// that all lanes see are passed over. STEP: from one key to the next.
template <int NV, int STEP = NV * VL>
static void mask_panel(float* scores, const Interval& seen, int64_t p, int64_t first,
                       int64_t last) {
  constexpr int PANEL = NV * VL;
  vi lo[NV], hi[NV];
  for (int v = 0; v < NV; ++v) {
    __builtin_memcpy(&lo[v], seen.lo + p * PANEL + v * VL, sizeof(vi));
    __builtin_memcpy(&hi[v], seen.hi + p * PANEL + v * VL, sizeof(vi));
  }
  auto mask = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      vf* s = (vf*)(scores + (j - first) * STEP);
      for (int v = 0; v < NV; ++v) {
        const vi key = (int32_t)j - vi{};
        s[v] = select((key >= lo[v]) & (key < hi[v]), s[v], broadcast(-__builtin_inff()));
      }
    }
  };
  auto within = [last](int64_t j, int64_t low) { return j < low ? low : j < last ? j : last; };
  const int64_t all_first = within(seen.all_lo[p], first);
  mask(first, all_first);
  mask(within(seen.all_hi[p], all_first), last);
}

// Scores -inf where a lane does not see a key.
template <int NV, int STEP = NV * VL>
static void mask_panel(float* scores, const LaneBlock& block, int64_t p, int64_t first,
                       int64_t last) {
  constexpr int PANEL = NV * VL;
  vi bit[NV];
  for (int i = 0; i < PANEL; ++i) bit[i / VL][i % VL] = (int32_t)(uint32_t{1} << i);
  for (int64_t j = first; j < last; ++j) {
    const vi lanes = (int32_t)(uint32_t)(block.lanes[j] >> p * PANEL) - vi{};
    vf* s = (vf*)(scores + (j - first) * STEP);
    for (int v = 0; v < NV; ++v)
      s[v] = select((lanes & bit[v]) != 0, s[v], broadcast(-__builtin_inff()));
  }
}

template <int NV, int STEP = NV * VL>
static MEMATTN_INLINE void mask_panel(float* scores, const Block& block, int64_t p, int64_t first,
                                      int64_t last) {
  mask_panel<NV, STEP>(scores, *block.seen, p, first, last);
}

// Keys of a block that some lane of panel p sees, and whether all lanes see all of them.
struct Span {
  int64_t first, last;
  bool partial;
  Span(const LaneBlock& block, int64_t p) {
    first = 0, last = block.n, partial = false;
    if (!block.lanes) return;
    const uint64_t panel = ~uint64_t{0} >> (64 - block.panel) << p * block.panel;
    const uint64_t rows = block.rows & panel;
    while (first < last && !(block.lanes[first] & rows)) ++first;
    while (last > first && !(block.lanes[last - 1] & rows)) --last;
    uint64_t all = rows;
    for (int64_t j = first; j < last; ++j) all &= block.lanes[j];
    partial = all != rows;
  }
  Span(const Block& block, int64_t p) {
    const Interval& seen = *block.seen;
    const int64_t end = block.begin + block.n;
    first = block.begin > seen.any_lo[p] ? block.begin : seen.any_lo[p];
    last = end < seen.any_hi[p] ? end : seen.any_hi[p];
    partial = seen.all_lo[p] > first || seen.all_hi[p] < last;
  }
};

// The keys of a block that each panel sees, counted from its first; [0, 0) for none.
struct PanelSpans {
  int64_t first[TILE_ROWS], last[TILE_ROWS];

  template <class AnyBlock>
  MEMATTN_INLINE Span look(const AnyBlock& block, int64_t p) {
    const Span span(block, p);
    const bool sees_some = span.first < span.last;
    first[p] = sees_some ? span.first - block.begin : 0;
    last[p] = sees_some ? span.last - block.begin : 0;
    return span;
  }
  int64_t count(int64_t p) const { return last[p] - first[p]; }
};
