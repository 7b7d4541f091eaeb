// Future attention and its loss, one tile of queries at a time, forward and backward.
//
// Included once per instruction set after segmented_attention_tile.h. A tile walks three kinds of
// keys in blocks: the tokens of its past, the rows of the future table, and, for the target of the
// loss, the tokens of the band ahead. Each tells each query the interval of its keys. Past and
// future have softmax states of their own, merged at the end, so that the state of the past also
// serves the softmax of the target. Derivation: docs/future_attention.md.

enum Keys : int { PAST, FUTURE, AHEAD };

// The queries of a tile, row r of lane r.
struct FutureTileRows {
  int64_t n;      // rows
  int64_t lanes;  // rounded up to whole panels
  int64_t head[TILE_ROWS], t[TILE_ROWS], flat[TILE_ROWS];
  const FutureRow* range[TILE_ROWS];

  FutureTileRows(const FutureArgs& a, const Tile& tile, int64_t panel) {
    n = 0;
    for (int64_t h = tile.h0; h < tile.h1; ++h)
      for (int64_t i = tile.t0; i < tile.t1; ++i, ++n) {
        head[n] = h, t[n] = i, flat[n] = (tile.b * a.H + h) * a.T + i;
        range[n] = a.rows + tile.b * a.rows_stride + i;
      }
    lanes = round_up(n, panel);
  }

  bool empty(int64_t i) const {
    const FutureRow& r = *range[i];
    return r.lo >= r.hi && r.future_lo >= r.future_hi;
  }

  // A row that sees few keys has large weights, and so has the table's row after it, which few
  // other queries see.
  SumRuns sum_runs() const {
    int64_t lo = INT32_MAX, hi = 0, most_future = 0, least = INT32_MAX;
    for (int64_t i = 0; i < n; ++i) {
      if (empty(i)) continue;
      const FutureRow& r = *range[i];
      const int64_t future = r.future_hi - r.future_lo, keys = r.mid - r.lo + future;
      if (r.lo < r.hi) lo = r.lo < lo ? r.lo : lo, hi = r.hi > hi ? r.hi : hi;
      most_future = future > most_future ? future : most_future;
      least = keys < least ? keys : least;
    }
    return {(lo < hi ? hi - lo : 0) + most_future, least <= SumRuns::FEW / 2};
  }
};

// Calls visit(kind of keys, block) for every block of keys that some row of the tile sees.
template <class Scratch, class Visit>
static void for_each_future_block(const FutureArgs& a, const Tile& tile, const FutureTileRows& rows,
                                  int64_t panel, const FutureGrads* grads, bool with_target,
                                  Scratch scratch, Visit visit) {
  const int64_t ldk = round_up(a.D, VL), ldv = round_up(a.Dv, VL), group = a.H / a.Hf;
  Interval seen;
  // lanes past the last row repeat it: they cost no mask, and nobody reads them
  auto fill = [&](auto interval) {
    for (int64_t i = 0; i < rows.lanes; ++i)
      interval(i < rows.n ? i : rows.n - 1, seen.lo[i], seen.hi[i]);
    seen.summarise(rows.lanes, panel);
  };
  auto walk = [&](Keys kind, const View& key, const View& value, int64_t head, float* d_key,
                  float* d_value, int64_t grads_begin) {
    walk_source({key, value, at(key, tile.b, head, 0), at(value, tile.b, head, 0), 2, d_key, d_value,
                 grads_begin},
                seen, a.D, a.Dv, scratch, [&](const auto& block) { visit(kind, block); });
  };
  auto walk_tokens = [&](Keys kind) {
    walk(kind, a.key, a.value, tile.hkv, grads ? grads->d_key : nullptr,
         grads ? grads->d_value : nullptr, grads ? grads->key_begin : 0);
  };

  int32_t first = INT32_MAX, last = INT32_MIN;
  for (int64_t i = 0; i < rows.n; ++i) {
    const FutureRow& r = *rows.range[i];
    if (r.future_lo >= r.future_hi) continue;
    first = r.table < first ? r.table : first, last = r.table > last ? r.table : last;
  }
  for (int64_t head = tile.h0 / group; head * group < tile.h1; ++head)
    for (int32_t table = first; table <= last; ++table) {
      fill([&](int64_t i, int32_t& lo, int32_t& hi) {
        const FutureRow& r = *rows.range[i];
        const bool sees = r.table == table && rows.head[i] / group == head;
        lo = sees ? r.future_lo : 0, hi = sees ? r.future_hi : 0;
      });
      const int64_t sums = grads ? grads->future_rows * (ldk + ldv) : 0;  // of a head
      const int64_t base = grads ? (head - grads->table_head_begin) * sums : 0;
      walk(FUTURE, a.future_key, a.future_value, head,
           grads ? grads->d_future_key + base : nullptr,
           grads ? grads->d_future_value + base : nullptr, grads ? grads->future_begin : 0);
    }
  if (with_target) {
    fill([&](int64_t i, int32_t& lo, int32_t& hi) {
      lo = rows.range[i]->mid, hi = rows.range[i]->hi;
    });
    walk_tokens(AHEAD);
  }
  fill([&](int64_t i, int32_t& lo, int32_t& hi) {
    lo = rows.range[i]->lo, hi = rows.range[i]->mid;
  });
  walk_tokens(PAST);
}

