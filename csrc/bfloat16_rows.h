// Softmax attention of one tile of queries in bfloat16, forward and backward, whatever keys its rows
// see: what attention_rows.h has for float32.
//
// Included after bfloat16_tile.h.

// pairs of keys for which sums by row choose their lanes once; lanes left out of a tile save no time
constexpr int64_t PAIRS_RUN = Pairs::HAS_TILES ? BLOCK_KEYS : 12;

// The cotangents of `out` as take_cotangents() changes them; rows are `ld` pairs apart.
template <class Args, class QueryRows>
static MEMATTN_INLINE void take_pair_cotangents(const Args&, const Tile&, const QueryRows&,
                                                const bfloat16_bits*, bfloat16_bits*, int64_t) {}

// One panel of products of pairs with the keys or values [skip, skip + n) of a block, see block_products().
template <int NV, class AnyBlock>
static MEMATTN_INLINE void pair_products(const AnyBlock& block, const PairSpan& span, const Rows& rows,
                                         int64_t terms, const float* panel, float* to) {
  constexpr int64_t PANEL = NV * VL, STEP = AnyBlock::FETCHES ? FETCH_KEYS : BLOCK_KEYS;
  const float* from = rows.data + span.skip * rows.stride;
  for (int64_t j = 0; j < span.n; j += STEP) {
    if constexpr (AnyBlock::FETCHES) block.fetch_some();
    const int64_t n = span.n - j < STEP ? span.n - j : STEP;
    product<NV, Store::set, true, Pairs>(n, 1, terms, from + j * rows.stride, rows.stride, 0, panel,
                                         PANEL, 0, to + j * PANEL, PANEL, nullptr);
  }
}

// Scores of the keys that panel p sees, whole pairs of keys with -inf in place of neighbours.
template <int NV, class AnyBlock, class Cap = Uncapped>
static MEMATTN_INLINE void pair_scores(const AnyBlock& block, int64_t p, const Span& seen,
                                       const PairSpan& span, int64_t D, const float* q,
                                       float* scores, const Cap& cap = {}) {
  constexpr int64_t PANEL = NV * VL;
  const int64_t terms = pairs_in(D);
  float* own = scores + span.lead * PANEL;
  pair_products<NV>(block, span, block.key, terms, q + p * terms * PANEL, own);
  cap.template apply<NV>(own, span.n, PANEL);
  if (seen.partial) mask_panel<NV>(own, block, p, seen.first, seen.last);
  for (int v = 0; v < NV; ++v) {
    if (span.lead) ((vf*)scores)[v] = broadcast(-__builtin_inff());
    if (span.ends_odd()) ((vf*)(own + span.n * PANEL))[v] = broadcast(-__builtin_inff());
  }
}

// Takes one block of keys into the softmax states of all panels, and calls add(panel, what it sees, the
// pairs of these, what is added so far is to be multiplied by) when `weights` holds those of a panel. q:
// [panel][terms][PANEL], scores: [BLOCK_KEYS + 2][PANEL], weights and with FINE their rest:
// [BLOCK_KEYS / 2 + 1][PANEL].
template <int NV, bool FINE = false, class AnyBlock, class Add, class Cap = Uncapped>
static MEMATTN_INLINE void weigh_pairs(const AnyBlock& block, int64_t lanes, int64_t D, float scale2,
                                       const float* q, float* scores, float* weights, float* rest,
                                       SoftmaxState<NV>* states, Add add, const Cap& cap = {}) {
  for (int64_t p = 0; p * NV * VL < lanes; ++p) {
    const Span seen(block, p);
    if (seen.first >= seen.last) continue;
    const PairSpan span(seen.first - block.begin, seen.last - seen.first);
    pair_scores<NV>(block, p, seen, span, D, q, scores, cap);
    vf alpha[NV];
    pair_softmax_step<NV, FINE>(scores, span.pairs, scale2, &states[p], alpha, weights, rest);
    add(p, seen, span, (const float*)alpha);
  }
}

