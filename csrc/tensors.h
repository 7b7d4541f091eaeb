// Tensors, buffers and threads through LibTorch's stable ABI, for the operators' host code.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace memattn {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalInt = std::optional<int64_t>;
using torch::headeronly::ScalarType;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default: STD_TORCH_CHECK(false, "memattn_cpp takes float32, float16 and bfloat16 tensors");
  }
  return Dtype::float32;
}

inline View view_of(const Tensor& t) {
  View view;
  view.data = t.data_ptr();
  view.dtype = dtype_of(t);
  for (int64_t i = 0; i < t.dim(); ++i) view.stride[i] = t.stride(i);
  return view;
}

// The values of an int32 vector.
inline std::vector<int64_t> int_values(const Tensor& t) {
  const auto* p = static_cast<const int32_t*>(t.data_ptr());
  std::vector<int64_t> values(t.numel());
  for (int64_t i = 0; i < t.numel(); ++i) values[i] = p[i * t.stride(0)];
  return values;
}

// Raw callers of an operator must not read outside a tensor either.
inline void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  const int64_t dim = t.dim();
  bool same = dim == static_cast<int64_t>(sizes.size());
  for (int64_t i = 0; same && i < dim; ++i) same = t.size(i) == sizes.begin()[i];
  if (same) return;  // texts cost as much as all other checks of a short call
  std::string wanted, got;
  for (int64_t size : sizes) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  for (int64_t i = 0; i < dim; ++i) got += (i ? ", " : "") + std::to_string(t.size(i));
  STD_TORCH_CHECK(false, name, " must have shape [", wanted, "], got [", got, "]");
}

inline void check_bounds(const char* name, const OptionalTensor& bounds, int64_t n) {
  if (!bounds) return;
  check_shape(name, *bounds, {n});
  STD_TORCH_CHECK(bounds->scalar_type() == ScalarType::Int, name, " must have dtype int32");
}

// Asks for huge pages where a large block is still to be written: the system hands large blocks out
// anew at each call, and page faults by 4 KiB cost a fifth of a windowed forward. Where a virtual
// machine gives idle memory back to its host, the first call after a pause pays for it.
inline void want_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t HUGE_PAGE = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
  const uintptr_t first = (begin + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1), last = end & ~(HUGE_PAGE - 1);
  // a hint: where the system knows no huge pages, nothing changes
  if (bytes >= 2 * HUGE_PAGE) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

inline int32_t number_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Int: return aoti_torch_dtype_int32();
    case ScalarType::Long: return aoti_torch_dtype_int64();
    case ScalarType::Char: return aoti_torch_dtype_int8();
    case ScalarType::Byte: return aoti_torch_dtype_uint8();
    default: STD_TORCH_CHECK(false, "memattn_cpp makes no tensors of this dtype");
  }
  return 0;
}

// On the CPU, in half the time of new_empty, which a call of some microseconds notices.
inline Tensor empty(std::initializer_list<int64_t> sizes, const Tensor&, ScalarType dtype) {
  int64_t strides[8], step = 1;
  const auto dim = static_cast<int64_t>(sizes.size());
  for (int64_t i = dim - 1; i >= 0; step *= std::max<int64_t>(sizes.begin()[i], 1), --i)
    strides[i] = step;
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes.begin(), strides, number_of(dtype), aoti_torch_device_type_cpu(), 0, &made));
  Tensor t(made);
  want_huge_pages(t.data_ptr(), t.numel() * t.element_size());
  return t;
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

inline Buffer buffer(int64_t floats) {
  const size_t bytes = (static_cast<size_t>(floats) * 4 + 127) / 64 * 64;
  auto* p = static_cast<float*>(std::aligned_alloc(64, bytes));
  STD_TORCH_CHECK(p != nullptr, "memattn_cpp could not allocate ", bytes, " bytes");
  want_huge_pages(p, bytes);
  return Buffer(p);
}

// Tiles of queries [t_begin, t_end) of key head (b, hkv). Short sequences share a tile among the
// query heads of the group, where these see the same keys.
template <class Args>
std::vector<Tile> make_tiles(const Args& a, int64_t b, int64_t hkv, int64_t t_begin, int64_t t_end,
                             bool heads_are_alike = true) {
  const int64_t G = a.H / a.Hkv, rows = kernels().tile_rows;
  const int64_t fit = heads_are_alike ? rows / std::max<int64_t>(a.T, 1) : 1;
  const int64_t heads = std::clamp<int64_t>(fit, 1, G);
  std::vector<Tile> tiles;
  for (int64_t t = t_begin; t < t_end; t += rows)
    for (int64_t g = 0; g < G; g += heads)
      tiles.push_back({b, hkv, hkv * G + g, hkv * G + std::min(g + heads, G), t,
                       std::min(t + rows, t_end)});
  return tiles;
}

// The two parts of a contiguous [2, B, H, T], for a.lse2_high and a.lse2_low.
inline void take_pair(const Tensor& pair, float*& high, float*& low) {
  high = static_cast<float*>(pair.data_ptr()), low = high + pair.numel() / 2;
}

// Runs work(i, thread's state) for i in [0, n), handed out one by one: tiles differ in cost.
template <class State, class Work>
void parallel_work(int64_t n, State make_state, Work work) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), n);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      auto state = make_state();
      for (int64_t i; (i = next.fetch_add(1)) < n;) work(i, state);
    }
  });
}

}  // namespace memattn
