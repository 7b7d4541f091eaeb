// Softmax attention of one tile of queries, forward and backward, whatever keys its rows see.
//
// Included once per instruction set after attention_tile.h. The rows of a tile say how many they
// are (n, and lanes: rounded up to whole panels), the head[i] and t[i] of each, which are empty(i)
// because they see no key, and the sum_runs().

static MEMATTN_INLINE int64_t at(const View& v, int64_t b, int64_t h, int64_t t) {
  return b * v.stride[0] + h * v.stride[1] + t * v.stride[2];
}

// What a kind of rows may have a function of its own for: where row i lies in a tensor like the
// query, and its number among all rows;
template <class QueryRows>
static MEMATTN_INLINE int64_t place_of(const View& v, const Tile& tile, const QueryRows& rows,
                                       int64_t i) {
  return at(v, tile.b, rows.head[i], rows.t[i]);
}

template <class QueryRows>
static MEMATTN_INLINE int64_t column_step(const View& v, const QueryRows&) {
  return v.stride[3];
}

template <class Args, class QueryRows>
static MEMATTN_INLINE int64_t number_of(const Args& a, const Tile& tile, const QueryRows& rows,
                                        int64_t i) {
  return (tile.b * a.H + rows.head[i]) * a.T + rows.t[i];
}

// how its scores are capped;
template <class Args, class QueryRows>
static MEMATTN_INLINE Uncapped cap_of(const Args&, const QueryRows&) { return {}; }

// how its result is stored;
template <class Args, class QueryRows>
static MEMATTN_INLINE void store_result(const Args& a, const Tile& tile, const QueryRows& rows,
                                        int64_t i, float* row) {
  store_row(a.out, place_of(a.out, tile, rows, i), column_step(a.out, rows), a.Dv, row);
}

// and what the cotangents [n][ld] of the results `out` are made to.
template <class Args, class QueryRows>
static MEMATTN_INLINE void take_cotangents(const Args&, const Tile&, const QueryRows&, const float*,
                                           float*, int64_t) {}

// Hands out aligned pieces of a thread's scratch.
struct Pieces {
  float* next;
  float* take(int64_t floats) {
    float* from = next;
    next += round_up(floats, 16);
    return from;
  }
};

