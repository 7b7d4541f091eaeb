// Attention to selected chapters, backward: the weights of a chapter's keys for a tile of its query
// rows, and from these the gradients of rows, of the chapter and of its weights.
//
// Included once per instruction set after chapter_attention_tile.h. With e = exp(s - lse), w the
// weight of the chapter, and p = w e: ds = p (dp - delta + d_lse), and the gradient of w is the sum of
// e (dp - delta + d_lse). With a softmax of its own, p~: ds = w p~ (dp - delta~) + d_lse e, and the
// gradient of w is delta~, the mean of dp under p~.

// row_stats of a row: its log-sum-exp as saved_lse() has it, the mean of dp, and d_lse with what the
// rounding of the mean left.
struct RowStats {
  float lse_high, lse_low, delta, extra;
};

static MEMATTN_INLINE RowStats& stats_of(const ChapterArgs& a, int64_t b, int64_t h, int64_t t) {
  return ((RowStats*)a.row_stats)[(b * a.H + h) * a.T + t];
}

template <class How>
struct ChapterBackward {
  using Unit = typename How::Unit;
  using Blocks = ChapterBlocks<How>;
  const ChapterArgs& a;
  int64_t ldk, ldv;
  Split scale2;
  Pieces pieces;
  float *q_rows, *d_out_rows, *q, *d_out;
  float *weights, *ds;  // of the panels, one behind the other: [CHAPTER_KEYS][lanes of the panel]
  float *d_rows, *key, *value, *more, *spare;
  float *lse_high, *lse_low, *delta, *extra, *weight, *d_weight;  // [TILE_ROWS]
  float *own_high, *own_low, *own_sum, *own_delta, *own_extra;    // of the chapter's own softmax
  // what is added up for an entry of the list, over its queries
  int64_t entry = -1;
  double entry_sum = 0.0;

  ChapterBackward(const ChapterArgs& a, float* scratch)
      : a(a), ldk(round_up(a.D, VL)), ldv(round_up(a.Dv, VL)),
        scale2(Split::factor(a.scale * LOG2E)), pieces{scratch} {
    q_rows = pieces.take(TILE_ROWS * ldk), d_out_rows = pieces.take(TILE_ROWS * ldv);
    q = pieces.take(TILE_ROWS * a.D), d_out = pieces.take(TILE_ROWS * a.Dv);
    weights = pieces.take(TILE_ROWS * CHAPTER_KEYS), ds = pieces.take(TILE_ROWS * CHAPTER_KEYS);
    d_rows = pieces.take(TILE_ROWS * ldk);
    key = pieces.take(CHAPTER_KEYS * ldk), value = pieces.take(CHAPTER_KEYS * ldv);
    more = pieces.take(How::more_scratch(a)), spare = pieces.take(VL * (ldk > ldv ? ldk : ldv));
    for (float** piece : {&lse_high, &lse_low, &delta, &extra, &weight, &d_weight, &own_high,
                          &own_low, &own_sum, &own_delta, &own_extra})
      *piece = pieces.take(TILE_ROWS);
  }

  // Calls visit(lanes, runs, blocks) for the tiles of chapter c, with routing rows of some classes and
  // the tokens and key head of a range; gradients of the queries will be added to rows of d_query.
  template <class Visit>
  void for_each(int64_t c, const QueryRange& range, const Entries& rows, uint32_t classes,
                const RowSums& d_query, Visit visit) {
    Blocks blocks{a, c, range.hkv, true, key, value, more};
    for (int row_class = 0; row_class < ROW_CLASSES; ++row_class) {
      if (!(a.classes & classes & uint32_t{1} << row_class)) continue;
      const SumRuns runs = class_runs(row_class);
      // the first tile of the next chapter is only looked at
      TileWalk walk(a, range, rows, row_class, c, c + 2 < a.C ? c + 2 : a.C);
      walk.for_each(c + 1, [&](const ChapterLanes& lanes, const ChapterLanes& next) {
        load_tile(lanes);
        for_each_panel(lanes.n, [&](const Panel& panel, auto) {
          fetch_ahead(a, range.hkv, lanes, next, panel, [&](int64_t b, int64_t h, int64_t t) {
            fetch_row(a.query, at(a.query, b, h, t), a.D);
            fetch_row(a.d_out, at(a.d_out, b, h, t), a.Dv);
            if (d_query.data) fetch_bytes(d_query.row(b, h, t), a.D * 4);
          });
        });
        visit(lanes, runs, blocks);
      });
    }
  }

