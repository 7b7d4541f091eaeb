// The Python module memattn._C, and the choice of instruction set at run time.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "kernels.h"

namespace memattn {

const Kernels& kernels() {
  static const Kernels& best = []() -> const Kernels& {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
      return avx512_kernels();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_kernels();
#endif
    return portable_kernels();
  }();
  return best;
}

std::string cpu_capability() { return kernels().name; }

}  // namespace memattn

STABLE_TORCH_LIBRARY_FRAGMENT(memattn_cpp, m) { m.def("cpu_capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(memattn_cpp, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&memattn::cpu_capability));
}

// Importing the module registers the operators; it has nothing else in it.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                                   nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