// The product of two rows, in a fixed order.
static inline double row_product(const float* x, const float* y, int64_t n) {
  double sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int64_t i = 0; i < n; ++i) sums[i % 8] += (double)x[i] * y[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// Rows of `view` as float32 [lanes][ld], zero past `width` and in lanes that see nothing.
template <class QueryRows>
static void load_rows(const View& view, const Tile& tile, const QueryRows& rows, int64_t width,
                      int64_t ld, float* to) {
  for (int64_t i = 0; i < rows.lanes; ++i, to += ld) {
    const bool empty = i >= rows.n || rows.empty(i);  // an empty row may hold anything
    const int64_t n = empty ? 0 : width;
    if (n) load_row(view, place_of(view, tile, rows, i), column_step(view, rows), n, to);
    __builtin_memset(to + n, 0, (ld - n) * 4);
  }
}

// Stores the results of a tile, from its softmax states and its weighted sums [panel][Dv][PANEL], by row
// [lanes][Dv]. spare: [lanes][Dv rounded up].
template <int NV, bool BY_ROW = false, class Args, class QueryRows>
static MEMATTN_INLINE void finish_rows(const Args& a, const Tile& tile, const QueryRows& rows,
                                       const SoftmaxState<NV>* states, float* acc, float* spare) {
  constexpr int64_t PANEL = NV * VL;
  const int64_t ldv = round_up(a.Dv, VL);
  for (int64_t p = 0; !BY_ROW && p * PANEL < rows.lanes; ++p)
    for (int v = 0; v < NV; ++v) {
      const vf sum = states[p].sum[v];
      vf* column = (vf*)(acc + p * a.Dv * PANEL) + v;
      for (int64_t d = 0; d < a.Dv; ++d)
        column[d * NV] = select(sum == 0.0f, vf{}, column[d * NV] / sum);
    }
  if (!BY_ROW) from_panels(acc, PANEL, rows.lanes, a.Dv, ldv, spare);
  for (int64_t i = 0; i < rows.n; ++i) {
    const int64_t flat = number_of(a, tile, rows, i);
    const SoftmaxState<NV>& state = states[i / PANEL];
    const int64_t v = i % PANEL / VL, in_vector = i % VL;
    float* result = (BY_ROW ? acc : spare) + i * ldv;
    if (BY_ROW) {
      const vf sum = broadcast(state.sum[v][in_vector]);
      for (int64_t d = 0; d < a.Dv; d += VL) {
        vf* part = (vf*)(result + d);
        *part = select(sum == 0.0f, vf{}, *part / sum);
      }
    }
    store_result(a, tile, rows, i, result);
    const RowLse lse(state.high[v][in_vector], state.low[v][in_vector],
                     state.sum[v][in_vector]);
    a.lse[flat] = lse.natural, a.lse2_high[flat] = lse.high, a.lse2_low[flat] = lse.low;
  }
}

// The rows of panel p.
template <int NV, class QueryRows>
static MEMATTN_INLINE Lanes panel_of(const QueryRows& rows, int64_t p) {
  const int64_t end = (p + 1) * NV * VL;
  return {p * NV * VL, end < rows.n ? end : rows.n};
}

// walk(scratch, visit) calls visit(block) for every block of keys that some row sees. BY_ROW: results are
// summed row by row, as in row_sums.h, from blocks whose lanes see intervals.
template <int NV, bool BY_ROW = false, class Args, class QueryRows, class Walk>
static MEMATTN_INLINE void forward_rows(const Args& a, const Tile& tile, const QueryRows& rows,
                                        Walk walk, float* scratch) {
  constexpr int64_t PANEL = NV * VL;
  float* q = scratch;                             // [panel][D][PANEL]
  float* acc = q + TILE_ROWS * a.D;               // [panel][Dv][PANEL], by row [lanes][Dv]
  float* scores = acc + TILE_ROWS * a.Dv;         // [BLOCK_KEYS][PANEL]
  float* block_scratch = scores + BLOCK_KEYS * PANEL;  // [BLOCK_KEYS][D + Dv], or rows of the tile
  const int64_t ldk = round_up(a.D, VL);
  const auto cap = cap_of(a, rows);
  const Split scale2 = Split::factor(cap.exponent(a.scale));
  const SumRuns runs = rows.sum_runs();
  load_rows(a.query, tile, rows, a.D, ldk, block_scratch);
  to_panels(block_scratch, ldk, rows.lanes, a.D, PANEL, q);
  __builtin_memset(acc, 0, rows.lanes * a.Dv * 4);
  SoftmaxState<NV> states[TILE_ROWS / PANEL];
  clear<NV>(states, TILE_ROWS / PANEL);

  walk(block_scratch, [&](const auto& block) {
    if constexpr (BY_ROW)
      weigh<NV>(block, rows.lanes, a.D, runs, scale2, q, scores, states,
                [&](int64_t p, const Span& span, const float* alpha) {
                  const Lanes panel = panel_of<NV>(rows, p);
                  const Rows value = block.value.from(span.first - block.begin);
                  add_to_rows<PANEL>(*block.seen, panel, span.first, span.last - span.first,
                                     runs.keys, scores - panel.first, value, a.Dv,
                                     alpha - panel.first, acc);
                }, cap);
    else attend<NV>(block, rows.lanes, a.D, a.Dv, runs, scale2, q, scores, states, acc, cap);
  });

  finish_rows<NV, BY_ROW>(a, tile, rows, states, acc, block_scratch);
}

// walk(with_gradients, scratch, visit) calls visit(block) for every block of keys that some row sees.
template <int NV, bool BY_ROW = false, class Args, class QueryRows, class Walk>
static MEMATTN_INLINE void backward_rows(const Args& a, const Tile& tile, const QueryRows& rows,
                                         Walk walk, float* scratch) {
  constexpr int64_t PANEL = NV * VL;
  constexpr int64_t STEP = BY_ROW ? TILE_ROWS : PANEL;           // from one key to the next
  constexpr int64_t NEXT = BY_ROW ? PANEL : BLOCK_KEYS * PANEL;  // and from one panel to the next
  const int64_t panels = rows.lanes / PANEL;
  const int64_t ldk = round_up(a.D, VL), ldv = round_up(a.Dv, VL);
  auto take = [&scratch](int64_t n) { float* from = scratch; scratch += round_up(n, 16); return from; };
  float* q = take(TILE_ROWS * a.D);        // [panel][D][PANEL]
  float* d_out = take(TILE_ROWS * a.Dv);   // [panel][Dv][PANEL]
  float* d_q = take(TILE_ROWS * a.D);      // [panel][D][PANEL], by row [lanes][D]
  float* q_rows = take(TILE_ROWS * ldk);   // [lanes][ldk]
  float* d_out_rows = take(TILE_ROWS * ldv);
  float* out_rows = take(TILE_ROWS * ldv);
  float* p_all = take(TILE_ROWS * BLOCK_KEYS);   // [panel][BLOCK_KEYS][PANEL], [BLOCK_KEYS][lanes]
  float* ds_all = take(TILE_ROWS * BLOCK_KEYS);
  float* lse_high = take(TILE_ROWS);  // in units of log 2
  float* lse_low = take(TILE_ROWS);
  float* delta = take(TILE_ROWS);
  float* d_lse = take(TILE_ROWS);
  float* block_scratch = take(BLOCK_KEYS * (a.D + a.Dv));
  const auto cap = cap_of(a, rows);
  constexpr bool CAPS = decltype(cap)::CAPS;
  float* slopes = CAPS ? take(BLOCK_KEYS * PANEL) : nullptr;  // of the caps, of one panel

  const Split scale2 = Split::factor(cap.exponent(a.scale));
  const SumRuns runs = rows.sum_runs();
  load_rows(a.query, tile, rows, a.D, ldk, q_rows);
  load_rows(a.d_out, tile, rows, a.Dv, ldv, d_out_rows);
  load_rows(a.out, tile, rows, a.Dv, ldv, out_rows);
  take_cotangents(a, tile, rows, out_rows, d_out_rows, ldv);
  to_panels(q_rows, ldk, rows.lanes, a.D, PANEL, q);
  to_panels(d_out_rows, ldv, rows.lanes, a.Dv, PANEL, d_out);
  __builtin_memset(d_q, 0, rows.lanes * a.D * 4);
  // weight 0 everywhere for lanes without a row and rows without a key
  for (int64_t i = 0; i < rows.lanes; ++i) lse_high[i] = -NO_SCORE, lse_low[i] = d_lse[i] = 0.0f;
  for (int64_t i = 0; i < rows.n; ++i) {
    if (rows.empty(i)) continue;
    const int64_t flat = number_of(a, tile, rows, i);
    d_lse[i] = a.d_lse[flat];
    if (a.lse2_high[flat] != -__builtin_inff())
      saved_lse(a.lse2_high[flat], a.lse2_low[flat], lse_high + i, lse_low + i);
  }

  // the weights of the keys [span.first, span.last) in panel p, and the gradients of these weights
  auto weigh = [&](const auto& block, int64_t p, const Span& span, float* weights, float* dw) {
    const int64_t n = span.last - span.first, skip = span.first - block.begin;
    block_products<NV>(block, n, a.D, runs.dims, block.key.from(skip), q + p * a.D * PANEL, weights,
                       STEP);
    cap.template apply<NV>(weights, n, STEP);
    if constexpr (CAPS)
      for (int64_t j = 0; j < n; ++j)
        for (int v = 0; v < NV; ++v)
          ((vf*)slopes)[j * NV + v] = cap.slope(((const vf*)(weights + j * STEP))[v]);
    if (span.partial) mask_panel<NV, STEP>(weights, block, p, span.first, span.last);
    block_products<NV>(block, n, a.Dv, runs.dims, block.value.from(skip), d_out + p * a.Dv * PANEL, dw,
                       STEP);
    const vf* high = (const vf*)(lse_high + p * PANEL);
    const vf* low = (const vf*)(lse_low + p * PANEL);
    with_large_lanes<NV>(low, [&](auto some_large) {
#pragma GCC unroll 2
      for (int64_t j = 0; j < n; ++j)
        for (int v = 0; v < NV; ++v) {
          vf* w = (vf*)(weights + j * STEP) + v;
          *w = saved_weight<some_large>(*w, scale2, high[v], low[v]);
        }
    });
  };

  // delta = sum over d of out * d_out = sum over keys of w * dw / sum of w. With few keys the second
  // form is cheap, and its rounding cancels against that of dw and of the log-sum-exp
  __builtin_memset(delta, 0, rows.lanes * 4);
  // in the order of the products below: a row with one key gets gradient 0 exactly
  if (!runs.few_keys)
    row_dot_products(out_rows, ldv, d_out, PANEL, rows.lanes, a.Dv, runs.dims, delta);
  if (runs.few_keys) {
    WeightedMean means[TILE_ROWS / VL];
    walk(false, block_scratch, [&](const auto& block) {
      for (int64_t p = 0; p < panels; ++p) {
        const Span span(block, p);
        if (span.first >= span.last) continue;
        weigh(block, p, span, p_all, ds_all);
        for (int64_t j = 0; j < span.last - span.first; ++j)
          for (int v = 0; v < NV; ++v)
            means[p * NV + v].add(((const vf*)(p_all + j * STEP))[v],
                                  ((const vf*)(ds_all + j * STEP))[v]);
      }
    });
    for (int64_t i = 0; i < rows.lanes / VL; ++i) means[i].store((vf*)delta + i, (vf*)d_lse + i);
  }

  walk(true, block_scratch, [&](const auto& block) {
    PanelSpans spans;
    for (int64_t p = 0; p < panels; ++p) {
      const Span span = spans.look(block, p);
      const int64_t n = spans.count(p), skip = spans.first[p];
      float *weights = p_all + p * NEXT, *ds = ds_all + p * NEXT;
      if (n < block.n) {  // keys that this panel does not see add nothing
        auto clear = [&](float* panel) {
          if constexpr (BY_ROW) clear_lanes_outside<NV>(panel, block.n, spans, p);
          else clear_outside<NV>(panel, block.n, spans, p);
        };
        clear(weights), clear(ds);
      }
      if (n <= 0) continue;
      weights += skip * STEP, ds += skip * STEP;
      weigh(block, p, span, weights, ds);
      const vf* mean = (const vf*)(delta + p * PANEL);
      const vf* extra = (const vf*)(d_lse + p * PANEL);
      for (int64_t j = 0; j < n; ++j)
        for (int v = 0; v < NV; ++v) {
          vf* s = (vf*)(ds + j * STEP) + v;
          *s = ((const vf*)(weights + j * STEP))[v] * ((*s - mean[v]) + extra[v]);
          if constexpr (CAPS) *s *= ((const vf*)slopes)[j * NV + v];
        }
      if constexpr (BY_ROW)
        add_to_rows<STEP>(*block.seen, panel_of<NV>(rows, p), span.first, n, runs.keys,
                          ds - p * PANEL, block.key.from(skip), a.D, nullptr, d_q);
      else add_weighted<NV>(a.D, n, runs.keys, block.key.data + skip * block.key.stride,
                       block.key.stride, ds, PANEL, d_q + p * a.D * PANEL, PANEL, nullptr);
    }
    if constexpr (BY_ROW) {
      const Lanes lanes{0, rows.n};
      const int64_t run = runs.panels * PANEL;
      add_to_keys(*block.seen, lanes, block.begin, block.n, run, p_all, d_out_rows, a.Dv, block.d_value);
      add_to_keys(*block.seen, lanes, block.begin, block.n, run, ds_all, q_rows, a.D, block.d_key);
      return;
    }
    add_rows<NV>(p_all, d_out_rows, runs.panels, block.d_value, ldv, block.n, panels, spans);
    add_rows<NV>(ds_all, q_rows, runs.panels, block.d_key, ldk, block.n, panels, spans);
  });

  for (int64_t j = 0; j < rows.lanes * a.D; ++j) d_q[j] *= (float)a.scale;
  if (!BY_ROW) from_panels(d_q, PANEL, rows.lanes, a.D, ldk, q_rows);
  for (int64_t i = 0; i < rows.n; ++i)
    store_row(a.d_query, place_of(a.d_query, tile, rows, i), column_step(a.d_query, rows), a.D,
              (BY_ROW ? d_q : q_rows) + i * ldk);
}

template <class Args>
static int64_t float_forward_scratch(const Args& a) {
  return (TILE_ROWS + BLOCK_KEYS) * (a.D + a.Dv) + BLOCK_KEYS * 2 * VL + TILE_ROWS * VL;
}

template <class Args>
static int64_t float_backward_scratch(const Args& a) {
  const int64_t wide = round_up(a.D, VL) + round_up(a.Dv, VL);
  return (3 * TILE_ROWS + BLOCK_KEYS + 1) * wide + 2 * TILE_ROWS * BLOCK_KEYS + 4 * TILE_ROWS +
         BLOCK_KEYS * 2 * VL + 256;
}

// Products of floats, and rows of keys for them: `units` of 32 bits each.
struct InFloats {
  template <class Base>
  using Block = Base;
  static MEMATTN_INLINE int64_t units(int64_t width) { return width; }
  static MEMATTN_INLINE float* data(float* scratch) { return scratch; }
  static MEMATTN_INLINE Rows rows(const View& view, int64_t offset, int64_t row_stride,
                                  int64_t col_stride, int64_t n, int64_t width, float* scratch) {
    return float_rows(view, offset, row_stride, col_stride, n, width, scratch);
  }
  static MEMATTN_INLINE void row(const View& view, int64_t offset, int64_t stride, int64_t width,
                                 float* to) {
    load_row(view, offset, stride, width, to);
  }
  // makes what else a block has of its keys and values
  template <class AnyBlock>
  static MEMATTN_INLINE void complete(AnyBlock&, int64_t, int64_t, float*) {}

  template <int NV, bool BY_ROW = false, class... Parts>
  static MEMATTN_INLINE void forward(const Parts&... parts) {
    forward_rows<NV, BY_ROW>(parts...);
  }
  template <int NV, bool BY_ROW = false, class... Parts>
  static MEMATTN_INLINE void backward(const Parts&... parts) {
    backward_rows<NV, BY_ROW>(parts...);
  }
  // floats
  template <class Args>
  static int64_t forward_scratch(const Args& a) { return float_forward_scratch(a); }
  template <class Args>
  static int64_t backward_scratch(const Args& a) { return float_backward_scratch(a); }

  // for operators with tiles of their own: rows of queries to panels, the scale of exponents, and one
  // block of keys with what `score_floats` and `block_floats` take of scratch; `fine` where weights may
  // not be rounded to bfloat16
  template <class QueryRows>
  static void panels(const View& view, const Tile& tile, const QueryRows& rows, int64_t width,
                     int64_t panel, float* spare, float* to) {
    const int64_t ld = round_up(width, VL);
    load_rows(view, tile, rows, width, ld, spare);
    to_panels(spare, ld, rows.lanes, width, panel, to);
  }
  static Split exponent(double scale) { return Split::factor(scale * LOG2E); }
  static int64_t score_floats(int64_t panel) { return BLOCK_KEYS * panel; }
  static int64_t block_floats(int64_t D, int64_t Dv) { return BLOCK_KEYS * (D + Dv); }
  static float* block_scratch(float* scratch, bool) { return scratch; }
  template <int NV, class AnyBlock>
  static MEMATTN_INLINE void take_keys(const AnyBlock& block, int64_t lanes, int64_t D, int64_t Dv,
                                       const SumRuns& runs, bool, Split scale2, const float* q,
                                       float* scores, SoftmaxState<NV>* states, float* acc) {
    attend<NV>(block, lanes, D, Dv, runs, scale2, q, scores, states, acc);
  }
};
