// Tile kernels for AVX-512 with dot products of bfloat16. What is not in bfloat16, or has no product
// of its own here, runs the kernels of AVX-512.
#if defined(__x86_64__)
#include "isa.h"
#include "isa_avx512.h"

#include <initializer_list>

#define MEMATTN_OTHER_KERNELS avx512_kernels()

MEMATTN_TARGET_BEGIN("avx512bf16,avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,f16c")
namespace memattn::avx512_bf16 {
#include "pair_kernels.h"
}  // namespace memattn::avx512_bf16

namespace memattn {
const Kernels& avx512_bf16_kernels() {
  static const Kernels table = avx512_bf16::make_kernels("avx512_bf16");
  return table;
}
}  // namespace memattn

MEMATTN_TARGET_END
#endif
