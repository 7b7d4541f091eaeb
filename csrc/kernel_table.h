// The table of kernels of one instruction set, included last.

static constexpr Kernels make_kernels(const char* name) {
  return {name,
          VL,
          TILE_ROWS,
          false,
          store_scaled,
          {float_forward_scratch<SegmentedArgs>, float_backward_scratch<SegmentedArgs>,
           segmented_forward_by<InFloats>, segmented_backward_by<InFloats>},
          {future_forward_scratch<InFloats>, future_backward_scratch<FloatFutureSteps>,
           future_forward_by<InFloats>, future_backward_by<FloatFutureSteps>},
          {task_forward_scratch<InFloats>, task_backward_scratch<InFloats>, task_forward_by<InFloats>,
           task_backward_by<InFloats>},
          {float_forward_scratch<BranchArgs>, float_backward_scratch<BranchArgs>,
           branch_forward_by<InFloats>, branch_backward_by<InFloats>},
          {chapter_scratch<ChapterFloats>, chapter_forward<ChapterFloats>, chapter_prepare<ChapterFloats>,
           chapter_d_query<ChapterFloats>, chapter_d_chapter<ChapterFloats>},
          {router_forward_scratch, router_backward_scratch, router_forward<RouterFloats>,
           router_backward_rows<RouterFloats>, router_backward_chapters},
          {memory_forward_scratch, memory_backward_scratch, memory_step_scratch, memory_forward,
           memory_backward, memory_step},
          {step_scratch, step_attend, step_products, step_norm, step_rotate, step_gate},
          {rows_norm, rows_norm_again, rows_norm_backward, rows_rotate, rows_gate, rows_gate_backward,
           rows_cross_entropy},
          {filter_forward, filter_backward, filter_inputs},
          {rows_to_panels, panels_to_rows, panel_products}};
}
