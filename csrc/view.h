// A tensor as kernels see it, and its numbers.
#pragma once

#include <cstdint>

namespace memattn {

enum class Dtype : int { float32, float16, bfloat16 };

// A number rounded to bfloat16, ties to even; without a branch, so that loops over it are vectors.
inline __attribute__((always_inline)) uint16_t bfloat16_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A tensor of up to five axes; strides count elements.
struct View {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t stride[5] = {0, 0, 0, 0, 0};
};

}  // namespace memattn
