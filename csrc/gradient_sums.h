// Gradients of keys, summed in float32 by several chunks of queries and stored in their own dtype.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace memattn {

// Rows [begin, end) of a gradient, as one chunk of queries summed them.
struct Part {
  const float* data;
  int64_t begin, end;
};

// Writes to `to` (rows at `offset`) `factor` times the sum of the parts' rows; 0 where none reaches.
inline void store_sum(const View& to, int64_t offset, int64_t n, int64_t width, int64_t ld,
                      float factor, const std::vector<Part>& parts) {
  std::vector<float> rounded(width);
  for (int64_t j = 0; j < n; ++j) {
    const int64_t at = offset + j * width;  // gradients are contiguous
    float* row = to.dtype == Dtype::float32 ? static_cast<float*>(to.data) + at : rounded.data();
    bool empty = true;
    for (const Part& part : parts) {
      if (j < part.begin || j >= part.end) continue;
      const float* from = part.data + (j - part.begin) * ld;
      if (empty) std::copy_n(from, width, row);
      else for (int64_t d = 0; d < width; ++d) row[d] += from[d];
      empty = false;
    }
    if (empty) std::fill_n(row, width, 0.0f);
    for (int64_t d = 0; d < width; ++d) row[d] *= factor;
    auto* half = static_cast<uint16_t*>(to.data) + at;
    if (to.dtype == Dtype::float16)
      for (int64_t d = 0; d < width; ++d) half[d] = torch::headeronly::Half(row[d]).x;
    if (to.dtype == Dtype::bfloat16)
      for (int64_t d = 0; d < width; ++d) half[d] = torch::headeronly::BFloat16(row[d]).x;
  }
}

}  // namespace memattn
