// What the operators hand to the tile kernels, and the table of kernels of one instruction set.
//
// Plain structs only: every translation unit sees them, whatever instructions it is compiled for.
#pragma once

#include <cstdint>

#include "isa_amx.h"
#include "memory_args.h"
#include "step_args.h"
#include "token_filter_args.h"
#include "training_args.h"
#include "view.h"

namespace memattn {

// What the queries of one sequence may see. Row t sees the token keys [lo, hi), the first
// `persistent` persistent keys, and the first `memory` memory keys of segment `segment`.
struct RowRange {
  int32_t lo, hi;
  int32_t persistent;
  int32_t segment, memory;
  int32_t sink_lo, sink_hi;  // token keys before lo, or none
  int64_t sinks() const { return sink_hi - sink_lo; }
};

struct SegmentedArgs {
  int64_t B, H, Hkv, T, S, D, Dv, P, M;
  double scale;
  double softcap;                    // of scores, 0 for none
  View query, key, value, out;       // [B, H or Hkv, T or S, D or Dv]
  View persistent_key, persistent_value;  // [Hkv, P, D or Dv]
  View memory_key, memory_value;     // [B, Hkv, n_segments, M, D or Dv]
  float* lse;                        // [B, H, T]
  float *lse2_high, *lse2_low;       // [B, H, T], what the backward needs of it (RowLse)
  const RowRange* rows;              // [B or 1, T]
  int64_t rows_stride;               // T, or 0 where all sequences are alike
  // backward only
  View d_out, d_query;               // [B, H, T, Dv or D]
  const float* d_lse;                // [B, H, T]
};

// Float32 sums of the gradients of one (sequence, key head, chunk of queries).
struct SegmentedGrads {
  float* d_key;    // [key_end - key_begin, D rounded up to lanes]
  float* d_value;  // [key_end - key_begin, Dv rounded up to lanes]
  int64_t key_begin;
  float* d_persistent_key;    // [P, ...]
  float* d_persistent_value;
  float* d_memory_key;    // [(segment_end - segment_begin) * M, ...]
  float* d_memory_value;
  int64_t segment_begin;
};

// The queries of one tile: rows [t0, t1) of heads [h0, h1), all of one key head.
struct Tile {
  int64_t b, hkv, h0, h1, t0, t1;
};

// What the queries of one sequence may see in future attention. Row t sees the token keys [lo, mid)
// and the future rows [future_lo, future_hi); [mid, hi) are the keys that its target sees besides,
// none where the row does not count for the loss.
struct FutureRow {
  int32_t lo, mid, hi;
  int32_t future_lo, future_hi;
  int32_t table;  // rows of different tables are walked apart: nobody sees what lies between
};

enum class FutureLoss : int { none, mse, cosine };

struct FutureArgs {
  int64_t B, H, Hkv, Hf, T, S, R, D, Dv;
  double scale;
  View query, key, value;           // [B, H or Hkv, T or S, D or Dv]
  View future_query;                // [B, H, T, D], the query where there is no other
  bool separate_query;
  View future_key, future_value;    // [B, Hf, R, D or Dv], the first stride 0 for a shared table
  View out, out_future;             // [B, H, T, Dv]
  float *lse;                       // [B, H, T]
  float *lse2_high, *lse2_low;      // [B, H, T], what the backward needs of it (RowLse)
  FutureLoss loss;
  View target;                      // [B, H, T, Dv]
  float *target2_high, *target2_low;  // the same of the target, -inf for a row that does not count
  double* row_loss;                 // [B, H, T], forward only
  const FutureRow* rows;            // [B or 1, T]
  int64_t rows_stride;              // T, or 0 where all sequences are alike
  // backward only
  View d_out, d_out_future;         // [B, H, T, Dv]; the latter without a loss
  View d_query, d_future_query;     // [B, H, T, D]
  const float* d_lse;               // [B, H, T]
  double d_row_loss;                // gradient of each row's loss
  bool through_target;              // the loss reaches the tokens through the target too

  // whether this pass walks the keys [mid, hi)
  bool walks_target(bool is_backward) const {
    return loss != FutureLoss::none && (!is_backward || through_target);
  }
};

// Float32 sums of the gradients of one key head and of the table heads that meet its queries.
struct FutureGrads {
  float* d_key;    // [keys, D rounded up to lanes]
  float* d_value;  // [keys, Dv rounded up to lanes]
  int64_t key_begin;
  float* d_future_key;  // [future_rows, ...] of the first table head
  float* d_future_value;  // behind it, and behind that the next head
  int64_t future_begin, future_rows, table_head_begin;
};

// Tiles of a task mask: so many queries by so many keys.
constexpr int64_t MASK_TILE = 128;

// The mask's tables are those of MaskTensors in memattn/ops/task_mask.py.
struct TaskArgs {
  int64_t B, H, Hkv, T, S, D, Dv;
  double scale;
  bool is_causal;
  View query, key, value, out;       // [B, H or Hkv, T or S, D or Dv]
  float* lse;                        // [B, H, T]
  float *lse2_high, *lse2_low;       // [B, H, T], what the backward needs of it (RowLse)
  // [B]; queries of a sequence are rows [start, query_end), keys [start, key_end)
  const int64_t *task, *start, *query_end, *key_end;
  int64_t mask_heads, tile_rows, tile_cols;  // of a mask, in tiles
  int64_t words, nodes;              // in a row of bits; no nodes in the dense form
  const int32_t *bits, *slots, *query_node, *key_node, *query_tiles, *query_counts;
  // backward only
  View d_out, d_query;               // [B, H, T, Dv or D]
  const float* d_lse;                // [B, H, T]

