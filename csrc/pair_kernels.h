// The kernels of one instruction set in products of pairs of bfloat16, included inside its namespace.

#include "tile_engine.h"
#include "key_blocks.h"
#include "attention_tile.h"
#include "row_sums.h"
#include "attention_rows.h"
#include "bfloat16_tile.h"
#if defined(MEMATTN_AMX)
#include "bfloat16_amx.h"
#else
// what a thread holds while it multiplies pairs: nothing
struct PairProducts {
  PairProducts() {}
};
#endif
#include "bfloat16_rows.h"
#include "segmented_attention_tile.h"
#include "future_attention_tile.h"
#include "future_attention_backward_tile.h"
#include "bfloat16_future.h"
#include "task_masked_attention_tile.h"
#include "branch_attention_tile.h"
#include "chapter_attention_rows.h"
#include "chapter_attention_blocks.h"
#include "chapter_router_tile.h"
#include "chapter_router_backward_tile.h"
#include "bfloat16_chapter.h"
#include "chapter_attention_tile.h"
#include "chapter_attention_backward_tile.h"
#include "bfloat16_table.h"
