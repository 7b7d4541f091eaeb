// The table of kernels of the causal filter over tokens.
#pragma once

#include <cstdint>

namespace memattn {

// One token of F features, float32 without padding; see token_filter.cpp.
struct FilteredToken {
  int64_t F = 0;
  int64_t taps = 0;               // tokens that the filter sees: this one and those before it
  const float* x = nullptr;       // its inputs; those of the token before it are F floats before
  const float* weight = nullptr;  // [taps or more, F], the filter of this token first
  int64_t unit = 0;               // the first features, vectors of length 1
  int64_t head_dim = 1;           // features of such a vector
};

struct FilterKernels {
  // out [F] = SiLU of the filter, where unit vectors are divided by their length
  void (*forward)(const FilteredToken& token, float* out);
  // from d_out the gradient of the filter, `d_filtered`; d_weight is added to. `work` has F floats.
  void (*backward)(const FilteredToken& token, const float* d_out, float* work, float* d_filtered,
                   float* d_weight);
  // d_x [F] from `d_filtered [taps][F]` of the token and those behind it; null where one does not
  // see it
  void (*inputs)(int64_t F, int64_t taps, const float* const* d_filtered, const float* weight,
                 float* d_x);
};

}  // namespace memattn
