// Task-masked attention, one tile of queries at a time, forward and backward.
//
// Included once per instruction set after attention_rows.h. A tile first lists the keys that its
// rows see: runs of keys that all of them see, and single keys with a bit for each lane. Keys that
// nobody sees are in neither, so they cost nothing and may hold anything. Where the single keys of
// a block do not lie side by side they are copied together, and their gradients are added apart.

// The queries of a tile, row r of lane r, and what they see. Positions count from the sequence's
// start.
struct TaskRows {
  struct Run {
    int32_t begin, end;
  };

  int64_t n;      // rows
  int64_t lanes;  // rounded up to whole panels
  int64_t head[TILE_ROWS], t[TILE_ROWS];
  // lanes as bits: those that hold a row, that see a key, that see at least 16 keys
  uint64_t rows, seeing = 0, sated = 0;
  // keys that all rows see, and keys with the lanes that see them
  Run* runs;
  int32_t* keys_seen;
  uint64_t* lanes_seen;
  int64_t n_runs = 0, n_keys = 0, in_runs = 0;

  TaskRows(const TaskArgs& a, const Tile& tile, int64_t panel, float*& scratch) {
    n = 0;
    for (int64_t h = tile.h0; h < tile.h1; ++h)
      for (int64_t i = tile.t0; i < tile.t1; ++i, ++n) head[n] = h, t[n] = a.start[tile.b] + i;
    lanes = round_up(n, panel);
    rows = low_bits(n);
    auto take = [&scratch](int64_t floats) {
      float* from = scratch;
      scratch += round_up(floats, 16);
      return from;
    };
    lanes_seen = (uint64_t*)take(2 * a.S);
    keys_seen = (int32_t*)take(a.S);
    runs = (Run*)take(2 * a.tile_cols);
    NodeQueries nodes{(uint64_t*)take(2 * a.nodes), (bool*)take((a.nodes + 3) / 4)};
    list_keys(a, tile, nodes);
  }

  static int64_t scratch(const TaskArgs& a) { return 3 * a.S + 3 * (a.tile_cols + a.nodes) + 80; }

  bool empty(int64_t i) const { return !(seeing >> i & 1); }
  // one row of few keys has large weights among whatever the others see
  SumRuns sum_runs() const { return {in_runs + n_keys, (seeing & ~sated) != 0}; }

 private:
  uint64_t counted[4] = {0, 0, 0, 0};  // the keys of each row, lowest bits first, until it is sated

  static uint64_t low_bits(int64_t n) { return n ? ~uint64_t{0} >> (64 - n) : 0; }

  // Queries from the tile's `begin`-th on, all of one node, or each of the node after the last.
  struct NodeRun {
    int64_t begin, n;
    int32_t node, step;

    // those whose bit is set in a row of bits
    uint64_t pick(const int32_t* row) const {
      const int32_t* word = row + node / 32;
      uint64_t bits = (uint32_t)*word >> node % 32;
      if (!step) return bits & 1 ? low_bits(n) << begin : 0;
      for (int64_t got = 32 - node % 32; got < n; got += 32)
        bits |= (uint64_t)(uint32_t)*++word << got;
      return (bits & low_bits(n)) << begin;
    }
  };

  // The queries of the tile that see keys of each node, found when they are first needed.
  struct NodeQueries {
    uint64_t* queries;  // [nodes]
    bool* known;        // [nodes]
    NodeRun runs[TILE_ROWS];
    int64_t n = 0;

    void clear(const TaskArgs& a, const Tile& tile) {
      __builtin_memset(known, 0, a.nodes);
      for (int64_t i = tile.t0; i < tile.t1; ++i) {
        const int32_t node = a.query_node[i], step = i > tile.t0 ? node - a.query_node[i - 1] : -1;
        NodeRun* last = n ? &runs[n - 1] : nullptr;
        if ((step == 0 || step == 1) && (last->n == 1 || last->step == step))
          ++last->n, last->step = step;
        else
          runs[n++] = {i - tile.t0, 1, node, 0};
      }
    }

    uint64_t of(int32_t node, const int32_t* row) {
      if (!known[node]) {
        queries[node] = 0, known[node] = true;
        for (int64_t i = 0; i < n; ++i) queries[node] |= runs[i].pick(row);
      }
      return queries[node];
    }
  };

