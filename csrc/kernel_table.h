// The table of kernels of one instruction set, included last.

static constexpr Kernels make_kernels(const char* name) {
  return {name,
          VL,
          TILE_ROWS,
          forward_scratch,
          backward_scratch,
          segmented_forward,
          segmented_backward,
          {future_forward_scratch, future_backward_scratch, future_forward, future_backward}};
}
