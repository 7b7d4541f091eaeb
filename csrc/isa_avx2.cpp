// Tile kernels for AVX2 with FMA and F16C: eight-float vectors.
#if defined(__x86_64__)
#include "isa.h"

#define MEMATTN_VL 8
#define MEMATTN_REGISTERS 16
#define MEMATTN_FMA(a, b, c) (vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c))
#define MEMATTN_MAX(a, b) (vf)_mm256_max_ps((__m256)(a), (__m256)(b))
#define MEMATTN_FMA1(a, b, c) __builtin_fmaf(a, b, c)
#define MEMATTN_AT_LEAST(a, b) \
  (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)(a), (__m256)(b), _CMP_GE_OQ))
#define MEMATTN_F16C

MEMATTN_TARGET_BEGIN("avx2,fma,f16c")
namespace memattn::avx2 {
#include "float_kernels.h"
}  // namespace memattn::avx2

namespace memattn {
const Kernels& avx2_kernels() {
  static constexpr Kernels table = avx2::make_kernels("avx2");
  return table;
}
}  // namespace memattn

MEMATTN_TARGET_END
#endif