// acc[p] := alpha * acc[p] + the weighted values of a panel, by weights and their rest, if any; acc:
// [panel][Dv][PANEL].
template <int NV, class AnyBlock>
static MEMATTN_INLINE void add_weighted_pairs(const AnyBlock& block, int64_t p, const PairSpan& span,
                                              int64_t Dv, const float* weights, const float* rest,
                                              const float* alpha, float* acc) {
  constexpr int64_t PANEL = NV * VL;
  with_own_keys(block, span, Dv, [&](const float* values) {
    product<NV, Store::scale_add, false, Pairs>(Dv, 1, span.pairs, values, Dv, 0, weights, PANEL, 0,
                                                acc + p * Dv * PANEL, PANEL, alpha);
    if (rest)
      product<NV, Store::add, false, Pairs>(Dv, 1, span.pairs, values, Dv, 0, rest, PANEL, 0,
                                            acc + p * Dv * PANEL, PANEL, nullptr);
  });
}

// walk(scratch, visit) calls visit(block) for every block of keys that some row sees. BY_ROW as in
// forward_rows().
template <int NV, bool BY_ROW, class Args, class QueryRows, class Walk>
static MEMATTN_INLINE void forward_pairs(const Args& a, const Tile& tile, const QueryRows& rows,
                                         Walk walk, float* scratch) {
  constexpr int64_t PANEL = NV * VL;
  const int64_t terms = pairs_in(a.D), ldk = round_up(terms, VL), ldv = round_up(a.Dv, VL);
  Pieces pieces{scratch};
  float* q = pieces.take(TILE_ROWS * terms);             // [panel][terms][PANEL]
  float* acc = pieces.take(TILE_ROWS * a.Dv);            // [panel][Dv][PANEL], by row [lanes][Dv]
  float* scores = pieces.take((BLOCK_KEYS + 2) * PANEL);
  float* weights = pieces.take((BLOCK_KEYS / 2 + 1) * PANEL);
  float* row_scratch = pieces.take(TILE_ROWS * (ldk > ldv ? ldk : ldv));
  float* block_scratch = pieces.next;
  const auto cap = cap_of(a, rows);
  const float scale2 = (float)cap.exponent(a.scale);
  load_pair_rows(a.query, tile, rows, a.D, ldk, row_scratch);
  to_panels(row_scratch, ldk, rows.lanes, terms, PANEL, q);
  __builtin_memset(acc, 0, rows.lanes * a.Dv * 4);
  SoftmaxState<NV> states[TILE_ROWS / PANEL];
  clear<NV>(states, TILE_ROWS / PANEL);

  walk(PairScratch{block_scratch, false}, [&](const auto& block) {
    weigh_pairs<NV>(block, rows.lanes, a.D, scale2, q, scores, weights, nullptr, states,
                    [&](int64_t p, const Span& seen, const PairSpan& span, const float* alpha) {
      if constexpr (BY_ROW) {
        const Lanes panel = panel_of<NV>(rows, p);
        with_own_keys(block, span, a.Dv, [&](const float* values) {
          add_to_rows<PANEL, Pairs>(*block.seen, panel, seen.first - span.lead, span.pairs, PAIRS_RUN,
                                    weights - panel.first, Rows{values, a.Dv}, a.Dv,
                                    alpha - panel.first, acc);
        });
      } else {
        add_weighted_pairs<NV>(block, p, span, a.Dv, weights, nullptr, alpha, acc);
      }
    }, cap);
  });

  finish_rows<NV, BY_ROW>(a, tile, rows, states, acc, row_scratch);
}

// The sums over `terms` units of the products of two panels, as a product of pairs rounds them.
template <int NV>
static MEMATTN_INLINE void lane_products(const float* x, const float* y, int64_t terms, float* sums) {
  for (int v = 0; v < NV; ++v) {
    vf sum{};
    for (int64_t k = 0; k < terms; ++k)
      sum = Pairs::add_product(((const vf*)x)[k * NV + v], ((const vf*)y)[k * NV + v], sum);
    ((vf*)sums)[v] = sum;
  }
}