  void load_tile(const ChapterLanes& lanes) {
    for_each_panel(lanes.n, [&](const Panel& panel, auto nv) {
      const int64_t first = panel.first;
      gather_panel<How, nv>(a.query, lanes, panel, a.D, ldk, spare,
                            q_rows + first / Unit::NUMBERS * ldk, q + first * How::units(a.D));
      gather_panel<How, nv>(a.d_out, lanes, panel, a.Dv, ldv, spare,
                            d_out_rows + first / Unit::NUMBERS * ldv,
                            d_out + first * How::units(a.Dv));
    });
    for (int64_t i = 0; i < TILE_ROWS; ++i) {
      // weight 0 everywhere for lanes without a row
      RowStats stats{-NO_SCORE, 0.0f, 0.0f, 0.0f};
      if (i < lanes.n) stats = stats_of(a, lanes.b[i], lanes.head[i], lanes.t[i]);
      lse_high[i] = stats.lse_high, lse_low[i] = stats.lse_low;
      delta[i] = stats.delta, extra[i] = stats.extra;
      weight[i] = i < lanes.n ? lanes.weight[i] : 0.0f, d_weight[i] = 0.0f;
    }
  }

  // Scores of the block's keys and gradients of their weights in a panel.
  template <int NV>
  void products(const Panel& panel, const SumRuns& runs, const Blocks& blocks, float* scores,
                float* dp) {
    How::template products<NV>(blocks.key, blocks.n, a.D, runs, q + panel.first * How::units(a.D),
                               scores);
    How::template products<NV>(blocks.value, blocks.n, a.Dv, runs,
                               d_out + panel.first * How::units(a.Dv), dp);
  }

  // exp(s - lse) of scores, in place.
  template <int NV>
  void weigh(const Panel& panel, int64_t n, float* scores) {
    const vf *high = (const vf*)(lse_high + panel.first), *low = (const vf*)(lse_low + panel.first);
    with_large_lanes<NV>(low, [&](auto some_large) {
#pragma GCC unroll 2
      for (int64_t j = 0; j < n; ++j)
        for (int v = 0; v < NV; ++v) {
          vf* s = (vf*)scores + j * NV + v;
          *s = saved_weight<some_large>(*s, scale2, high[v], low[v]);
        }
    });
  }

  // Where all chapters of a row share a softmax: p and ds of a block's keys, in place of the products.
  template <int NV>
  void joint_panel(const Panel& panel, const SumRuns& runs, const Blocks& blocks) {
    const int64_t n = blocks.n;
    float *p = weights + panel.first * CHAPTER_KEYS, *d = ds + panel.first * CHAPTER_KEYS;
    products<NV>(panel, runs, blocks, p, d);
    weigh<NV>(panel, n, p);
    for (int64_t begin = 0; begin < n; begin += WEIGHTS_RUN) {
      const int64_t end = n - begin < WEIGHTS_RUN ? n : begin + WEIGHTS_RUN;
      for (int v = 0; v < NV; ++v) {
        const vf mean = ((const vf*)(delta + panel.first))[v];
        const vf more = ((const vf*)(extra + panel.first))[v];
        const vf w = ((const vf*)(weight + panel.first))[v];
        vf sum{};
        for (int64_t j = begin; j < end; ++j) {
          vf *e = (vf*)p + j * NV + v, *dp = (vf*)d + j * NV + v;
          const vf term = *e * ((*dp - mean) + more);
          sum += term, *dp = w * term, *e = w * *e;
        }
        ((vf*)(d_weight + panel.first))[v] += sum;
      }
    }
  }

