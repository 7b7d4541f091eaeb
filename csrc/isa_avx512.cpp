// Tile kernels for AVX-512: sixteen-float vectors.
#if defined(__x86_64__)
#include "isa.h"
#include "isa_avx512.h"

MEMATTN_TARGET_BEGIN("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,f16c")
namespace memattn::avx512 {
#include "float_kernels.h"
}  // namespace memattn::avx512

namespace memattn {
const Kernels& avx512_kernels() {
  static constexpr Kernels table = avx512::make_kernels("avx512");
  return table;
}
}  // namespace memattn

MEMATTN_TARGET_END
#endif