// Scores of the keys that panel p sees, and the gradients of their weights, dw, from those of results,
// g: [panel][terms of Dv][PANEL]; both whole pairs of keys, with gradient 0 of neighbours.
template <int NV, class AnyBlock, class Cap = Uncapped>
static MEMATTN_INLINE void pair_gradients(const AnyBlock& block, int64_t p, const Span& seen,
                                          const PairSpan& span, int64_t D, int64_t Dv, const float* q,
                                          const float* g, float* scores, float* dw,
                                          const Cap& cap = {}) {
  constexpr int64_t PANEL = NV * VL;
  pair_scores<NV>(block, p, seen, span, D, q, scores, cap);
  float* own = dw + span.lead * PANEL;
  pair_products<NV>(block, span, block.value, pairs_in(Dv), g + p * pairs_in(Dv) * PANEL, own);
  for (int v = 0; v < NV; ++v) {
    if (span.lead) ((vf*)dw)[v] = vf{};
    if (span.ends_odd()) ((vf*)(own + span.n * PANEL))[v] = vf{};
  }
}

// What the backward subtracts from exponents, of a row that has keys, and a weight by it.
static MEMATTN_INLINE void saved_pair_lse(float high, float low, float* to_high, float* to_low) {
  saved_lse(high, low, to_high, to_low);
  if (*to_low >= 0.5f) *to_low -= 1.0f;  // a large lane
}

static MEMATTN_INLINE vf saved_pair_weight(vf s, float scale2, vf high, vf low) {
  return short_exp2((s * scale2 - high) - low);
}

// Stores weights or gradients of scores of two keys, rounded: `rows` of a key hold pairs of lanes, STEP
// from one key to the next.
template <int NV, int64_t STEP>
static MEMATTN_INLINE void store_lane_pairs(const vf* first, const vf* second, float* rows) {
  if constexpr (NV == 1 && STEP != VL / 2) {
    const __m512i both = rounded(first[0], second[0]);
    _mm256_storeu_si256((__m256i*)rows, _mm512_castsi512_si256(both));
    _mm256_storeu_si256((__m256i*)(rows + STEP), _mm512_extracti64x4_epi64(both, 1));
  } else if constexpr (NV == 1) {
    _mm512_storeu_si512(rows, rounded(first[0], second[0]));
  } else {
    _mm512_storeu_si512(rows, rounded(first[0], first[1]));
    _mm512_storeu_si512(rows + STEP, rounded(second[0], second[1]));
  }
}

