// The Python module memattn._C, and the choice of instruction set at run time.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <string>
#include <vector>

#include "kernels.h"

namespace memattn {

namespace {

struct Choice {
  const char* name;
  const Kernels& (*table)();
  bool runs_here;
  bool is_fast = true;  // at least as fast as the next one that runs here
};

#if defined(MEMATTN_HAS_AMX)
// Whether the processor has tiles of bfloat16 and the system lets this process use them.
bool has_amx() {
  constexpr unsigned BF16 = 1u << 22, TILES = 1u << 24;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (BF16 | TILES)) != (BF16 | TILES)) return false;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif

// Fastest first.
const std::vector<Choice>& choices() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  static const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  // Intel's add half as many products a cycle in pairs as in floats, AMD's twice as many
  static const bool has_fast_pairs = !__builtin_cpu_is("intel");
  static const std::vector<Choice> all{
#if defined(MEMATTN_HAS_AMX)
                                       {"amx_bf16", amx_bf16_kernels, avx512_bf16 && has_amx()},
#endif
                                       {"avx512_bf16", avx512_bf16_kernels, avx512_bf16, has_fast_pairs},
                                       {"avx512", avx512_kernels, avx512},
                                       {"avx2", avx2_kernels, avx2},
                                       {"portable", portable_kernels, true}};
#else
  static const std::vector<Choice> all{{"portable", portable_kernels, true}};
#endif
  return all;
}

const Kernels* fastest() {
  for (const Choice& choice : choices())
    if (choice.runs_here && choice.is_fast) return &choice.table();
  return &portable_kernels();
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{fastest()};
  return table;
}

std::string cpu_capability() { return kernels().name; }

void set_cpu_capability(std::string name) {
  for (const Choice& choice : choices())
    if (choice.runs_here && name == choice.name) {
      current() = &choice.table();
      return;
    }
  STD_TORCH_CHECK(false, "name must be an instruction set that this processor runs, got ", name);
}

}  // namespace

const Kernels& kernels() { return *current(); }

}  // namespace memattn

// set_cpu_capability is for tests: it runs the kernels of a narrower instruction set.
STABLE_TORCH_LIBRARY_FRAGMENT(memattn_cpp, m) {
  m.def("cpu_capability() -> str");
  m.def("set_cpu_capability(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(memattn_cpp, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&memattn::cpu_capability));
  m.impl("set_cpu_capability", TORCH_BOX(&memattn::set_cpu_capability));
}

// Importing the module registers the operators; it has nothing else in it.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                                   nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