// ---- the loss of one row, from its prediction x and its target y -------------------------------

// the norm, at least the 1e-8 of torch.nn.functional.cosine_similarity
struct Norm {
  double exact = 0.0, clamped;
  Norm(const float* x, int64_t n) {
    for (int64_t d = 0; d < n; ++d) exact += (double)x[d] * x[d];
    exact = __builtin_sqrt(exact);
    clamped = exact < 1e-8 ? 1e-8 : exact;
  }
};

static double cosine(const float* x, const float* y, int64_t n, double norms) {
  double dot = 0.0;
  for (int64_t d = 0; d < n; ++d) dot += (double)x[d] * y[d];
  return dot / norms;
}

static double row_loss(FutureLoss loss, const float* x, const float* y, int64_t n) {
  if (loss == FutureLoss::cosine)
    return 0.5 - 0.5 * cosine(x, y, n, Norm(x, n).clamped * Norm(y, n).clamped);
  double sum = 0.0;
  for (int64_t d = 0; d < n; ++d) sum += ((double)x[d] - y[d]) * ((double)x[d] - y[d]);
  return sum / (double)n;
}

// `factor` times the gradient by x; the loss is symmetric, so that by y is the same function
static void row_loss_gradient(FutureLoss loss, double factor, const float* x, const float* y,
                              int64_t n, float* d_x) {
  if (loss == FutureLoss::mse) {
    const double by_x = factor * 2.0 / (double)n;
    for (int64_t d = 0; d < n; ++d) d_x[d] = (float)(by_x * ((double)x[d] - y[d]));
    return;
  }
  const Norm nx(x, n), ny(y, n);
  const double norms = nx.clamped * ny.clamped, cos = cosine(x, y, n, norms);
  const double by_y = -0.5 * factor / norms;
  const double by_x = nx.exact > 0.0 ? 0.5 * factor * cos / (nx.clamped * nx.exact) : 0.0;
  for (int64_t d = 0; d < n; ++d) d_x[d] = (float)(by_y * y[d] + by_x * x[d]);
}

// ---- forward -----------------------------------------------------------------------------------

// The maximum of one softmax, in units of log 2 as a sum of two floats, and the sum of its weights.
struct Weighed {
  float high = 0.0f, low = 0.0f;
  double sum = 0.0;

  double top() const { return (double)high + low; }
};

// Two softmaxes as one: the factor of each one's weighted sum, and the log-sum-exp.
struct Merged {
  float first = 0.0f, second = 0.0f;
  RowLse lse{0.0f, 0.0f, 0.0};

  Merged(const Weighed& a, const Weighed& b) {
    // compared so that NaN counts as a weight: it must reach the output
    const bool has_a = a.sum != 0.0, has_b = b.sum != 0.0;
    if (!has_a && !has_b) return;
    const Weighed& most = !has_b || (has_a && a.top() > b.top()) ? a : b;
    const double in_a = has_a ? __builtin_exp2(a.top() - most.top()) : 0.0;
    const double in_b = has_b ? __builtin_exp2(b.top() - most.top()) : 0.0;
    const double sum = in_a * a.sum + in_b * b.sum;
    first = (float)(in_a / sum), second = (float)(in_b / sum);
    lse = RowLse(most.high, most.low, sum);
  }
};