// walk(with_gradients, scratch, visit) calls visit(block) for every block of keys that some row sees.
template <int NV, bool BY_ROW, class Args, class QueryRows, class Walk>
static MEMATTN_INLINE void backward_pairs(const Args& a, const Tile& tile, const QueryRows& rows,
                                          Walk walk, float* scratch) {
  constexpr int64_t PANEL = NV * VL, HALF = PANEL / 2;
  constexpr int64_t STEP = BY_ROW ? TILE_ROWS / 2 : HALF;       // of pairs of lanes, between two keys
  constexpr int64_t NEXT = BY_ROW ? HALF : BLOCK_KEYS * HALF;   // and between two panels
  const int64_t panels = rows.lanes / PANEL, terms = pairs_in(a.D), value_terms = pairs_in(a.Dv);
  const int64_t ldk = round_up(a.D, VL), ldv = round_up(a.Dv, VL);
  Pieces pieces{scratch};
  float* q = pieces.take(TILE_ROWS * terms);            // [panel][terms][PANEL]
  float* d_out = pieces.take(TILE_ROWS * value_terms);
  float* out = pieces.take(TILE_ROWS * value_terms);
  float* d_q = pieces.take(TILE_ROWS * a.D);            // [panel][D][PANEL], by row [lanes][D]
  float* q_pairs = pieces.take(TILE_ROWS / 2 * ldk);    // [lanes / 2][ldk], pairs of lanes
  float* d_out_pairs = pieces.take(TILE_ROWS / 2 * ldv);
  float* scores = pieces.take((BLOCK_KEYS + 2) * PANEL);
  float* dw = pieces.take((BLOCK_KEYS + 2) * PANEL);    // gradients of the weights
  float* ds_pairs = pieces.take((BLOCK_KEYS / 2 + 1) * PANEL);  // of scores, pairs of keys
  float* p_all = pieces.take(TILE_ROWS / 2 * BLOCK_KEYS);  // [panel][BLOCK_KEYS][HALF], or by key
  float* ds_all = pieces.take(TILE_ROWS / 2 * BLOCK_KEYS);      // pairs of lanes
  float* row_scratch = pieces.take(TILE_ROWS * (ldk > 2 * ldv ? ldk : 2 * ldv));
  float* lanes = pieces.take(4 * TILE_ROWS);
  float *lse_high = lanes, *lse_low = lanes + TILE_ROWS, *delta = lanes + 2 * TILE_ROWS,
        *d_lse = lanes + 3 * TILE_ROWS;
  const PairScratch block_scratch{pieces.next, true};

  const auto cap = cap_of(a, rows);
  const float scale2 = (float)cap.exponent(a.scale);
  const int64_t ldq = round_up(terms, VL), ldo = round_up(value_terms, VL);
  load_pair_rows(a.query, tile, rows, a.D, ldq, row_scratch);
  to_panels(row_scratch, ldq, rows.lanes, terms, PANEL, q);
  interleave({row_scratch, ldq}, rows.lanes, a.D, ldk, q_pairs);
  float* out_rows = row_scratch + TILE_ROWS * ldo;
  load_pair_rows(a.d_out, tile, rows, a.Dv, ldo, row_scratch);
  load_pair_rows(a.out, tile, rows, a.Dv, ldo, out_rows);
  take_pair_cotangents(a, tile, rows, (const bfloat16_bits*)out_rows, (bfloat16_bits*)row_scratch, ldo);
  to_panels(row_scratch, ldo, rows.lanes, value_terms, PANEL, d_out);
  interleave({row_scratch, ldo}, rows.lanes, a.Dv, ldv, d_out_pairs);
  to_panels(out_rows, ldo, rows.lanes, value_terms, PANEL, out);
  __builtin_memset(d_q, 0, rows.lanes * a.D * 4);
  // weight 0 everywhere for lanes without a row and rows without a key
  for (int64_t i = 0; i < rows.lanes; ++i) lse_high[i] = -NO_SCORE, lse_low[i] = d_lse[i] = 0.0f;
  for (int64_t i = 0; i < rows.n; ++i) {
    if (rows.empty(i)) continue;
    const int64_t flat = number_of(a, tile, rows, i);
    d_lse[i] = a.d_lse[flat];
    if (a.lse2_high[flat] == -__builtin_inff()) continue;
    saved_pair_lse(a.lse2_high[flat], a.lse2_low[flat], lse_high + i, lse_low + i);
  }

  // products of the keys that panel p sees
  auto multiply = [&](const auto& block, int64_t p, const Span& seen, const PairSpan& span) {
    pair_gradients<NV>(block, p, seen, span, a.D, a.Dv, q, d_out, scores, dw, cap);
  };
  auto weigh = [&](int64_t p, int64_t j, int v) {
    const vf high = ((const vf*)(lse_high + p * PANEL))[v];
    const vf low = ((const vf*)(lse_low + p * PANEL))[v];
    return saved_pair_weight(((const vf*)scores)[j * NV + v], scale2, high, low);
  };

  // delta = sum over d of out * d_out = sum over keys of w * dw / sum of w, see backward_rows()
  if (!rows.sum_runs().few_keys) {
    for (int64_t p = 0; p < panels; ++p)
      lane_products<NV>(out + p * value_terms * PANEL, d_out + p * value_terms * PANEL, value_terms,
                        delta + p * PANEL);
  } else {
    WeightedMean means[TILE_ROWS / VL];
    walk(false, block_scratch, [&](const auto& block) {
      for (int64_t p = 0; p < panels; ++p) {
        const Span seen(block, p);
        if (seen.first >= seen.last) continue;
        const PairSpan span(seen.first - block.begin, seen.last - seen.first);
        multiply(block, p, seen, span);
        for (int64_t j = 0; j < 2 * span.pairs; ++j)
          for (int v = 0; v < NV; ++v)
            means[p * NV + v].add(weigh(p, j, v), ((const vf*)dw)[j * NV + v]);
      }
    });
    for (int64_t i = 0; i < rows.lanes / VL; ++i) means[i].store((vf*)delta + i, (vf*)d_lse + i);
  }

  walk(true, block_scratch, [&](const auto& block) {
    PanelSpans spans;
    for (int64_t p = 0; p < panels; ++p) {
      const Span seen = spans.look(block, p);
      const int64_t n = spans.count(p), skip = spans.first[p];
      float *p_rows = p_all + p * NEXT, *ds_rows = ds_all + p * NEXT;
      if (n < block.n) {  // keys that this panel does not see add nothing
        auto clear = [&](float* panel) {
          if constexpr (BY_ROW) clear_lanes_outside<NV, Pairs>(panel, block.n, spans, p);
          else clear_outside<NV, Pairs>(panel, block.n, spans, p);
        };
        clear(p_rows), clear(ds_rows);
      }
      if (n <= 0) continue;
      const PairSpan span(skip, n);
      multiply(block, p, seen, span);
      p_rows += 2 * span.begin * STEP, ds_rows += 2 * span.begin * STEP;
      const vf* mean = (const vf*)(delta + p * PANEL);
      const vf* extra = (const vf*)(d_lse + p * PANEL);
      for (int64_t i = 0; i < span.pairs; ++i) {
        vf w[2][NV], ds[2][NV];
        for (int k = 0; k < 2; ++k)
          for (int v = 0; v < NV; ++v) {
            w[k][v] = weigh(p, 2 * i + k, v);
            ds[k][v] = w[k][v] * ((((const vf*)dw)[(2 * i + k) * NV + v] - mean[v]) + extra[v]);
            if constexpr (decltype(cap)::CAPS)
              ds[k][v] *= cap.slope(((const vf*)scores)[(2 * i + k) * NV + v]);
          }
        store_lane_pairs<NV, STEP>(w[0], w[1], p_rows + 2 * i * STEP);
        store_lane_pairs<NV, STEP>(ds[0], ds[1], ds_rows + 2 * i * STEP);
        for (int v = 0; v < NV; ++v)
          _mm512_store_si512(ds_pairs + i * PANEL + v * VL, paired(ds[0][v], ds[1][v]));
      }
      with_own_keys(block, span, a.D, [&](const float* keys) {
        if constexpr (BY_ROW) {
          const Lanes panel = panel_of<NV>(rows, p);
          add_to_rows<PANEL, Pairs>(*block.seen, panel, seen.first - span.lead, span.pairs, PAIRS_RUN,
                                    ds_pairs - panel.first, Rows{keys, a.D}, a.D, nullptr, d_q);
          return;
        }
        product<NV, Store::add, false, Pairs>(a.D, 1, span.pairs, keys, a.D, 0, ds_pairs, PANEL, 0,
                                              d_q + p * a.D * PANEL, PANEL, nullptr);
      });
    }
    if constexpr (BY_ROW) {
      const Lanes all{0, rows.n};
      add_to_keys<Pairs>(*block.seen, all, block.begin, block.n, TILE_ROWS, p_all, d_out_pairs, a.Dv,
                         block.d_value);
      add_to_keys<Pairs>(*block.seen, all, block.begin, block.n, TILE_ROWS, ds_all, q_pairs, a.D,
                         block.d_key);
      return;
    }
    add_rows<NV, Pairs>(p_all, d_out_pairs, panels, block.d_value, ldv, block.n, panels, spans);
    add_rows<NV, Pairs>(ds_all, q_pairs, panels, block.d_key, ldk, block.n, panels, spans);
  });

  for (int64_t j = 0; j < rows.lanes * a.D; ++j) d_q[j] *= (float)a.scale;
  if (!BY_ROW) from_panels(d_q, PANEL, rows.lanes, a.D, ldk, row_scratch);
  for (int64_t i = 0; i < rows.n; ++i)
    store_row(a.d_query, place_of(a.d_query, tile, rows, i), column_step(a.d_query, rows), a.D,
              (BY_ROW ? d_q : row_scratch) + i * ldk);
}