  // Where a chapter has a softmax of its own: its maximum, sum and mean of dp for the lanes of a panel.
  // Leaves the weights relative to the maximum, and dp, of the last block.
  template <int NV>
  void own_softmax(const Panel& panel, const SumRuns& runs, Blocks& blocks) {
    float *p = weights + panel.first * CHAPTER_KEYS, *d = ds + panel.first * CHAPTER_KEYS;
    SoftmaxState<NV> state;
    clear<NV>(&state, 1);
    WeightedMean means[NV];
    for (int64_t block = 0; block < blocks.count(); ++block) {
      blocks.load(block);
      products<NV>(panel, runs, blocks, p, d);
      vf alpha[NV];
      softmax_step<NV>(p, blocks.n, scale2, &state, alpha);
      for (int v = 0; v < NV; ++v) {
        if (block) means[v].scale(alpha[v]);
        for (int64_t j = 0; j < blocks.n; ++j)
          means[v].add(((const vf*)p)[j * NV + v], ((const vf*)d)[j * NV + v]);
      }
    }
    for (int v = 0; v < NV; ++v) {
      vf* left = (vf*)(own_extra + panel.first) + v;
      *left = vf{};
      means[v].store((vf*)(own_delta + panel.first) + v, left);
      ((vf*)(own_high + panel.first))[v] = state.high[v];
      ((vf*)(own_low + panel.first))[v] = state.low[v];
      ((vf*)(own_sum + panel.first))[v] = state.sum[v];
      // the gradient of the weight, which is a sum over keys elsewhere
      ((vf*)(d_weight + panel.first))[v] = ((vf*)(own_delta + panel.first))[v];
    }
  }

  // And p and ds of a block's keys.
  template <int NV>
  void own_panel(const ChapterLanes& lanes, const Panel& panel, const SumRuns& runs,
                 const Blocks& blocks) {
    constexpr int64_t PANEL = NV * VL;
    const int64_t n = blocks.n;
    float *p = weights + panel.first * CHAPTER_KEYS, *d = ds + panel.first * CHAPTER_KEYS;
    const vf *high = (const vf*)(own_high + panel.first), *low = (const vf*)(own_low + panel.first);
    if (!blocks.is_one()) {  // else own_softmax() has left them
      products<NV>(panel, runs, blocks, p, d);
      vi large[NV];
      vf sum[NV];
      for (int v = 0; v < NV; ++v) large[v] = is_large(high[v]), sum[v] = vf{};
      softmax_weights<true, NV>(p, n, scale2, high, low, large, sum);
    }
    alignas(64) float number[PANEL];
    for (int64_t i = 0; i < PANEL; ++i)
      number[i] = i < panel.n ? lanes.number[panel.first + i] : 0.0f;
    for (int v = 0; v < NV; ++v) {
      auto of = [&](const float* lane) { return ((const vf*)(lane + panel.first))[v]; };
      const vf mean = of(own_delta), left = of(own_extra), w = of(weight) / of(own_sum);
      // d_lse exp(s - lse) = p~ times this; a saved log-sum-exp of a large lane is the maximum alone
      const vf lse_rest = of(lse_low) - select(is_large_low(of(lse_low)), broadcast(1.0f), vf{});
      const vf x = high[v] - of(lse_high), x_low = low[v] - lse_rest;
      const vf share = exp2_nonpositive(x, [&](vf k) { return (x - k) + x_low; });
      const vf d_lse = of(extra), through_lse = select(
          d_lse == 0.0f, vf{}, d_lse * (((const vf*)number)[v] * share));
      for (int64_t j = 0; j < n; ++j) {
        vf *e = (vf*)p + j * NV + v, *dp = (vf*)d + j * NV + v;
        *dp = *e * (w * ((*dp - mean) + left) + through_lse), *e = w * *e;
      }
    }
  }

