// Chapter attention and its router in bfloat16: what ChapterFloats and RouterFloats do, in products of
// pairs.
//
// Included after bfloat16_rows.h, chapter_attention_blocks.h and chapter_router_tile.h. The forward
// takes weights from its scores as other attention in pairs does. The backward has weights and
// gradients in floats, and rounds them for sums.

struct ChapterPairs : InPairs {
  using Unit = Pairs;
  static MEMATTN_INLINE bool lies_in_units(const View&) { return true; }

  // rows in pairs of lanes, from a square of VL rows in pairs of numbers
  static MEMATTN_INLINE void keep_rows(const vf* square, int64_t lane, int64_t d, int64_t ld,
                                       float* rows) {
    for (int k = 0; k < VL; k += 2) {
      const __m512i a = (__m512i)square[k], b = (__m512i)square[k + 1];
      float* to = rows + (lane + k) / 2 * ld + 2 * d;
      _mm512_storeu_si512(to, interleaved<0>(a, b));
      if (2 * d + VL < ld) _mm512_storeu_si512(to + VL, interleaved<VL>(a, b));
    }
  }

  // a row of a bank; one of codes is rounded, as in plain PyTorch
  static void bank_row(const BankView& bank, int64_t c, int64_t hkv, int64_t j, int64_t width,
                       int64_t ld, float* to) {
    const int64_t* stride = bank.view.stride;
    if (!bank.bits) {
      load_pairs(bank.view, c * stride[0] + hkv * stride[1] + j * stride[2], stride[3], width, ld, to);
      return;
    }
    BankView part = bank;
    alignas(64) float numbers[2 * VL];
    for (int64_t d = 0; d < 2 * ld; d += 2 * VL) {
      const int64_t left = width - d < 2 * VL ? width - d : 2 * VL;
      part.view.data = (int8_t*)bank.view.data + d * bank.bits / 8 * stride[3];
      if (left > 0) load_bank_row(part, c, hkv, j, left, 2 * VL, numbers);
      else __builtin_memset(numbers, 0, sizeof(numbers));
      _mm512_storeu_si512(to + d / 2, rounded(((const vf*)numbers)[0], ((const vf*)numbers)[1]));
    }
  }

  static const float* summed(const Rows& rows, int64_t n, int64_t width, float* to) {
    interleave(rows, n, width, round_up(width, VL), to);
    return to;
  }

  // pairs of keys, [units][width]; and what keep_panel() keeps
  static int64_t summed_floats(const ChapterArgs& a) {
    return CHAPTER_KEYS / 2 * round_up(a.D > a.Dv ? a.D : a.Dv, VL);
  }
  static int64_t more_scratch(const ChapterArgs& a) {
    return summed_floats(a) + TILE_ROWS * CHAPTER_KEYS + CHAPTER_KEYS * VL;
  }
  static ChapterSums sums(const ChapterArgs& a, const float*, const float*, float* more) {
    float* weights = more + summed_floats(a);
    return {weights, weights + TILE_ROWS / 2 * CHAPTER_KEYS};
  }

  template <int NV>
  static void products(const Rows& keys, int64_t n, int64_t width, const SumRuns&, const float* panel,
                       float* to) {
    product<NV, Store::set, true, Pairs>(n, 1, pairs_in(width), keys.data, keys.stride, 0, panel,
                                         NV * VL, 0, to, NV * VL, nullptr);
  }

  // scores: [CHAPTER_KEYS][NV * VL], and behind them their weights, pairs of keys
  template <int NV>
  static const float* weigh(float* scores, int64_t n, float scale2, SoftmaxState<NV>* state,
                            vf* alpha) {
    float* weights = scores + CHAPTER_KEYS * NV * VL;
    for (int v = 0; v < NV && n % 2; ++v) ((vf*)scores)[n * NV + v] = broadcast(-__builtin_inff());
    pair_softmax_step<NV, false>(scores, pairs_in(n), scale2, state, alpha, weights, nullptr);
    return weights;
  }
  static int64_t run(int64_t) { return CHAPTER_KEYS; }

  template <int NV>
  static const float* keep_panel(const ChapterSums& sums, const Panel& panel, int64_t n,
                                 const float* weights, const float* ds) {
    constexpr int64_t HALF = NV * VL / 2;
    const int64_t at = panel.first * CHAPTER_KEYS;
    const vf *p = (const vf*)(weights + at), *d = (const vf*)(ds + at);
    float *weight_lanes = (float*)sums.weights + at / 2, *lanes = (float*)sums.ds + at / 2;
    float* keys = (float*)sums.ds + TILE_ROWS / 2 * CHAPTER_KEYS;
    for (int64_t j = 0; j < n; j += 2, p += 2 * NV, d += 2 * NV) {
      vf p_next[NV], d_next[NV];
      for (int v = 0; v < NV; ++v) {
        p_next[v] = j + 1 < n ? p[NV + v] : vf{}, d_next[v] = j + 1 < n ? d[NV + v] : vf{};
        _mm512_store_si512(keys + (j / 2 * NV + v) * VL, paired(d[v], d_next[v]));
      }
      store_lane_pairs<NV, HALF>(p, p_next, weight_lanes + j * HALF);
      store_lane_pairs<NV, HALF>(d, d_next, lanes + j * HALF);
    }
    return keys;
  }
};

// Logits are exact products, summed in float32: nothing is rounded.
struct RouterPairs {
  static int64_t units(const RouterArgs& a) { return pairs_in(a.E); }
  static void panels(const RouterArgs& a, const RouterTile& tile, float* rows, float* to) {
    const int64_t lanes = tile.panel * tile.panels, ld = round_up(units(a), VL);
    for (int64_t i = 0; i < lanes; ++i) {
      const int64_t offset = hidden_at(a, tile, i);
      load_pairs(a.hidden, offset < 0 ? 0 : offset, a.hidden.stride[2], offset < 0 ? 0 : a.E, ld,
                 rows + i * ld);
    }
    to_panels(rows, ld, lanes, units(a), tile.panel, to);
  }
  template <int NV>
  static void products(const RouterArgs& a, int64_t c, int64_t n, const float* x, float* z) {
    product<NV, Store::set, true, Pairs>(n, 1, units(a), a.pairs + c * a.pair_stride, a.pair_stride, 0,
                                         x, NV * VL, 0, z, NV * VL, nullptr);
  }
};
