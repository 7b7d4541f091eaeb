// What the operators of the neural memory hand to its kernels, and the table of these.
#pragma once

#include <cstdint>

#include "view.h"

namespace memattn {

constexpr int64_t MEMORY_DEPTH = 4;  // most layers of a neural memory

// Neural memory; a row is a sequence or a packed document. What is contiguous is a plain pointer.
struct MemoryArgs {
  int64_t B, H, T, R, depth;
  int64_t width[MEMORY_DEPTH + 1];   // D, hidden sizes, Dv
  int64_t chunk, group;              // tokens of a chunk, chunks between two checkpoints
  bool reads_chunk, is_silu, residual, is_huber, is_soft, skips_nonfinite, has_momentum;
  float huber_delta;
  double max_norm;                   // 0 where there is none
  View query, key, value, out;       // [B, H, T, D or Dv]
  View lr, momentum, decay;          // [B, H, T]; no data where not given
  const int32_t *row_start, *row_end;  // [R] or null
  // the state at the start; [R, H, ...], weights and momentum may be shared by the rows
  const float *start_weights, *start_momentum;
  bool shares_weights, shares_momentum;
  const float *pending_h, *pending_delta, *pending_decay, *pending_eta;
  const int32_t* count;              // [R] or null
  // results but for `out`; the state only where `end_weights` is there
  float* surprise;                   // [B, H, T]
  float *end_weights, *end_momentum, *end_h, *end_delta, *end_decay, *end_eta;
  int32_t* end_count;                // [R]
  int64_t* skipped_of;               // [R, H]
  float* checkpoints;                // [B, slots, H, weights and behind them momentum]
  int64_t slots;
  // backward only; cotangents may be null
  View d_out;
  const float *d_end_weights, *d_end_momentum, *d_end_h, *d_end_delta, *d_end_decay, *d_end_eta;
  View d_query, d_key, d_value, d_lr, d_momentum, d_decay;
  float *d_weights, *d_start_momentum;  // [R, H, ...]
  float *d_pending_h, *d_pending_delta, *d_pending_decay, *d_pending_eta;

  int64_t weights_size() const {
    int64_t n = 0;
    for (int64_t l = 0; l < depth; ++l) n += width[l] * width[l + 1];
    return n;
  }
  int64_t inputs_width() const { return sum_of_widths(0); }
  int64_t outputs_width() const { return sum_of_widths(1); }
  int64_t most_width() const {
    int64_t most = 0;
    for (int64_t l = 0; l <= depth; ++l) most = width[l] > most ? width[l] : most;
    return most;
  }
  const float* start_of(int64_t row, int64_t h) const {
    return start_weights + ((shares_weights ? 0 : row) * H + h) * weights_size();
  }
  const float* momentum_of(int64_t row, int64_t h) const {
    if (!start_momentum) return nullptr;
    return start_momentum + ((shares_momentum ? 0 : row) * H + h) * weights_size();
  }
  float* checkpoint_of(int64_t b, int64_t slot, int64_t h) const {
    return checkpoints + ((b * slots + slot) * H + h) * weights_size() * (has_momentum ? 2 : 1);
  }

 private:
  int64_t sum_of_widths(int64_t from) const {
    int64_t n = 0;
    for (int64_t l = from; l < depth + from; ++l) n += width[l];
    return n;
  }
};

struct MemoryKernels {
  // floats of scratch that one thread needs
  int64_t (*forward_scratch)(const MemoryArgs&);
  int64_t (*backward_scratch)(const MemoryArgs&);
  int64_t (*step_scratch)(const MemoryArgs&);
  // one head of one row
  void (*forward)(const MemoryArgs&, int64_t row, int64_t h, float* scratch);
  void (*backward)(const MemoryArgs&, int64_t row, int64_t h, float* scratch);
  // one token with a state; the pending factors are those of the end, too
  void (*step)(const MemoryArgs&, int64_t row, int64_t h, float* scratch);
};

}  // namespace memattn