template <class Args>
static int64_t pair_forward_scratch(const Args& a) {
  const int64_t wide = round_up(a.D, VL) + round_up(a.Dv, VL);
  return 3 * TILE_ROWS * wide + (BLOCK_KEYS + 2) * 2 * VL * 2 + pair_scratch(a.D, a.Dv) + 256;
}

template <class Args>
static int64_t pair_backward_scratch(const Args& a) {
  const int64_t wide = round_up(a.D, VL) + round_up(a.Dv, VL);
  return 4 * TILE_ROWS * wide + (5 * BLOCK_KEYS + 10) * VL + (TILE_ROWS + 1) * BLOCK_KEYS +
         4 * TILE_ROWS + pair_scratch(a.D, a.Dv) + 256;
}

// Products of pairs, and rows of keys for them: see InFloats.
struct InPairs {
  template <class Base>
  using Block = PairBlock<Base>;
  static MEMATTN_INLINE int64_t units(int64_t width) { return pairs_in(width); }
  static MEMATTN_INLINE float* data(const PairScratch& scratch) { return scratch.data; }
  static MEMATTN_INLINE Rows rows(const View& view, int64_t offset, int64_t row_stride,
                                  int64_t col_stride, int64_t n, int64_t width, float* scratch) {
    return pair_rows(view, offset, row_stride, col_stride, n, width, scratch);
  }
  static MEMATTN_INLINE void row(const View& view, int64_t offset, int64_t stride, int64_t width,
                                 float* to) {
    load_pairs(view, offset, stride, width, pairs_in(width), to);
  }
  template <class AnyBlock>
  static MEMATTN_INLINE void complete(AnyBlock& block, int64_t D, int64_t Dv,
                                      const PairScratch& scratch) {
    pair_keys(block, D, Dv, scratch);
  }