  // to[key, :] += sum over the tile's lanes of panels[key, lane] * rows[lane, :], both as units of lanes
  void add_to_keys(const float* panels, const float* rows, int64_t ld, int64_t lanes,
                   const SumRuns& runs, int64_t n, float* to) {
    constexpr int64_t NUMBERS = Unit::NUMBERS, WIDE = 2 * VL / NUMBERS, GROUP = Unit::HAS_TILES ? 32 : 24;
    const int64_t units = How::units(lanes), whole = units / WIDE, left = units - whole * WIDE;
    const int64_t most = Unit::NUMBERS > 1 ? whole : runs.panels;
    auto add = [&](auto nv, int64_t j, int64_t here, int64_t first, int64_t n_panels, int64_t terms,
                   int64_t width, int64_t d) {
      product<nv, Store::add, true, Unit>(here, n_panels, terms,
                                          panels + first * CHAPTER_KEYS + j * width, width,
                                          CHAPTER_KEYS * WIDE, rows + first * ld + d, ld, WIDE * ld,
                                          to + j * ld + d, ld, nullptr);
    };
    auto add_columns = [&](auto nv, int64_t j, int64_t here, int64_t d) {
      for (int64_t p = 0; p < whole; p += most)
        add(nv, j, here, p * WIDE, whole - p < most ? whole - p : most, WIDE, WIDE, d);
      if (left) add(nv, j, here, whole * WIDE, 1, left, left <= WIDE / 2 ? WIDE / 2 : WIDE, d);
    };
    for (int64_t j = 0; j < n; j += GROUP) {
      const int64_t here = n - j < GROUP ? n - j : GROUP;
      int64_t d = 0;
      for (; d + 2 * VL <= ld; d += 2 * VL)
        add_columns(std::integral_constant<int, 2>(), j, here, d);
      if (d < ld) add_columns(std::integral_constant<int, 1>(), j, here, d);
    }
  }

  // All gradients of a tile.
  void tile(const ChapterLanes& lanes, const SumRuns& runs, Blocks& blocks,
            const ChapterGrads& grads) {
    if (!a.is_joint)
      for_each_panel(lanes.n, [&](const Panel& panel, auto nv) {
        this->template own_softmax<nv>(panel, runs, blocks);
      });
    const ChapterSums sums = How::sums(a, weights, ds, more);
    for (int64_t block = 0; block < blocks.count(); ++block) {
      blocks.load(block);
      for_each_panel(lanes.n, [&](const Panel& panel, auto nv) {
        if (a.is_joint) this->template joint_panel<nv>(panel, runs, blocks);
        else this->template own_panel<nv>(lanes, panel, runs, blocks);
        const float* of_keys = How::template keep_panel<nv>(sums, panel, blocks.n, weights, ds);
        if (grads.d_query.data)
          weighted_rows<nv * VL, Unit>(panel.n, blocks.units, How::run(runs.keys), of_keys,
                                       blocks.summed, ldk, block > 0, d_rows + panel.first * ldk);
      });
      const int64_t first = block * CHAPTER_KEYS;
      if (!grads.d_key) continue;
      add_to_keys(sums.weights, d_out_rows, ldv, lanes.n, runs, blocks.n,
                  grads.d_value + first * ldv);
      add_to_keys(sums.ds, q_rows, ldk, lanes.n, runs, blocks.n, grads.d_key + first * ldk);
    }
    if (grads.d_query.data)
      for (int64_t i = 0; i < lanes.n; ++i)
        scale_and_add(grads.d_query.row(lanes.b[i], lanes.head[i], lanes.t[i]), d_rows + i * ldk,
                      a.D, 1.0f, (float)a.scale);
    if (grads.d_weight)
      for (int64_t i = 0; i < lanes.n; ++i) {
        if (lanes.entry[i] != entry) finish_entry(grads), entry = lanes.entry[i];
        entry_sum += d_weight[i];
      }
  }

