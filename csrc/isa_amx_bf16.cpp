// Tile kernels for AVX-512 with products of bfloat16 in tiles. What is not in bfloat16, or has no product
// of its own here, runs the kernels of AVX-512.
#include "isa_amx.h"
#if defined(MEMATTN_HAS_AMX)
#include "isa.h"
#include "isa_avx512.h"

#include <initializer_list>

#define MEMATTN_AMX
#define MEMATTN_OTHER_KERNELS avx512_kernels()

MEMATTN_TARGET_BEGIN("amx-tile,amx-bf16,avx512bf16,avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,f16c")
namespace memattn::amx_bf16 {
#include "pair_kernels.h"
}  // namespace memattn::amx_bf16

namespace memattn {
const Kernels& amx_bf16_kernels() {
  static const Kernels table = amx_bf16::make_kernels("amx_bf16");
  return table;
}
}  // namespace memattn

MEMATTN_TARGET_END
#endif
