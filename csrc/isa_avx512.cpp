// Tile kernels for AVX-512: sixteen-float vectors.
#if defined(__x86_64__)
#include <cstdint>
#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "kernels.h"

#define MEMATTN_VL 16
#define MEMATTN_REGISTERS 32
#define MEMATTN_FMA(a, b, c) (vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c))
#define MEMATTN_FMA1(a, b, c) __builtin_fmaf(a, b, c)
#define MEMATTN_F16C

// after the headers, so that no function shared with other files gets these instructions
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,f16c")
#endif

namespace memattn::avx512 {
#include "tile_engine.h"
#include "attention_tile.h"
#include "segmented_attention_tile.h"
}  // namespace memattn::avx512

namespace memattn {
const Kernels& avx512_kernels() {
  static constexpr Kernels table = avx512::make_kernels("avx512");
  return table;
}
}  // namespace memattn

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