  void finish_entry(const ChapterGrads& grads) {
    if (entry >= 0) grads.d_weight[entry] = (float)entry_sum;
    entry = -1, entry_sum = 0.0;
  }
};

template <class How>
static void chapter_prepare(const ChapterArgs& a, const QueryRange& range, float* scratch) {
  ChapterBackward<How> backward(a, scratch);
  const int64_t G = a.H / a.Hkv, h0 = range.hkv * G, tokens = range.t1 - range.t0;
  const Entries rows = rows_of(a, range);
  float *out = backward.q_rows, *d_out = backward.d_out_rows;
  for (int64_t h = h0; h < h0 + G; ++h)
    for (int64_t t = range.t0; t < range.t1; ++t) {
      const int64_t flat = (range.b * a.H + h) * a.T + t;
      RowStats& stats = stats_of(a, range.b, h, t);
      stats = {-NO_SCORE, 0.0f, 0.0f, 0.0f};
      if (a.lse2_high[flat] == -__builtin_inff()) continue;  // no chapter
      saved_lse(a.lse2_high[flat], a.lse2_low[flat], &stats.lse_high, &stats.lse_low);
      stats.extra = a.d_lse[flat];
      if (!a.is_joint) continue;
      load_row(a.out, at(a.out, range.b, h, t), a.out.stride[3], a.Dv, out);
      load_row(a.d_out, at(a.d_out, range.b, h, t), a.d_out.stride[3], a.Dv, d_out);
      stats.delta = (float)row_product(out, d_out, a.Dv);
    }
  // with few keys the mean of dp over these is cheap, and its rounding cancels against that of dp; and
  // gradients of weights are sums over many rows, which the rounding of results would not leave exact
  const bool is_rounded = a.weights && a.out.dtype != Dtype::float32;
  const uint32_t by_keys = is_rounded ? ~uint32_t{0} : 1;
  if (!a.is_joint || !(a.classes & by_keys)) return;
  float* means = backward.pieces.take(G * tokens * 4);
  __builtin_memset(means, 0, G * tokens * 16);
  auto mean_of = [&](int64_t h, int64_t t) { return means + ((h - h0) * tokens + t - range.t0) * 4; };
  for (int64_t c = 0; c < a.C; ++c)
    backward.for_each(
        c, range, rows, by_keys, RowSums{},
        [&](const ChapterLanes& lanes, const SumRuns& runs, ChapterBlocks<How>& blocks) {
          for (int64_t block = 0; block < blocks.count(); ++block) {
            blocks.load(block);
            for_each_panel(lanes.n, [&](const Panel& panel, auto nv) {
              constexpr int64_t PANEL = nv * VL;
              alignas(64) float parts[4][PANEL];
              auto exchange_means = [&](bool is_loaded) {
                for (int64_t i = 0; i < PANEL; ++i) {
                  const int64_t lane = panel.first + (i < panel.n ? i : 0);
                  float* mean = mean_of(lanes.head[lane], lanes.t[lane]);
                  for (int k = 0; k < 4; ++k)
                    if (is_loaded) parts[k][i] = mean[k];
                    else if (i < panel.n) mean[k] = parts[k][i];
                }
              };
              exchange_means(true);
              backward.template products<nv>(panel, runs, blocks, backward.weights, backward.ds);
              backward.template weigh<nv>(panel, blocks.n, backward.weights);
              for (int v = 0; v < nv; ++v) {
                WeightedMean mean{((vf*)parts[0])[v], ((vf*)parts[1])[v], ((vf*)parts[2])[v],
                                  ((vf*)parts[3])[v]};
                const vf w = ((const vf*)(backward.weight + panel.first))[v];
                for (int64_t j = 0; j < blocks.n; ++j)
                  mean.add(w * ((vf*)backward.weights)[j * nv + v], ((vf*)backward.ds)[j * nv + v]);
                ((vf*)parts[0])[v] = mean.high, ((vf*)parts[1])[v] = mean.low;
                ((vf*)parts[2])[v] = mean.weight_high, ((vf*)parts[3])[v] = mean.weight_low;
              }
              exchange_means(false);
            });
          }
        });
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    if (!(by_keys >> a.row_class[row] & 1)) continue;
    const int64_t first = a.row_start[row] > range.t0 ? a.row_start[row] : range.t0;
    const int64_t last = a.row_end[row] < range.t1 ? a.row_end[row] : range.t1;
    for (int64_t h = h0; h < h0 + G; ++h)
      for (int64_t t = first; t < last; ++t) {
        const float* m = mean_of(h, t);
        RowStats& stats = stats_of(a, range.b, h, t);
        WeightedMean mean{broadcast(m[0]), broadcast(m[1]), broadcast(m[2]), broadcast(m[3])};
        vf delta, extra = broadcast(stats.extra);
        mean.store(&delta, &extra);
        stats.delta = delta[0], stats.extra = extra[0];
      }
  }
}

