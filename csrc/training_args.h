// The table of kernels of rows between matrix products.
#pragma once

#include <cstdint>

namespace memattn {

// Of one row, float32 without padding; see training_rows.cpp.
struct TrainingKernels {
  // out = x * scale * weight, with the scale that is returned, 1 / sqrt(mean(x^2) + eps)
  float (*norm)(int64_t E, const float* x, const float* weight, float eps, float* out);
  void (*norm_again)(int64_t E, const float* x, const float* weight, float scale, float* out);
  // d_weight is added to, and `residual`, if there is one, to d_x
  void (*norm_backward)(int64_t E, const float* d_out, const float* x, const float* weight,
                        float scale, const float* residual, float* d_x, float* d_weight);
  void (*rotate)(int64_t D, const float* x, const float* cos, const float* sin, float sign,
                 float* out);
  // to = silu(gate) * up
  void (*gate)(int64_t n, const float* gate, const float* up, float* to);
  // and its gradients, with the same `out` again
  void (*gate_backward)(int64_t n, const float* d_out, const float* gate, const float* up,
                        float* d_gate, float* d_up, float* out);
  float (*cross_entropy)(int64_t V, int64_t label, float* logits);
};

}  // namespace memattn
