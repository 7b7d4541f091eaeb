// Gradients of keys, summed in float32 by several chunks of queries and stored in their own dtype.
#pragma once

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
  const auto store = kernels().store_scaled;
  std::vector<float> sum(width);
  for (int64_t j = 0, end; j < n; j = end) {
    // the rows [j, end) that the same parts reach
    const float* first = nullptr;
    int64_t reaching = 0;
    end = n;
    for (const Part& part : parts) {
      if (j >= part.end) continue;
      end = std::min(end, j < part.begin ? part.begin : part.end);
      if (j < part.begin) continue;
      if (!reaching++) first = part.data + (j - part.begin) * ld;
    }
    const int64_t at = offset + j * width;  // gradients are contiguous
    if (reaching == 1) {
      store(to, at, end - j, width, first, ld, factor);
      continue;
    }
    if (!reaching) std::fill(sum.begin(), sum.end(), 0.0f);
    for (int64_t i = j; i < end; ++i) {
      bool empty = true;
      for (const Part& part : parts) {
        if (i < part.begin || i >= part.end) continue;
        const float* from = part.data + (i - part.begin) * ld;
        if (empty) std::copy_n(from, width, sum.data());
        else for (int64_t d = 0; d < width; ++d) sum[d] += from[d];
        empty = false;
      }
      store(to, offset + i * width, 1, width, sum.data(), width, factor);
    }
  }
}

// A gradient [rows, width] of one head, written once to rows at `offset` of a contiguous tensor.
struct GradientRows {
  View to;
  int64_t offset, width, ld;  // ld: floats between two rows of the sums
  float factor;
};

// Owner of the gradients of keys and values, [heads, rows, D or Dv]. Their sums are [n][ldk] for some
// n keys and behind that [n][ldv] for their values, rows padded to whole vectors.
class KeyGradients {
 public:
  const int64_t rows, ldk, ldv;

  KeyGradients(View d_key, View d_value, int64_t rows, int64_t D, int64_t Dv, double scale)
      : rows(rows), ldk(padded(D)), ldv(padded(Dv)), d_key(d_key), d_value(d_value), D(D), Dv(Dv),
        factor(static_cast<float>(scale)) {}

  // Floats of the sums of n keys, and where those of the values begin.
  int64_t floats(int64_t n) const { return n * (ldk + ldv); }
  float* values(float* sums, int64_t n) const { return sums + n * ldk; }

  GradientRows keys_of(int64_t head) const { return {d_key, head * rows * D, D, ldk, factor}; }
  GradientRows values_of(int64_t head) const { return {d_value, head * rows * Dv, Dv, ldv, 1.0f}; }

  // Whether a head's sums may be made where its gradients lie: as float32, and few enough to stay in
  // the cache until they are scaled.
  bool in_place() const {
    constexpr int64_t CACHED = 1 << 17;
    return d_key.dtype == Dtype::float32 && ldk == D && ldv == Dv && floats(rows) <= CACHED;
  }
  float* key_sums(int64_t head) const { return static_cast<float*>(d_key.data) + head * rows * D; }
  float* value_sums(int64_t head) const {
    return static_cast<float*>(d_value.data) + head * rows * Dv;
  }
  void clear(int64_t head) const {
    std::fill_n(key_sums(head), rows * D, 0.0f), std::fill_n(value_sums(head), rows * Dv, 0.0f);
  }
  void scale(int64_t head, int64_t begin, int64_t end) const {
    float* sums = key_sums(head);
    for (int64_t i = begin * D; i < end * D; ++i) sums[i] *= factor;
  }

  // Writes the rows of a head: the sum of the parts, which have the sums of their keys.
  void store(int64_t head, const std::vector<Part>& parts) const {
    std::vector<Part> of_values(parts);
    for (Part& part : of_values) part.data += (part.end - part.begin) * ldk;
    write(keys_of(head), parts), write(values_of(head), of_values);
  }

 private:
  static int64_t padded(int64_t width) {
    const int64_t lanes = kernels().lanes;
    return (width + lanes - 1) / lanes * lanes;
  }
  void write(const GradientRows& g, const std::vector<Part>& parts) const {
    store_sum(g.to, g.offset, rows, g.width, g.ld, g.factor, parts);
  }

  View d_key, d_value;
  int64_t D, Dv;
  float factor;
};

}  // namespace memattn