template <class How>
static void chapter_d_query(const ChapterArgs& a, const QueryRange& range, float* scratch) {
  ChapterBackward<How> backward(a, scratch);
  const int64_t G = a.H / a.Hkv, h0 = range.hkv * G, tokens = range.t1 - range.t0;
  const bool in_place = a.d_query.dtype == Dtype::float32;
  ChapterGrads grads;
  RowSums& sums = grads.d_query;
  sums.b0 = range.b, sums.h0 = h0, sums.t0 = range.t0;
  if (in_place) {
    sums.data = (float*)a.d_query.data + at(a.d_query, range.b, h0, range.t0);
    for (int i = 0; i < 3; ++i) sums.stride[i] = a.d_query.stride[i];
  } else {
    sums.data = backward.pieces.take(G * tokens * backward.ldk);
    sums.stride[1] = tokens * backward.ldk, sums.stride[2] = backward.ldk;
  }
  for (int64_t h = h0; h < h0 + G; ++h)
    for (int64_t t = range.t0; t < range.t1; ++t)
      __builtin_memset(sums.row(range.b, h, t), 0, a.D * 4);
  const Entries rows = rows_of(a, range);
  for (int64_t c = 0; c < a.C; ++c)
    backward.for_each(c, range, rows, ~uint32_t{0}, sums,
                      [&](const ChapterLanes& lanes, const SumRuns& runs, ChapterBlocks<How>& blocks) {
                        backward.tile(lanes, runs, blocks, grads);
                      });
  if (in_place) return;
  for (int64_t h = h0; h < h0 + G; ++h)
    for (int64_t t = range.t0; t < range.t1; ++t)
      store_row(a.d_query, at(a.d_query, range.b, h, t), a.d_query.stride[3], a.D,
                sums.row(range.b, h, t));
}

template <class How>
static void chapter_d_chapter(const ChapterArgs& a, int64_t hkv, int64_t c,
                              const ChapterGrads& grads, float* scratch) {
  ChapterBackward<How> backward(a, scratch);
  backward.for_each(c, {0, hkv, 0, a.T}, {0, a.B * a.N}, ~uint32_t{0}, grads.d_query,
                    [&](const ChapterLanes& lanes, const SumRuns& runs, ChapterBlocks<How>& blocks) {
                      backward.tile(lanes, runs, blocks, grads);
                    });
  if (grads.d_weight) backward.finish_entry(grads);
}

template <class How>
static int64_t chapter_scratch(const ChapterArgs& a, int64_t tokens) {
  const int64_t wide = round_up(a.D, VL) + round_up(a.Dv, VL), rows = a.H / a.Hkv * tokens;
  return (3 * TILE_ROWS + CHAPTER_KEYS + VL) * wide + 2 * TILE_ROWS * (CHAPTER_KEYS + 8) +
         (4 + wide) * rows + How::more_scratch(a) + 512;
}
