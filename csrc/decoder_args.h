// What the operators of a decoder layer on the CPU share: checks of weights, and blocks of work.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "tensors.h"

namespace memattn {

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

inline void check_plain(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  check_shape(name, t, sizes);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), name,
                  " must be a contiguous float32 tensor");
}

inline float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// Keys or values of a cache, float32 [B, Hkv, S, D], with features one behind the other.
inline void check_kept(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  check_shape(name, t, sizes);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && (t.size(3) <= 1 || t.stride(3) == 1), name,
                  " must be float32 with features one behind the other");
}

// Places of tokens int64 [B or 1, T], those of padding negative.
struct Places {
  const int64_t* data;
  int64_t stride[2];

  Places(const Tensor& positions, int64_t B, int64_t T) {
    STD_TORCH_CHECK(positions.dim() == 2 && positions.size(1) == T &&
                        (positions.size(0) == B || positions.size(0) == 1) &&
                        positions.scalar_type() == ScalarType::Long,
                    "positions must be int64 [B or 1, T=", T, "]");
    data = static_cast<const int64_t*>(positions.data_ptr());
    stride[0] = positions.size(0) == 1 ? 0 : positions.stride(0), stride[1] = positions.stride(1);
  }

  int64_t of(int64_t b, int64_t t) const {
    return std::max<int64_t>(data[b * stride[0] + t * stride[1]], 0);
  }
};

}  // namespace memattn
