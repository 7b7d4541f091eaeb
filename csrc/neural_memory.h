// Arguments of the operators of neural memory, checked, for the kernels.
#pragma once

#include <cstring>

#include "tensors.h"

namespace memattn {

// The arguments of an operator, in their order.
struct MemoryInputs {
  Tensor query, key, value, lr;
  OptionalTensor momentum, decay;
  Tensor start_weights;
  OptionalTensor start_momentum, pending_h, pending_delta, pending_decay, pending_momentum;
  OptionalTensor count, skipped, row_start, row_end;
  int64_t width_1, width_2, width_3, depth, chunk_size;
  bool read_chunk, is_silu, residual, is_huber;
  double huber_delta;
  std::optional<double> max_norm;
  bool clamp_soft, skip_nonfinite, return_state;
};

struct MemoryCall {
  MemoryArgs args;
  std::vector<Tensor> kept;  // what was made contiguous
};

inline bool is_contiguous(const Tensor& t) {
  int64_t step = 1;
  for (int64_t i = t.dim() - 1; i >= 0; step *= t.size(i), --i)
    if (t.size(i) != 1 && t.stride(i) != step) return t.numel() == 0;
  return true;
}

// The data of a tensor in rows: in place where it lies so, since a call for a copy costs time.
inline void* rows_of(const Tensor& t, MemoryCall& call) {
  if (is_contiguous(t)) return t.data_ptr();
  call.kept.push_back(torch::stable::contiguous(t));
  return call.kept.back().data_ptr();
}

inline const float* floats_of(const char* name, const Tensor& t, MemoryCall& call) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must have dtype float32");
  return static_cast<const float*>(rows_of(t, call));
}

inline const float* floats_of(const char* name, const OptionalTensor& t, MemoryCall& call) {
  return t ? floats_of(name, *t, call) : nullptr;
}

inline const int32_t* ints_of(const char* name, const OptionalTensor& t, int64_t n,
                              MemoryCall& call) {
  check_bounds(name, t, n);
  return t ? static_cast<const int32_t*>(rows_of(*t, call)) : nullptr;
}

