// Many tokens at once through the products of a decoder layer. A lane is a token: weights are read
// row by row where they lie, and only the hidden states of a tile of tokens are repacked, to panels
// [features][lanes of a panel].
//
// Included once per instruction set after decoder_step_tile.h.

// Two vectors of tokens to a panel, or one where there are no more tokens.
static int64_t panel_lanes(int64_t lanes) { return lanes == VL ? VL : 2 * VL; }

// Rows [lanes][ld] to panels; ld is a multiple of VL.
static void rows_to_panels(int64_t lanes, int64_t K, const float* rows, int64_t ld, float* panels) {
  to_panels(rows, ld, lanes, K, panel_lanes(lanes), panels);
}

// And back; features from K on are zeros.
static void panels_to_rows(int64_t lanes, int64_t K, const float* panels, float* rows, int64_t ld) {
  from_panels(panels, panel_lanes(lanes), lanes, K, ld, rows);
}

template <int NV>
static void panel_products_by(int64_t M, int64_t K, const float* W, const float* from,
                              int64_t panels, float* to, int64_t to_stride) {
  constexpr int64_t PANEL = NV * VL;
  constexpr int64_t RUN = 256;  // terms of a sum, which keeps their rounding small
  // weights that stay in the first-level cache while all panels meet them
  constexpr int64_t ROWS = 2 * micro_rows<NV>();
  for (int64_t m = 0; m < M; m += ROWS)
    for (int64_t p = 0; p < panels; ++p)
      dot_products<NV>(M - m < ROWS ? M - m : ROWS, K, RUN, W + m * K, K, from + p * K * PANEL,
                       PANEL, to + p * to_stride + m * PANEL, PANEL);
}

// Panels to[M] of the products of weights [M, K] with panels from[K]; `to` has a panel every
// to_stride floats.
static void panel_products(int64_t M, int64_t K, const float* W, const float* from, int64_t lanes,
                           float* to, int64_t to_stride) {
  if (lanes == VL)
    panel_products_by<1>(M, K, W, from, 1, to, to_stride);
  else
    panel_products_by<2>(M, K, W, from, lanes / (2 * VL), to, to_stride);
}
