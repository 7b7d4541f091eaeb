// A causal depthwise filter over tokens, SiLU, and unit vectors of the first features: what a neural
// memory does to its queries, keys and values. The arithmetic is in token_filter_tile.h.
#include "decoder_args.h"

namespace memattn {
namespace {

constexpr int64_t BLOCK = 64;  // tokens that are handed out together, however many threads there are

// inputs float32 [B, S, F], whose last T tokens are filtered by weight [size, F], that of the token
// itself first; positions int64 [T] of packed documents: tokens before position 0 are not seen
struct Filter {
  Tensor inputs, weight;
  OptionalTensor positions;
  int64_t B, S, F, T, size, first, unit, head_dim;

  Filter(Tensor x, Tensor w, OptionalTensor p, int64_t length, int64_t unit_features, int64_t D)
      : inputs(x), weight(w), positions(p) {
    STD_TORCH_CHECK(x.dim() == 3 && w.dim() == 2, "inputs must have 3 axes, weight 2");
    B = x.size(0), S = x.size(1), F = x.size(2), T = length, size = w.size(0), first = S - T;
    unit = unit_features, head_dim = D;
    check_plain("inputs", x, {B, S, F}), check_plain("weight", w, {size, F});
    STD_TORCH_CHECK(T >= 0 && size >= 1 && first >= size - 1,
                    "inputs must have ", size - 1, " tokens before those that are filtered");
    STD_TORCH_CHECK(unit >= 0 && unit <= F && D >= 1 && unit % D == 0,
                    "unit_features must be a multiple of head_dim, and at most the features");
    if (!p) return;
    check_shape("positions", *p, {T});
    STD_TORCH_CHECK(p->scalar_type() == ScalarType::Long && p->is_contiguous(),
                    "positions must be contiguous int64");
  }

  // tokens that the filter at t sees
  int64_t taps(int64_t t) const {
    if (!positions) return size;
    const int64_t position = static_cast<const int64_t*>(positions->data_ptr())[t];
    return std::min(size, std::max<int64_t>(position, 0) + 1);
  }

  FilteredToken token(int64_t b, int64_t t) const {
    return {F, taps(t), floats(inputs) + (b * S + first + t) * F, floats(weight), unit, head_dim};
  }

  int64_t blocks() const { return (T + BLOCK - 1) / BLOCK; }
};

Tensor forward(Tensor inputs, Tensor weight, OptionalTensor positions, int64_t length,
               int64_t unit_features, int64_t head_dim) {
  const Filter filter(inputs, weight, positions, length, unit_features, head_dim);
  Tensor out = empty({filter.B, filter.T, filter.F}, inputs, ScalarType::Float);
  torch::stable::parallel_for(0, filter.B * filter.blocks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / filter.blocks(), from = i % filter.blocks() * BLOCK;
      for (int64_t t = from; t < std::min(from + BLOCK, filter.T); ++t)
        kernels().filter.forward(filter.token(b, t), floats(out) + (b * filter.T + t) * filter.F);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(Tensor given, Tensor inputs, Tensor weight,
                                    OptionalTensor positions, int64_t length, int64_t unit_features,
                                    int64_t head_dim) {
  const Filter filter(inputs, weight, positions, length, unit_features, head_dim);
  const int64_t B = filter.B, S = filter.S, F = filter.F, T = filter.T, size = filter.size;
  const Tensor d_out = torch::stable::contiguous(given);
  check_plain("d_out", d_out, {B, T, F});
  Tensor d_inputs = empty({B, S, F}, inputs, ScalarType::Float);
  Tensor d_weight = empty({size, F}, inputs, ScalarType::Float);
  const int64_t blocks = B * filter.blocks();
  const Buffer d_filtered = buffer(B * T * F), sums = buffer(blocks * size * F);
  std::fill(sums.get(), sums.get() + blocks * size * F, 0.0f);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const Buffer work = buffer(F);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / filter.blocks(), from = i % filter.blocks() * BLOCK;
      for (int64_t t = from; t < std::min(from + BLOCK, T); ++t) {
        const int64_t at = (b * T + t) * F;
        kernels().filter.backward(filter.token(b, t), floats(d_out) + at, work.get(),
                                  d_filtered.get() + at, sums.get() + i * size * F);
      }
    }
  });
  const int64_t pieces = (S + BLOCK - 1) / BLOCK;
  torch::stable::parallel_for(0, B * pieces, 1, [&](int64_t begin, int64_t end) {
    std::vector<const float*> behind(size);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / pieces, from = i % pieces * BLOCK;
      for (int64_t s = from; s < std::min(from + BLOCK, S); ++s) {
        for (int64_t k = 0; k < size; ++k) {
          const int64_t t = s - filter.first + k;
          const bool seen = t >= 0 && t < T && k < filter.taps(t);
          behind[k] = seen ? d_filtered.get() + (b * T + t) * F : nullptr;
        }
        kernels().filter.inputs(F, size, behind.data(), floats(weight),
                                floats(d_inputs) + (b * S + s) * F);
      }
    }
  });
  std::fill(floats(d_weight), floats(d_weight) + size * F, 0.0f);
  for (int64_t i = 0; i < blocks; ++i)
    for (int64_t f = 0; f < size * F; ++f) floats(d_weight)[f] += sums.get()[i * size * F + f];
  return {d_inputs, d_weight};
}

}  // namespace
}  // namespace memattn

// the schemas are made from the signature in memattn/cpp/token_filter.py
STABLE_TORCH_LIBRARY_IMPL(memattn_cpp, CPU, m) {
  m.impl("token_filter", TORCH_BOX(&memattn::forward));
  m.impl("token_filter_backward", TORCH_BOX(&memattn::backward));
}
