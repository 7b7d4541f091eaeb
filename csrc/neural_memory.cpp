// Neural memory on the CPU: arguments, threads, sums over rows. The arithmetic is in
// neural_memory_tile.h and neural_memory_backward_tile.h, the definition in
// memattn/reference/neural_memory.py.
//
// A thread owns a head of a row from its first chunk to its last, so results do not depend on
// threads. Saved are weights and momentum at every `group`-th chunk only.
#include <tuple>

#include "neural_memory.h"

namespace memattn {
namespace {

int64_t checkpoint_floats(const MemoryArgs& a) {
  return a.B * a.slots * a.H * a.weights_size() * (a.has_momentum ? 2 : 1);
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                           Tensor, Tensor>;

Results run_forward(const MemoryInputs& in) {
  MemoryCall call;
  make_memory_call(in, call);
  MemoryArgs& a = call.args;
  const auto wide = ScalarType::Float;
  const Tensor& like = in.query;
  const int64_t P = a.weights_size(), C = a.chunk - 1, Dv = a.width[a.depth];
  Tensor out = a.row_start ? zeros({a.B, a.H, a.T, Dv}, like, like.scalar_type())
                           : empty({a.B, a.H, a.T, Dv}, like, like.scalar_type());
  Tensor surprise = a.row_start ? zeros({a.B, a.H, a.T}, like, wide)
                                : empty({a.B, a.H, a.T}, like, wide);
  auto state = [&](std::initializer_list<int64_t> sizes, bool wanted, ScalarType dtype) {
    return in.return_state && wanted ? empty(sizes, like, dtype) : empty({0}, like, dtype);
  };
  Tensor weights = state({a.R, a.H, P}, true, wide);
  Tensor momentum = state({a.R, a.H, P}, a.has_momentum, wide);
  Tensor pending_h = state({a.R, a.H, C, a.inputs_width()}, true, wide);
  Tensor pending_delta = state({a.R, a.H, C, a.outputs_width()}, true, wide);
  Tensor pending_decay = state({a.R, a.H, C}, true, wide);
  Tensor pending_momentum = state({a.R, a.H, C}, true, wide);
  Tensor count = state({a.R}, true, ScalarType::Int);
  Tensor skipped = state({a.R}, true, ScalarType::Long);
  // rows that begin anywhere leave some of it alone
  Tensor checkpoints = a.row_start || a.count ? zeros({checkpoint_floats(a)}, like, wide)
                                              : empty({checkpoint_floats(a)}, like, wide);
  a.out = view_of(out), a.surprise = data_of(surprise), a.checkpoints = data_of(checkpoints);
  if (in.return_state) {
    a.end_weights = data_of(weights), a.end_momentum = data_of(momentum);
    a.end_h = data_of(pending_h), a.end_delta = data_of(pending_delta);
    a.end_decay = data_of(pending_decay), a.end_eta = data_of(pending_momentum);
    a.end_count = static_cast<int32_t*>(count.data_ptr());
  }
  std::vector<int64_t> skipped_of(a.R * a.H);
  a.skipped_of = skipped_of.data();
  each_head(a, kernels().memory.forward_scratch(a), kernels().memory.forward);
  for (int64_t row = 0; in.return_state && row < a.R; ++row) {
    int64_t all = skipped_before(in, row);
    for (int64_t h = 0; h < a.H; ++h) all += skipped_of[row * a.H + h];
    static_cast<int64_t*>(skipped.data_ptr())[row] = all;
  }
  return {out,           surprise,         weights, momentum, pending_h, pending_delta,
          pending_decay, pending_momentum, count,   skipped,  checkpoints};
}

struct Cotangents {
  OptionalTensor out, weights, momentum, h, delta, decay, eta;
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor, Tensor>;

Gradients run_backward(const MemoryInputs& in, const Cotangents& d, const Tensor& checkpoints) {
  MemoryCall call;
  make_memory_call(in, call);
  MemoryArgs& a = call.args;
  const auto wide = ScalarType::Float;
  const Tensor& like = in.query;
  const int64_t P = a.weights_size(), C = a.chunk - 1, D = a.width[0], Dv = a.width[a.depth];
  check_shape("checkpoints", checkpoints, {checkpoint_floats(a)});
  a.checkpoints = const_cast<float*>(floats_of("checkpoints", checkpoints, call));
  if (d.out) {
    check_shape("d_out", *d.out, {a.B, a.H, a.T, Dv});
    a.d_out = view_of(*d.out);
  }
  auto given = [&](const OptionalTensor& t) {
    return t && t->numel() ? floats_of("cotangents", t, call) : nullptr;
  };
  a.d_end_weights = given(d.weights);
  if (a.has_momentum) a.d_end_momentum = given(d.momentum);
  a.d_end_h = given(d.h), a.d_end_delta = given(d.delta), a.d_end_decay = given(d.decay);
  a.d_end_eta = given(d.eta);

  const bool fills = a.row_start != nullptr;
  auto made = [&](std::initializer_list<int64_t> sizes, bool wanted, bool zeroed,
                  ScalarType dtype) {
    if (!wanted) return empty({0}, like, dtype);
    return zeroed ? zeros(sizes, like, dtype) : empty(sizes, like, dtype);
  };
  const ScalarType own = like.scalar_type();
  Tensor d_query = made({a.B, a.H, a.T, D}, true, fills || !d.out, own);
  Tensor d_key = made({a.B, a.H, a.T, D}, true, fills, own);
  Tensor d_value = made({a.B, a.H, a.T, Dv}, true, fills, own);
  Tensor d_lr = made({a.B, a.H, a.T}, true, fills, wide);
  Tensor d_momentum = made({a.B, a.H, a.T}, a.has_momentum, fills, wide);
  Tensor d_decay = made({a.B, a.H, a.T}, in.decay.has_value(), fills, wide);
  Tensor d_weights = made({a.shares_weights ? 1 : a.R, a.H, P}, true, false, wide);
  Tensor d_start = made({a.R, a.H, P}, in.start_momentum.has_value(), !a.has_momentum, wide);
  const bool has_pending = a.count != nullptr;
  Tensor d_h = made({a.R, a.H, C, a.inputs_width()}, has_pending, true, wide);
  Tensor d_delta = made({a.R, a.H, C, a.outputs_width()}, has_pending, true, wide);
  Tensor d_pending_decay = made({a.R, a.H, C}, has_pending, true, wide);
  Tensor d_pending_eta = made({a.R, a.H, C}, has_pending, true, wide);
  const Buffer rows = a.shares_weights ? buffer(a.R * a.H * P) : nullptr;
  a.d_query = view_of(d_query), a.d_key = view_of(d_key), a.d_value = view_of(d_value);
  a.d_lr = view_of(d_lr), a.d_momentum = view_of(d_momentum), a.d_decay = view_of(d_decay);
  a.d_weights = rows ? rows.get() : data_of(d_weights);
  a.d_start_momentum = a.start_momentum ? data_of(d_start) : nullptr;
  a.d_pending_h = data_of(d_h), a.d_pending_delta = data_of(d_delta);
  a.d_pending_decay = data_of(d_pending_decay), a.d_pending_eta = data_of(d_pending_eta);
  each_head(a, kernels().memory.backward_scratch(a), kernels().memory.backward);
  if (rows) {
    const int64_t n = a.H * P;
    float* to = data_of(d_weights);
    if (a.R == 0) std::memset(to, 0, n * sizeof(float));
    torch::stable::parallel_for(0, n, 4096, [&](int64_t begin, int64_t end) {
      if (a.R > 0) std::copy(rows.get() + begin, rows.get() + end, to + begin);
      for (int64_t row = 1; row < a.R; ++row)
        for (int64_t i = begin; i < end; ++i) to[i] += rows.get()[row * n + i];
    });
  }
  return {d_query,   d_key, d_value, d_lr,    d_momentum,      d_decay,
          d_weights, d_start, d_h,   d_delta, d_pending_decay, d_pending_eta};
}

#define MEMATTN_PARAMETERS                                                                       \
  Tensor query, Tensor key, Tensor value, Tensor lr, OptionalTensor momentum,                    \
      OptionalTensor decay, Tensor start_weights, OptionalTensor start_momentum,                 \
      OptionalTensor pending_h, OptionalTensor pending_delta, OptionalTensor pending_decay,      \
      OptionalTensor pending_momentum, OptionalTensor count, OptionalTensor skipped,             \
      OptionalTensor row_start, OptionalTensor row_end, int64_t width_1, int64_t width_2,        \
      int64_t width_3, int64_t depth, int64_t chunk_size, bool read_chunk, bool is_silu,         \
      bool residual, bool is_huber, double huber_delta, std::optional<double> max_norm,          \
      bool clamp_soft, bool skip_nonfinite, bool return_state
#define MEMATTN_TAKEN                                                                            \
  {query, key, value, lr, momentum, decay, start_weights, start_momentum, pending_h,             \
   pending_delta, pending_decay, pending_momentum, count, skipped, row_start, row_end, width_1,  \
   width_2, width_3, depth, chunk_size, read_chunk, is_silu, residual, is_huber, huber_delta,    \
   max_norm, clamp_soft, skip_nonfinite, return_state}

Results forward(MEMATTN_PARAMETERS) { return run_forward(MEMATTN_TAKEN); }

Gradients backward(OptionalTensor d_out, OptionalTensor d_end_weights,
                   OptionalTensor d_end_momentum, OptionalTensor d_end_pending_h,
                   OptionalTensor d_end_pending_delta, OptionalTensor d_end_pending_decay,
                   OptionalTensor d_end_pending_momentum, Tensor checkpoints,
                   MEMATTN_PARAMETERS) {
  return run_backward(MEMATTN_TAKEN,
                      {d_out, d_end_weights, d_end_momentum, d_end_pending_h, d_end_pending_delta,
                       d_end_pending_decay, d_end_pending_momentum},
                      checkpoints);
}

}  // namespace
}  // namespace memattn

// the schemas are made from the signature in memattn_kernels/signatures.py
STABLE_TORCH_LIBRARY_IMPL(memattn_cpp, CPU, m) {
  m.impl("neural_memory", TORCH_BOX(&memattn::forward));
  m.impl("neural_memory_backward", TORCH_BOX(&memattn::backward));
}
