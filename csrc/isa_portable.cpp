// Tile kernels for any processor: four-float vectors, lowered by the compiler.
#include "isa.h"

#define MEMATTN_VL 4
#define MEMATTN_REGISTERS 16
#define MEMATTN_FMA(a, b, c) ((a) * (b) + (c))
#define MEMATTN_MAX(a, b) ((a) > (b) ? (a) : (b))
#define MEMATTN_FMA1(a, b, c) ((a) * (b) + (c))

namespace memattn::portable {
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
}  // namespace memattn::portable

namespace memattn {
const Kernels& portable_kernels() {
  static constexpr Kernels table = portable::make_kernels("portable");
  return table;
}
}  // namespace memattn