template <class How, int NV>
static void future_forward_tile(const FutureArgs& a, const Tile& tile, float* scratch) {
  constexpr int64_t PANEL = NV * VL;
  const FutureTileRows rows(a, tile, PANEL);
  const bool with_target = a.walks_target(false);
  const int64_t ldk = round_up(a.D, VL), ldv = round_up(a.Dv, VL);
  auto take = [&scratch](int64_t n) {
    float* from = scratch;
    scratch += round_up(n, 16);
    return from;
  };
  float* q = take(TILE_ROWS * a.D);  // [panel][D][PANEL]
  float* future_q = a.separate_query ? take(TILE_ROWS * a.D) : q;
  float* acc[3];  // [panel][Dv][PANEL]
  for (float*& sums : acc) {
    sums = take(TILE_ROWS * a.Dv);
    __builtin_memset(sums, 0, rows.lanes * a.Dv * 4);
  }
  float* scores = take(How::score_floats(PANEL));
  float* block_scratch = take(How::block_floats(a.D, a.Dv));
  float* loose = take(2 * TILE_ROWS * (ldk > ldv ? ldk : ldv));  // rows of the tile
  const auto scale2 = How::exponent(a.scale);
  const SumRuns runs = rows.sum_runs();
  How::panels(a.query, tile, rows, a.D, PANEL, loose, q);
  if (a.separate_query) How::panels(a.future_query, tile, rows, a.D, PANEL, loose, future_q);
  SoftmaxState<NV> states[3][TILE_ROWS / PANEL];
  clear<NV>(states[0], 3 * TILE_ROWS / PANEL);

  for_each_future_block(a, tile, rows, PANEL, nullptr, with_target,
                        How::block_scratch(block_scratch, false), [&](Keys kind, const auto& block) {
    // the loss is a mean over so many numbers that it tells more than bfloat16 does
    const bool fine = with_target && kind != PAST;
    How::template take_keys<NV>(block, rows.lanes, a.D, a.Dv, runs, fine, scale2,
                                kind == FUTURE ? future_q : q, scores, states[kind], acc[kind]);
  });

  float norm[3][TILE_ROWS];
  for (int64_t i = 0; i < rows.lanes; ++i) {
    auto state = [&](Keys kind) {
      const SoftmaxState<NV>& s = states[kind][i / PANEL];
      const int64_t v = i % PANEL / VL, lane = i % VL;
      return Weighed{s.high[v][lane], s.low[v][lane], s.sum[v][lane]};
    };
    const Merged both(state(PAST), state(FUTURE));
    norm[PAST][i] = both.first, norm[FUTURE][i] = both.second;
    if (i < rows.n) {
      a.lse[rows.flat[i]] = both.lse.natural;
      a.lse2_high[rows.flat[i]] = both.lse.high, a.lse2_low[rows.flat[i]] = both.lse.low;
    }
    if (!with_target) continue;
    // only rows that count have a target
    const bool counts = i < rows.n && rows.range[i]->mid < rows.range[i]->hi;
    const Merged real(counts ? state(PAST) : Weighed{}, counts ? state(AHEAD) : Weighed{});
    norm[AHEAD][i] = real.second;
    if (i < rows.n)
      a.target2_high[rows.flat[i]] = real.lse.high, a.target2_low[rows.flat[i]] = real.lse.low;
  }
  for (int64_t p = 0; p * PANEL < rows.lanes; ++p)
    for (int64_t v = 0; v < NV; ++v) {
      vf n[3], *column[3];
      for (int kind = PAST; kind <= AHEAD; ++kind) {
        __builtin_memcpy(&n[kind], norm[kind] + p * PANEL + v * VL, sizeof(vf));
        column[kind] = (vf*)(acc[kind] + p * a.Dv * PANEL) + v;
      }
      // a sum without weight may be NaN times 0
      auto part = [&](Keys kind, int64_t d) {
        return select(n[kind] == 0.0f, vf{}, column[kind][d * NV] * n[kind]);
      };
      for (int64_t d = 0; d < a.Dv; ++d) {
        column[FUTURE][d * NV] = part(FUTURE, d);
        column[PAST][d * NV] = part(PAST, d) + column[FUTURE][d * NV];
        if (with_target) column[AHEAD][d * NV] = part(AHEAD, d);
      }
    }
  float *future = loose, *other = loose + TILE_ROWS * ldv;
  from_panels(acc[PAST], PANEL, rows.lanes, a.Dv, ldv, other);
  for (int64_t i = 0; i < rows.n; ++i)
    store_row(a.out, rows.flat[i] * a.Dv, 1, a.Dv, other + i * ldv);
  from_panels(acc[FUTURE], PANEL, rows.lanes, a.Dv, ldv, future);
  for (int64_t i = 0; i < rows.n; ++i)
    store_row(a.out_future, rows.flat[i] * a.Dv, 1, a.Dv, future + i * ldv);
  if (!with_target) return;
  from_panels(acc[AHEAD], PANEL, rows.lanes, a.Dv, ldv, other);
  for (int64_t i = 0; i < rows.n; ++i) {
    const bool counts = rows.range[i]->mid < rows.range[i]->hi;
    store_row(a.target, rows.flat[i] * a.Dv, 1, a.Dv, other + i * ldv);
    a.row_loss[rows.flat[i]] =
        counts ? row_loss(a.loss, future + i * ldv, other + i * ldv, a.Dv) : 0.0;
  }
}

template <class How>
static int64_t future_forward_scratch(const FutureArgs& a) {
  const int64_t wide = round_up(a.D, VL) + round_up(a.Dv, VL);
  return 5 * TILE_ROWS * wide + How::block_floats(a.D, a.Dv) + How::score_floats(2 * VL) + 256;
}

template <class How>
static void future_forward_by(const FutureArgs& a, const Tile& tile, float* scratch) {
  const int64_t n = (tile.h1 - tile.h0) * (tile.t1 - tile.t0);
  n <= VL ? future_forward_tile<How, 1>(a, tile, scratch)
          : future_forward_tile<How, 2>(a, tile, scratch);
}