inline void make_memory_call(const MemoryInputs& in, MemoryCall& call) {
  MemoryArgs& a = call.args;
  a = MemoryArgs{};
  STD_TORCH_CHECK(in.query.dim() == 4 && in.value.dim() == 4, "query and value must have 4 axes");
  STD_TORCH_CHECK(in.depth >= 1 && in.depth <= MEMORY_DEPTH, "depth must be from 1 to 4");
  STD_TORCH_CHECK(in.chunk_size >= 1, "chunk_size must be at least 1");
  a.B = in.query.size(0), a.H = in.query.size(1), a.T = in.query.size(2), a.depth = in.depth;
  const int64_t hidden[] = {in.width_1, in.width_2, in.width_3};
  a.width[0] = in.query.size(3);
  for (int64_t l = 1; l < a.depth; ++l) a.width[l] = hidden[l - 1];
  a.width[a.depth] = in.value.size(3);
  for (int64_t l = 0; l <= a.depth; ++l)
    STD_TORCH_CHECK(a.width[l] >= 1, "widths must be at least 1");
  a.chunk = in.chunk_size, a.reads_chunk = in.read_chunk, a.is_silu = in.is_silu;
  a.residual = in.residual, a.is_huber = in.is_huber, a.is_soft = in.clamp_soft;
  STD_TORCH_CHECK(!a.residual || a.width[0] == a.width[a.depth],
                  "residual needs values as wide as keys");
  a.skips_nonfinite = in.skip_nonfinite, a.has_momentum = in.momentum.has_value();
  a.huber_delta = static_cast<float>(in.huber_delta), a.max_norm = in.max_norm.value_or(0.0);
  check_shape("key", in.key, {a.B, a.H, a.T, a.width[0]});
  check_shape("value", in.value, {a.B, a.H, a.T, a.width[a.depth]});
  a.query = view_of(in.query), a.key = view_of(in.key), a.value = view_of(in.value);
  auto scalars = [&](const char* name, const Tensor& t) {
    check_shape(name, t, {a.B, a.H, a.T});
    return view_of(t);
  };
  a.lr = scalars("lr", in.lr);
  if (in.momentum) a.momentum = scalars("momentum", *in.momentum);
  if (in.decay) a.decay = scalars("decay", *in.decay);

  const int64_t P = a.weights_size(), C = a.chunk - 1;
  a.R = in.row_start      ? in.row_start->size(0)
        : in.count        ? in.count->size(0)
                          : a.B;
  STD_TORCH_CHECK(a.R == a.B || a.B == 1, "rows must be the batch or documents of one sequence");
  STD_TORCH_CHECK(in.row_start.has_value() == in.row_end.has_value(),
                  "row_start and row_end must be given together");
  a.row_start = ints_of("row_start", in.row_start, a.R, call);
  a.row_end = ints_of("row_end", in.row_end, a.R, call);
  for (int64_t row = 0; a.row_start && row < a.R; ++row)
    STD_TORCH_CHECK(a.row_start[row] >= 0 && a.row_end[row] <= a.T,
                    "row_start and row_end must lie in the sequence");
  a.shares_weights = a.R != 1 && in.start_weights.size(0) == 1;
  check_shape("start_weights", in.start_weights, {a.shares_weights ? 1 : a.R, a.H, P});
  a.start_weights = floats_of("start_weights", in.start_weights, call);
  if (in.start_momentum && a.has_momentum) {
    check_shape("start_momentum", *in.start_momentum, {a.R, a.H, P});
    a.start_momentum = floats_of("start_momentum", in.start_momentum, call);
  }
  a.count = ints_of("count", in.count, a.R, call);
  if (a.count) {
    STD_TORCH_CHECK(in.pending_h && in.pending_delta && in.pending_decay && in.pending_momentum,
                    "count and the pending factors must be given together");
    for (int64_t row = 0; row < a.R; ++row)
      STD_TORCH_CHECK(a.count[row] >= 0 && a.count[row] <= C, "count must be below chunk_size");
    check_shape("pending_h", *in.pending_h, {a.R, a.H, C, a.inputs_width()});
    check_shape("pending_delta", *in.pending_delta, {a.R, a.H, C, a.outputs_width()});
    check_shape("pending_decay", *in.pending_decay, {a.R, a.H, C});
    check_shape("pending_momentum", *in.pending_momentum, {a.R, a.H, C});
    a.pending_h = floats_of("pending_h", in.pending_h, call);
    a.pending_delta = floats_of("pending_delta", in.pending_delta, call);
    a.pending_decay = floats_of("pending_decay", in.pending_decay, call);
    a.pending_eta = floats_of("pending_momentum", in.pending_momentum, call);
  }
  // what is saved is at most as much as the keys, values and queries
  const int64_t inputs = a.chunk * (2 * a.width[0] + a.width[a.depth]);
  a.group = (2 * P + inputs - 1) / inputs;
  a.slots = a.T > 0 ? (a.T - 1) / (a.group * a.chunk) + (a.count ? 1 : 0) : 0;
}

inline float* data_of(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

inline Tensor zeros(std::initializer_list<int64_t> sizes, const Tensor& like, ScalarType dtype) {
  Tensor t = empty(sizes, like, dtype);
  if (t.numel()) std::memset(t.data_ptr(), 0, t.numel() * t.element_size());
  return t;
}

// What the state at the start has skipped.
inline int64_t skipped_before(const MemoryInputs& in, int64_t row) {
  if (!in.skipped) return 0;
  return static_cast<const int64_t*>(in.skipped->data_ptr())[row * in.skipped->stride(0)];
}

// One thread for each head of a row at a time.
template <class Work>
void each_head(const MemoryArgs& a, int64_t scratch, Work work) {
  parallel_work(
      a.R * a.H, [&] { return buffer(scratch); },
      [&](int64_t i, const Buffer& own) { work(a, i / a.H, i % a.H, own.get()); });
}

}  // namespace memattn