  template <int NV, bool BY_ROW = false, class... Parts>
  static MEMATTN_INLINE void forward(const Parts&... parts) {
    forward_pairs<NV, BY_ROW>(parts...);
  }
  template <int NV, bool BY_ROW = false, class... Parts>
  static MEMATTN_INLINE void backward(const Parts&... parts) {
    backward_pairs<NV, BY_ROW>(parts...);
  }
  template <class Args>
  static int64_t forward_scratch(const Args& a) { return pair_forward_scratch(a); }
  template <class Args>
  static int64_t backward_scratch(const Args& a) { return pair_backward_scratch(a); }

  template <class QueryRows>
  static void panels(const View& view, const Tile& tile, const QueryRows& rows, int64_t width,
                     int64_t panel, float* spare, float* to) {
    const int64_t terms = pairs_in(width), ld = round_up(terms, VL);
    load_pair_rows(view, tile, rows, width, ld, spare);
    to_panels(spare, ld, rows.lanes, terms, panel, to);
  }
  static float exponent(double scale) { return (float)(scale * LOG2E); }
  static int64_t score_floats(int64_t panel) { return (2 * BLOCK_KEYS + 4) * panel; }
  static int64_t block_floats(int64_t D, int64_t Dv) { return pair_scratch(D, Dv); }
  static PairScratch block_scratch(float* scratch, bool is_backward) { return {scratch, is_backward}; }
  template <int NV, class AnyBlock>
  static void take_keys(const AnyBlock& block, int64_t lanes, int64_t D, int64_t Dv, const SumRuns&,
                        bool fine, float scale2, const float* q, float* scores,
                        SoftmaxState<NV>* states, float* acc) {
    constexpr int64_t PANEL = NV * VL;
    float *weights = scores + (BLOCK_KEYS + 2) * PANEL, *rest = weights + (BLOCK_KEYS / 2 + 1) * PANEL;
    auto take = [&](auto is_fine) {
      weigh_pairs<NV, is_fine>(block, lanes, D, scale2, q, scores, weights, rest, states,
                               [&](int64_t p, const Span&, const PairSpan& span, const float* alpha) {
        add_weighted_pairs<NV>(block, p, span, Dv, weights, is_fine ? rest : nullptr, alpha, acc);
      });
    };
    fine ? take(std::true_type()) : take(std::false_type());
  }
};
