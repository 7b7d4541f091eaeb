// Tile kernels for AVX-512: sixteen-float vectors.
#if defined(__x86_64__)
#include "isa.h"
#include "isa_avx512.h"

MEMATTN_TARGET_BEGIN("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,f16c")
namespace memattn::avx512 {
#include "tile_engine.h"
#include "key_blocks.h"
#include "attention_tile.h"
#include "row_sums.h"
#include "attention_rows.h"
#include "segmented_attention_tile.h"
#include "future_attention_tile.h"
#include "future_attention_backward_tile.h"
#include "task_masked_attention_tile.h"
#include "chapter_attention_rows.h"
#include "branch_attention_tile.h"
#include "chapter_attention_tile.h"
#include "chapter_attention_backward_tile.h"
#include "chapter_router_tile.h"
#include "chapter_router_backward_tile.h"
#include "neural_memory_chunk.h"
#include "neural_memory_tile.h"
#include "neural_memory_backward_tile.h"
#include "neural_memory_step_tile.h"
#include "decoder_step_tile.h"
#include "decoder_rows_tile.h"
#include "kernel_table.h"
}  // namespace memattn::avx512

namespace memattn {
const Kernels& avx512_kernels() {
  static constexpr Kernels table = avx512::make_kernels("avx512");
  return table;
}
}  // namespace memattn

MEMATTN_TARGET_END
#endif
