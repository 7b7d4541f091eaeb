// The table of kernels of an instruction set with products in bfloat16, included last: those of
// another one, but for tensors in bfloat16.

static bool in_bfloat16(std::initializer_list<View> views) {
  for (const View& view : views)
    if (view.data && view.dtype != Dtype::bfloat16) return false;
  return true;
}

static bool in_bfloat16(const SegmentedArgs& a) {
  return in_bfloat16({a.query, a.key, a.value, a.persistent_key, a.persistent_value, a.memory_key,
                      a.memory_value, a.out, a.d_out});
}

// The kernels for all other dtypes.
static const Kernels& other_kernels() { return MEMATTN_OTHER_KERNELS; }

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t segmented_forward_scratch(const SegmentedArgs& a) {
  return larger(pair_forward_scratch(a), other_kernels().segmented.forward_scratch(a));
}

static void segmented_forward(const SegmentedArgs& a, const Tile& tile, float* scratch) {
  if (in_bfloat16(a)) segmented_forward_by<InPairs>(a, tile, scratch);
  else other_kernels().segmented.forward(a, tile, scratch);
}

static int64_t segmented_backward_scratch(const SegmentedArgs& a) {
  return larger(pair_backward_scratch(a), other_kernels().segmented.backward_scratch(a));
}

static void segmented_backward(const SegmentedArgs& a, const Tile& tile,
                               const SegmentedGrads& grads, float* scratch) {
  if (in_bfloat16(a)) segmented_backward_by<InPairs>(a, tile, grads, scratch);
  else other_kernels().segmented.backward(a, tile, grads, scratch);
}

static Kernels make_kernels(const char* name) {
  Kernels table = other_kernels();
  table.name = name;
  table.segmented = {segmented_forward_scratch, segmented_backward_scratch, segmented_forward,
                     segmented_backward};
  return table;
}