  // which list has the keys of a tile of queries, t0 counted from the start
  int64_t list(int64_t b, int64_t head, int64_t t0) const {
    const int64_t in_mask = task[b] * mask_heads + (mask_heads == 1 ? 0 : head);
    return in_mask * tile_rows + t0 / MASK_TILE;
  }
};

// Float32 sums of the gradients of some keys of one head, from row `key_begin` on.
struct KeyGrads {
  float* d_key;    // [keys, D rounded up to lanes]
  float* d_value;  // [keys, Dv rounded up to lanes]
  int64_t key_begin;
};

// The keys [lo, hi) that a token sees.
struct KeyRange {
  int32_t lo, hi;
};

struct BranchArgs {
  int64_t B, A, F, H, Hkv, T, S, D, Dv;
  double scale;
  View query, key, value;  // [B, A, H, T, D], [B, F, Hkv, S, D or Dv]
  View out, ungated;       // [B, A, H, T, Dv], contiguous; in the backward `out` is without gates
  const float* gates;      // [B, T, A]
  const KeyRange* ranges;  // [B, T], or of all sequences
  int64_t ranges_stride;   // T, or 0
  // slots t * A + a of branch f in sequence b, rising: [list_begin[i], list_begin[i + 1]) of list
  // i = b * F + f; without those that see no key
  const int64_t* list_begin;
  const int32_t* entries;
  float* lse;                   // [B, A, H, T]
  float *lse2_high, *lse2_low;  // [B, A, H, T], what the backward needs of it (RowLse)
  // backward only
  View d_out, d_query;          // [B, A, H, T, Dv or D]
  const float* d_lse;           // [B, A, H, T]
  double* d_gate;               // [B, A, H, T], what each head adds
};

// Keys or values of a bank of chapters, [C, Hkv, M, D or Dv]: floats, or codes of eight bits or of
// two times four in a byte (strides count bytes then), with a scale for each row.
struct BankView {
  View view;
  int64_t bits = 0;  // 0: floats
  const float* scale = nullptr;
  int64_t scale_stride[3] = {0, 0, 0};
};

// Rows of float32 sums for query rows: of sequence b, head h and token t.
struct RowSums {
  float* data = nullptr;  // of sequence b0, head h0, token t0
  int64_t stride[3] = {0, 0, 0};
  int64_t b0 = 0, h0 = 0, t0 = 0;

  float* row(int64_t b, int64_t h, int64_t t) const {
    return data + (b - b0) * stride[0] + (h - h0) * stride[1] + (t - t0) * stride[2];
  }
};

struct ChapterArgs {
  int64_t B, H, Hkv, T, D, Dv, C, M, N, K;
  double scale;
  bool is_joint;
  bool counts_slots;                 // a chapter has a weight, or stands in several slots of a row
  bool has_repeats;                  // the latter
  View query, out;                   // [B, H, T, D or Dv]; out is contiguous
  BankView key, value;               // [C, Hkv, M, D or Dv]
  const int32_t* indices;            // [B, N, K]
  const float* weights;              // [B, N, K] or null
  const int32_t *row_start, *row_end;  // [B, N], the queries of each routing row
  // the slots (b * N + n) * K + s with chapter c, rising, the first of each routing row: entries
  // [chapter_begin[c], chapter_begin[c + 1])
  const int32_t *chapter_begin, *entries;
  const uint8_t* row_class;          // [B, N], how finely a routing row is summed
  uint32_t classes;                  // a bit for each class that some row has
  float* lse;                        // [B, H, T]
  float *lse2_high, *lse2_low;       // [B, H, T], what the backward needs of it (RowLse)
  // backward only
  View d_out, d_query;               // [B, H, T, Dv or D]; d_query is contiguous
  const float* d_lse;                // [B, H, T]
  float* row_stats;                  // [B, H, T, 4]

