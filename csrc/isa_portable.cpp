// Tile kernels for any processor: four-float vectors, lowered by the compiler.
#include "isa.h"

#define MEMATTN_VL 4
#define MEMATTN_REGISTERS 16
#define MEMATTN_FMA(a, b, c) ((a) * (b) + (c))
#define MEMATTN_MAX(a, b) ((a) > (b) ? (a) : (b))
#define MEMATTN_FMA1(a, b, c) ((a) * (b) + (c))

namespace memattn::portable {
#include "float_kernels.h"
}  // namespace memattn::portable

namespace memattn {
const Kernels& portable_kernels() {
  static constexpr Kernels table = portable::make_kernels("portable");
  return table;
}
}  // namespace memattn
