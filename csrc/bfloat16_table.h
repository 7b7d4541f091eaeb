// The table of kernels of an instruction set with products in bfloat16, included last: those of
// another one, but for the operators below with tensors in bfloat16.

static bool in_bfloat16(std::initializer_list<View> views) {
  for (const View& view : views)
    if (view.data && view.dtype != Dtype::bfloat16) return false;
  return true;
}

static bool in_bfloat16(const SegmentedArgs& a) {
  return in_bfloat16({a.query, a.key, a.value, a.persistent_key, a.persistent_value, a.memory_key,
                      a.memory_value, a.out, a.d_out});
}

static bool in_bfloat16(const TaskArgs& a) {
  return in_bfloat16({a.query, a.key, a.value, a.out, a.d_out});
}

static bool in_bfloat16(const BranchArgs& a) {
  return in_bfloat16({a.query, a.key, a.value, a.out, a.ungated, a.d_out});
}

// a bank may be of codes
static bool in_bfloat16(const ChapterArgs& a) {
  auto floats_of = [](const BankView& bank) { return bank.bits ? View{nullptr} : bank.view; };
  return in_bfloat16({a.query, floats_of(a.key), floats_of(a.value), a.out, a.d_out});
}

// with a loss, what is kept for it is in float32
static bool in_bfloat16(const FutureArgs& a) {
  return in_bfloat16({a.query, a.key, a.value, a.future_query, a.future_key, a.future_value, a.out,
                      a.d_out});
}

static constexpr OperatorKernels<SegmentedArgs, SegmentedGrads> SEGMENTED_PAIRS{
    pair_forward_scratch<SegmentedArgs>, pair_backward_scratch<SegmentedArgs>,
    segmented_forward_by<InPairs>, segmented_backward_by<InPairs>};
static constexpr OperatorKernels<TaskArgs, KeyGrads> TASK_PAIRS{
    task_forward_scratch<InPairs>, task_backward_scratch<InPairs>, task_forward_by<InPairs>,
    task_backward_by<InPairs>};
static constexpr OperatorKernels<BranchArgs, KeyGrads> BRANCH_PAIRS{
    pair_forward_scratch<BranchArgs>, pair_backward_scratch<BranchArgs>, branch_forward_by<InPairs>,
    branch_backward_by<InPairs>};
static constexpr OperatorKernels<FutureArgs, FutureGrads> FUTURE_PAIRS{
    future_forward_scratch<InPairs>, future_backward_scratch<PairFutureSteps>,
    future_forward_by<InPairs>, future_backward_by<PairFutureSteps>};

// The kernels for all other dtypes.
static const Kernels& other_kernels() { return MEMATTN_OTHER_KERNELS; }

// Kernels of an operator that look at the dtype of each call.
template <class Args, class Grads, OperatorKernels<Args, Grads> Kernels::*OPERATOR,
          const OperatorKernels<Args, Grads>& PAIRS>
struct ByDtype {
  static const OperatorKernels<Args, Grads>& of(const Args& a) {
    return in_bfloat16(a) ? PAIRS : other_kernels().*OPERATOR;
  }
  static int64_t forward_scratch(const Args& a) { return of(a).forward_scratch(a); }
  static int64_t backward_scratch(const Args& a) { return of(a).backward_scratch(a); }
  static void forward(const Args& a, const Tile& tile, float* scratch) {
    if (!in_bfloat16(a)) return (other_kernels().*OPERATOR).forward(a, tile, scratch);
    const PairProducts products;
    PAIRS.forward(a, tile, scratch);
  }
  static void backward(const Args& a, const Tile& tile, const Grads& grads, float* scratch) {
    if (!in_bfloat16(a)) return (other_kernels().*OPERATOR).backward(a, tile, grads, scratch);
    const PairProducts products;
    PAIRS.backward(a, tile, grads, scratch);
  }
  static OperatorKernels<Args, Grads> kernels() {
    return {forward_scratch, backward_scratch, forward, backward};
  }
};

// The same of chapter attention.
struct ChapterByDtype {
  static int64_t scratch(const ChapterArgs& a, int64_t tokens) {
    return in_bfloat16(a) ? chapter_scratch<ChapterPairs>(a, tokens)
                          : other_kernels().chapter.scratch(a, tokens);
  }
  template <auto PAIRS, auto OTHER, class... Parts>
  static void run(const ChapterArgs& a, Parts... parts) {
    if (!in_bfloat16(a)) return (other_kernels().chapter.*OTHER)(a, parts...);
    const PairProducts products;
    PAIRS(a, parts...);
  }
  static ChapterKernels kernels() {
    using K = ChapterKernels;
    return {scratch,
            run<chapter_forward<ChapterPairs>, &K::forward>,
            run<chapter_prepare<ChapterPairs>, &K::prepare>,
            run<chapter_d_query<ChapterPairs>, &K::d_query>,
            run<chapter_d_chapter<ChapterPairs>, &K::d_chapter>};
  }
};

// And of the router, whose gradients are computed in floats.
struct RouterByDtype {
  static void forward(const RouterArgs& a, int64_t begin, int64_t end, RouterSums& sums,
                      float* scratch) {
    if (!a.pairs) return other_kernels().router.forward(a, begin, end, sums, scratch);
    const PairProducts products;
    router_forward<RouterPairs>(a, begin, end, sums, scratch);
  }
  static void backward_rows(const RouterArgs& a, const RouterBlock& block, int64_t i, float* scratch) {
    if (!a.pairs) return other_kernels().router.backward_rows(a, block, i, scratch);
    const PairProducts products;
    router_backward_rows<RouterPairs>(a, block, i, scratch);
  }
};

static Kernels make_kernels(const char* name) {
  Kernels table = other_kernels();
  table.has_pairs = true;
  table.name = name;
  table.segmented = ByDtype<SegmentedArgs, SegmentedGrads, &Kernels::segmented,
                            SEGMENTED_PAIRS>::kernels();
  table.task = ByDtype<TaskArgs, KeyGrads, &Kernels::task, TASK_PAIRS>::kernels();
  table.future = ByDtype<FutureArgs, FutureGrads, &Kernels::future, FUTURE_PAIRS>::kernels();
  table.branch = ByDtype<BranchArgs, KeyGrads, &Kernels::branch, BRANCH_PAIRS>::kernels();
  table.chapter = ChapterByDtype::kernels();
  table.router.forward = RouterByDtype::forward;
  table.router.backward_rows = RouterByDtype::backward_rows;
  return table;
}