  void list_keys(const TaskArgs& a, const Tile& tile, NodeQueries& nodes) {
    const int64_t queries = tile.t1 - tile.t0, heads = tile.h1 - tile.h0;
    const int64_t list = a.list(tile.b, tile.h0, tile.t0), n_full = a.query_counts[2 * list];
    const int64_t n_all = n_full + a.query_counts[2 * list + 1];
    const int32_t* tiles = a.query_tiles + list * a.tile_cols;
    const uint64_t each = low_bits(queries);  // the heads of a tile see the same
    uint64_t copies = 1;
    for (int64_t h = 1; h < heads; ++h) copies |= uint64_t{1} << h * queries;
    int64_t end = a.key_end[tile.b] - a.start[tile.b];
    if (a.is_causal && tile.t1 < end) end = tile.t1;
    // keys up to this one are not cut by causality
    const int64_t whole = a.is_causal ? tile.t0 + 1 : end;

    auto add_keys = [&](int64_t j, int64_t last, auto seen_by) {
      for (; j < last; ++j) {
        uint64_t seen = each & seen_by(j);
        if (j >= whole) seen &= ~uint64_t{0} << (j - tile.t0);
        keys_seen[n_keys] = (int32_t)j, lanes_seen[n_keys] = seen * copies;
        n_keys += seen != 0;
        count(seen * copies);
      }
    };
    if (a.nodes && n_full < n_all) nodes.clear(a, tile);
    for (int64_t i = 0; i < n_all; ++i) {
      int64_t j = tiles[i] * MASK_TILE;
      const int64_t last = j + MASK_TILE < end ? j + MASK_TILE : end;
      if (i < n_full) {
        const int64_t cut = last < whole ? last : whole;
        if (j < cut) {
          add_run(j, cut);
          j = cut;
        }
        add_keys(j, last, [](int64_t) { return ~uint64_t{0}; });
      } else if (a.slots) {
        const int64_t slot = a.slots[list * a.tile_cols + tiles[i]];
        const int32_t* bits = a.bits + slot * MASK_TILE * a.words + tile.t0 % MASK_TILE / 32;
        add_keys(j, last, [&](int64_t key) {
          const int32_t* word = bits + key % MASK_TILE * a.words;
          return (uint32_t)word[0] | (uint64_t)(uint32_t)word[1] << 32;
        });
      } else {
        const int32_t* graph = a.bits + list / a.tile_rows * a.nodes * a.words;
        add_keys(j, last, [&](int64_t key) {
          return nodes.of(a.key_node[key], graph + a.key_node[key] * a.words);
        });
      }
    }
  }

  void add_run(int64_t begin, int64_t end) {
    if (n_runs && runs[n_runs - 1].end == begin) runs[n_runs - 1].end = (int32_t)end;
    else runs[n_runs++] = {(int32_t)begin, (int32_t)end};
    in_runs += end - begin;
    seeing = rows;
    if (in_runs >= 16) sated = rows;
  }

  // one more key of these rows
  void count(uint64_t seen) {
    seeing |= seen;
    if (sated == rows) return;
    for (uint64_t& bit : counted) {
      const uint64_t carry = bit & seen;
      bit ^= seen, seen = carry;
    }
    sated |= seen;
  }
};

static MEMATTN_INLINE void prefetch_row(const View& view, int64_t offset, int64_t width) {
  const int64_t size = view.dtype == Dtype::float32 ? 4 : 2;
  const char* row = (const char*)view.data + offset * size;
  for (int64_t i = 0; i < width * size; i += 64) __builtin_prefetch(row + i);
}

// Rows `first` + keys[i] of a head, or from `first` on where there are no keys.
template <class How>
static MEMATTN_INLINE Rows task_rows(const View& view, int64_t head, int64_t first,
                                     const int32_t* keys, int64_t n, int64_t width, float* scratch) {
  const int64_t step = view.stride[2], ld = How::units(width);
  const int64_t at = head + first * step;
  if (!keys) return How::rows(view, at, step, view.stride[3], n, width, scratch);
  for (int64_t i = 0; i < n; ++i) {
    // the processor does not foresee where the next rows are
    if (i + 4 < n) prefetch_row(view, at + keys[i + 4] * step, width);
    How::row(view, at + keys[i] * step, view.stride[3], width, scratch + i * ld);
  }
  return {scratch, ld};
}

