// One token of a neural memory on the CPU; the arithmetic is in neural_memory_step_tile.h.
//
// The factors of the token are written where the caller keeps those of the open chunk.
#include <tuple>

#include "neural_memory.h"

namespace memattn {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results run_step(const MemoryInputs& in, bool fold) {
  MemoryCall call;
  make_memory_call(in, call);
  MemoryArgs& a = call.args;
  STD_TORCH_CHECK(a.T == 1 && a.R == a.B, "a step takes one token of each sequence");
  STD_TORCH_CHECK(a.count && !a.shares_weights, "a step needs a state");
  for (int64_t row = 0; row < a.R && !fold; ++row)
    STD_TORCH_CHECK(a.count[row] + 1 < a.chunk, "fold must be True where a chunk ends");
  auto in_place = [](const char* name, const OptionalTensor& t, const float* kept) {
    STD_TORCH_CHECK(t->data_ptr() == kept, name, " must be contiguous");
    return const_cast<float*>(kept);
  };
  a.end_h = in_place("pending_h", in.pending_h, a.pending_h);
  a.end_delta = in_place("pending_delta", in.pending_delta, a.pending_delta);
  a.end_decay = in_place("pending_decay", in.pending_decay, a.pending_decay);
  a.end_eta = in_place("pending_momentum", in.pending_momentum, a.pending_eta);

  const auto wide = ScalarType::Float;
  const Tensor& like = in.query;
  const int64_t P = a.weights_size();
  Tensor out = empty({a.B, a.H, 1, a.width[a.depth]}, like, like.scalar_type());
  Tensor surprise = empty({a.B, a.H, 1}, like, wide);
  Tensor weights = fold ? empty({a.R, a.H, P}, like, wide) : empty({0}, like, wide);
  Tensor momentum =
      fold && a.has_momentum ? empty({a.R, a.H, P}, like, wide) : empty({0}, like, wide);
  Tensor count = empty({a.R}, like, ScalarType::Int);
  Tensor skipped = empty({a.R}, like, ScalarType::Long);
  a.out = view_of(out), a.surprise = data_of(surprise);
  if (fold) a.end_weights = data_of(weights), a.end_momentum = data_of(momentum);
  std::vector<int64_t> skipped_of(a.R * a.H);
  a.skipped_of = skipped_of.data();
  each_head(a, kernels().memory.step_scratch(a), kernels().memory.step);
  for (int64_t row = 0; row < a.R; ++row) {
    static_cast<int32_t*>(count.data_ptr())[row] =
        static_cast<int32_t>((a.count[row] + 1) % a.chunk);
    static_cast<int64_t*>(skipped.data_ptr())[row] = skipped_before(in, row);
    for (int64_t h = 0; h < a.H; ++h)
      static_cast<int64_t*>(skipped.data_ptr())[row] += skipped_of[row * a.H + h];
  }
  return {out, surprise, weights, momentum, count, skipped};
}

Results step(Tensor query, Tensor key, Tensor value, Tensor lr, OptionalTensor momentum,
             OptionalTensor decay, Tensor start_weights, OptionalTensor start_momentum,
             Tensor pending_h, Tensor pending_delta, Tensor pending_decay, Tensor pending_momentum,
             Tensor count, Tensor skipped, int64_t width_1, int64_t width_2, int64_t width_3,
             int64_t depth, int64_t chunk_size, bool read_chunk, bool is_silu, bool residual,
             bool is_huber, double huber_delta, std::optional<double> max_norm, bool clamp_soft,
             bool skip_nonfinite, bool fold) {
  return run_step({query,         key,           value,       lr,         momentum,
                   decay,         start_weights, start_momentum, pending_h, pending_delta,
                   pending_decay, pending_momentum, count,    skipped,    std::nullopt,
                   std::nullopt,  width_1,       width_2,     width_3,    depth,
                   chunk_size,    read_chunk,    is_silu,     residual,   is_huber,
                   huber_delta,   max_norm,      clamp_soft,  skip_nonfinite, fold},
                  fold);
}

}  // namespace
}  // namespace memattn

// the schema is made from the signature in memattn_kernels/signatures.py
STABLE_TORCH_LIBRARY_IMPL(memattn_cpp, CPU, m) {
  m.impl("neural_memory_step", TORCH_BOX(&memattn::step));
}