  // the routing row of an entry
  int64_t row_of(int64_t e) const { return (uint32_t)entries[e] / (uint32_t)K; }
};

// Classes of routing rows by the number of their keys, from few to many (SumRuns).
constexpr int ROW_CLASSES = 3;
constexpr int64_t ROW_CLASS_KEYS[ROW_CLASSES] = {64, 256, INT64_MAX};

// Queries [t0, t1) of sequence b for one key head.
struct QueryRange {
  int64_t b, hkv, t0, t1;
};

// Where the gradients of one chapter and key head are added; null where one is not wanted.
struct ChapterGrads {
  float* d_key = nullptr;     // [M, D rounded up to lanes], without the scale
  float* d_value = nullptr;   // [M, Dv rounded up to lanes]
  float* d_weight = nullptr;  // by entry
  RowSums d_query;
};

struct ChapterKernels {
  // floats of scratch that one thread needs, for ranges of at most so many tokens
  int64_t (*scratch)(const ChapterArgs&, int64_t tokens);
  void (*forward)(const ChapterArgs&, const QueryRange&, float* scratch);
  // what the backward needs of each row: row_stats
  void (*prepare)(const ChapterArgs&, const QueryRange&, float* scratch);
  void (*d_query)(const ChapterArgs&, const QueryRange&, float* scratch);
  // all queries of a key head with chapter c
  void (*d_chapter)(const ChapterArgs&, int64_t hkv, int64_t c, const ChapterGrads&, float* scratch);
};

// The router of chapters; its rows are those of all sequences, b * N + n.
struct RouterArgs {
  int64_t N, E, C, rows, top_k, num_shared;  // C: chapters with a logit
  float factor;          // 1 / temperature
  float routed_scale;
  View hidden;           // [B, N, E]
  const float* weight;   // [C, E], rows `weight_stride` apart
  int64_t weight_stride;
  const float* pairs;    // [C, E / 2 rounded up], pairs of bfloat16, where hidden states are so, too
  int64_t pair_stride;
  const float* bias;     // [C] or null
  const uint8_t* valid;  // [rows]
  int32_t* indices;      // [rows, num_shared + top_k]
  float* weights;        // the same, forward only
  float *lse_high, *lse_low;  // [rows], a sum of two floats
  // backward only
  const float* d_weights;  // like weights, or null
  const float* gamma;      // [C], the gradient of each probability but for what all share
  float z_factor;          // the gradient of a log-sum-exp over itself
  View d_hidden;
};

// What the rows of one chunk add up to.
struct RouterSums {
  float* probability;  // [C]
  int64_t* chosen;     // [C], how many rows selected each chapter
  double z_square = 0.0, entropy = 0.0;
  int64_t count = 0;   // valid rows
};

// Tiles of rows whose gradients of the logits are there at a time.
struct RouterBlock {
  int64_t first, tiles;  // row, number of tiles
  float* gradients;      // [panels][C][lanes of a panel]
  float* rows;           // [panels][E / two vectors][lanes of a panel][two vectors], E rounded up
  float* d_weight;       // [C][E rounded up to two vectors], sums
  double* d_bias;        // [C], sums
};

struct RouterKernels {
  int64_t (*forward_scratch)(const RouterArgs&);
  int64_t (*backward_scratch)(const RouterArgs&);
  // rows [begin, end); tile `i` of a block; the chapters [c, c + n) of a block
  void (*forward)(const RouterArgs&, int64_t begin, int64_t end, RouterSums&, float* scratch);
  void (*backward_rows)(const RouterArgs&, const RouterBlock&, int64_t i, float* scratch);
  void (*backward_chapters)(const RouterArgs&, const RouterBlock&, int64_t c, int64_t n);
};

// The kernels of one operator.
template <class Args, class Grads>
struct OperatorKernels {
  // floats of scratch that one thread needs
  int64_t (*forward_scratch)(const Args&);
  int64_t (*backward_scratch)(const Args&);
  void (*forward)(const Args&, const Tile&, float* scratch);
  void (*backward)(const Args&, const Tile&, const Grads&, float* scratch);
};

struct Kernels {
  const char* name;
  int64_t lanes;      // gradient rows are padded to a multiple of this
  int64_t tile_rows;  // most query rows of a tile
  bool has_pairs;     // multiplies bfloat16
  // writes `rows` rows of `width` numbers, `ld` apart, times `factor` side by side
  void (*store_scaled)(const View& to, int64_t offset, int64_t rows, int64_t width,
                       const float* from, int64_t ld, float factor);
  OperatorKernels<SegmentedArgs, SegmentedGrads> segmented;
  OperatorKernels<FutureArgs, FutureGrads> future;
  OperatorKernels<TaskArgs, KeyGrads> task;
  OperatorKernels<BranchArgs, KeyGrads> branch;
  ChapterKernels chapter;
  RouterKernels router;
  MemoryKernels memory;
  StepKernels step;
  TrainingKernels training;
  FilterKernels filter;
  RowKernels rows;
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
#endif
#if defined(MEMATTN_HAS_AMX)
const Kernels& amx_bf16_kernels();
#endif

// The fastest kernels that this processor runs.
const Kernels& kernels();

}  // namespace memattn