// Calls visit(block) for every block of keys that some row of the tile sees. `copies` takes the
// gradients of keys that do not lie side by side.
template <class How, class Scratch, class Visit>
static MEMATTN_INLINE void for_each_task_block(const TaskArgs& a, const Tile& tile,
                                               const TaskRows& rows, int64_t panel,
                                               const KeyGrads* grads, float* copies,
                                               Scratch scratch, Visit visit) {
  const int64_t ldk = round_up(a.D, VL), ldv = round_up(a.Dv, VL), start = a.start[tile.b];
  float* key_scratch = How::data(scratch);
  float* value_scratch = key_scratch + BLOCK_KEYS * How::units(a.D);
  for (int64_t run = 0; run <= rows.n_runs; ++run) {
    const bool by_lane = run == rows.n_runs;  // at last
    const int64_t begin = by_lane ? 0 : rows.runs[run].begin;
    const int64_t end = by_lane ? rows.n_keys : rows.runs[run].end;
    for (int64_t j = begin; j < end; j += BLOCK_KEYS) {
      typename How::template Block<LaneBlock> block;
      block.begin = 0, block.n = end - j < BLOCK_KEYS ? end - j : BLOCK_KEYS;
      block.lanes = by_lane ? rows.lanes_seen + j : nullptr;
      block.rows = rows.rows, block.panel = panel;
      const int32_t* keys = rows.keys_seen + j;
      bool side_by_side = true;
      if (by_lane)
        for (int64_t i = 1; i < block.n; ++i) side_by_side &= keys[i] == keys[i - 1] + 1;
      const int64_t first = start + (by_lane ? keys[0] : j);
      const int64_t from = side_by_side ? first : start;
      const int32_t* apart = side_by_side ? nullptr : keys;
      block.key = task_rows<How>(a.key, at(a.key, tile.b, tile.hkv, 0), from, apart, block.n, a.D,
                                 key_scratch);
      block.value = task_rows<How>(a.value, at(a.value, tile.b, tile.hkv, 0), from, apart, block.n,
                                   a.Dv, value_scratch);
      How::complete(block, a.D, a.Dv, scratch);
      block.d_key = block.d_value = nullptr;
      if (grads && side_by_side) {
        block.d_key = grads->d_key + (first - grads->key_begin) * ldk;
        block.d_value = grads->d_value + (first - grads->key_begin) * ldv;
      } else if (grads) {
        block.d_key = copies, block.d_value = copies + block.n * ldk;
        __builtin_memset(copies, 0, block.n * (ldk + ldv) * 4);
      }
      visit(block);
      if (!grads || side_by_side) continue;
      for (int64_t i = 0; i < block.n; ++i) {
        const int64_t row = start + keys[i] - grads->key_begin;
        for (int64_t d = 0; d < ldk; ++d) grads->d_key[row * ldk + d] += block.d_key[i * ldk + d];
        for (int64_t d = 0; d < ldv; ++d)
          grads->d_value[row * ldv + d] += block.d_value[i * ldv + d];
      }
    }
  }
}

template <class How, int NV>
static void task_forward_tile(const TaskArgs& a, const Tile& tile, float* scratch) {
  const TaskRows rows(a, tile, NV * VL, scratch);
  How::template forward<NV>(a, tile, rows, [&](auto block_scratch, auto visit) {
    for_each_task_block<How>(a, tile, rows, NV * VL, nullptr, nullptr, block_scratch, visit);
  }, scratch);
}

template <class How>
static void task_forward_by(const TaskArgs& a, const Tile& tile, float* scratch) {
  const int64_t n = (tile.h1 - tile.h0) * (tile.t1 - tile.t0);
  n <= VL ? task_forward_tile<How, 1>(a, tile, scratch)
          : task_forward_tile<How, 2>(a, tile, scratch);
}

template <class How>
static void task_backward_by(const TaskArgs& a, const Tile& tile, const KeyGrads& grads,
                             float* scratch) {
  constexpr int NV = 2;
  const TaskRows rows(a, tile, NV * VL, scratch);
  float* copies = scratch;  // [BLOCK_KEYS][ldk + ldv]
  scratch += BLOCK_KEYS * (round_up(a.D, VL) + round_up(a.Dv, VL));
  How::template backward<NV>(
      a, tile, rows, [&](bool with_gradients, auto block_scratch, auto visit) {
        for_each_task_block<How>(a, tile, rows, NV * VL, with_gradients ? &grads : nullptr, copies,
                                 block_scratch, visit);
      }, scratch);
}

template <class How>
static int64_t task_forward_scratch(const TaskArgs& a) {
  return TaskRows::scratch(a) + How::forward_scratch(a);
}

template <class How>
static int64_t task_backward_scratch(const TaskArgs& a) {
  const int64_t copies = BLOCK_KEYS * (round_up(a.D, VL) + round_up(a.Dv, VL));
  return TaskRows::scratch(a) + copies + How::backward_scratch(a);
}
