// Rows of a decoder's hidden states between its matrix products, for training on the CPU: each
// operator passes over memory once. Their gradients, and the layers made of them, are in
// memattn/cpp/training_layers.py; the arithmetic is in training_rows_tile.h.
#include "decoder_args.h"

namespace memattn {
namespace {

constexpr int64_t BLOCK = 64;  // rows that are handed out together, however many threads there are

// work(block, first row, row behind the last) for all blocks of rows
template <class Work>
void for_blocks(int64_t rows, Work work) {
  const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i, i * BLOCK, std::min((i + 1) * BLOCK, rows));
  });
}

std::tuple<Tensor, Tensor> norm_rows(Tensor x, Tensor weight, double eps) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 axes");
  const int64_t N = x.size(0), E = x.size(1);
  check_plain("x", x, {N, E}), check_plain("weight", weight, {E});
  Tensor out = empty({N, E}, x, ScalarType::Float), scale = empty({N}, x, ScalarType::Float);
  for_blocks(N, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      floats(scale)[n] = kernels().training.norm(E, floats(x) + n * E, floats(weight),
                                             static_cast<float>(eps), floats(out) + n * E);
  });
  return {out, scale};
}

Tensor norm_rows_again(Tensor x, Tensor weight, Tensor scale) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 axes");
  const int64_t N = x.size(0), E = x.size(1);
  check_plain("x", x, {N, E}), check_plain("weight", weight, {E}), check_plain("scale", scale, {N});
  Tensor out = empty({N, E}, x, ScalarType::Float);
  for_blocks(N, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      kernels().training.norm_again(E, floats(x) + n * E, floats(weight), floats(scale)[n],
                                floats(out) + n * E);
  });
  return out;
}

std::tuple<Tensor, Tensor> norm_rows_backward(Tensor d_out, Tensor x, Tensor weight, Tensor scale,
                                              OptionalTensor residual) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 axes");
  const int64_t N = x.size(0), E = x.size(1), blocks = (N + BLOCK - 1) / BLOCK;
  check_plain("d_out", d_out, {N, E}), check_plain("x", x, {N, E}), check_plain("weight", weight, {E});
  check_plain("scale", scale, {N});
  if (residual) check_plain("residual", *residual, {N, E});
  Tensor d_x = empty({N, E}, x, ScalarType::Float), d_weight = empty({E}, x, ScalarType::Float);
  Buffer sums = buffer(blocks * E);
  std::fill(sums.get(), sums.get() + blocks * E, 0.0f);
  for_blocks(N, [&](int64_t block, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      kernels().training.norm_backward(E, floats(d_out) + n * E, floats(x) + n * E, floats(weight),
                                   floats(scale)[n], residual ? floats(*residual) + n * E : nullptr,
                                   floats(d_x) + n * E, sums.get() + block * E);
  });
  std::fill(floats(d_weight), floats(d_weight) + E, 0.0f);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t e = 0; e < E; ++e) floats(d_weight)[e] += sums.get()[block * E + e];
  return {d_x, d_weight};
}

// cos and sin [B or 1, 1, T, D / 2], for rows of [B, H, T, D]
struct Angles {
  const float *cos = nullptr, *sin = nullptr;
  int64_t batch = 0, half = 0;

  Angles(const OptionalTensor& c, const OptionalTensor& s, int64_t B, int64_t T, int64_t D) {
    STD_TORCH_CHECK(c.has_value() == s.has_value(), "cos and sin are given together");
    if (!c) return;
    STD_TORCH_CHECK(c->dim() == 4 && D % 2 == 0, "cos must have 4 axes, heads an even number of features");
    const int64_t rows = c->size(0);
    STD_TORCH_CHECK(rows == 1 || rows == B, "cos must have the batch of the heads, or 1");
    check_plain("cos", *c, {rows, 1, T, D / 2}), check_plain("sin", *s, {rows, 1, T, D / 2});
    cos = floats(*c), sin = floats(*s), half = D / 2;
    batch = rows == 1 ? 0 : T * half;
  }
};

// Turns heads [B, H, T, D], with any strides but that of a feature, in place.
void rotate_heads(Tensor heads, Tensor cos, Tensor sin) {
  STD_TORCH_CHECK(heads.dim() == 4 && heads.stride(3) == 1 && heads.scalar_type() == ScalarType::Float,
                  "heads must be float32 [B, H, T, D] with features one behind the other");
  const int64_t B = heads.size(0), H = heads.size(1), T = heads.size(2), D = heads.size(3);
  const Angles angles(cos, sin, B, T, D);
  for_blocks(B * T, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / T, t = n % T, at = b * angles.batch + t * angles.half;
      for (int64_t h = 0; h < H; ++h) {
        float* x = floats(heads) + b * heads.stride(0) + h * heads.stride(1) + t * heads.stride(2);
        kernels().training.rotate(D, x, angles.cos + at, angles.sin + at, 1.0f, x);
      }
    }
  });
}

// Heads of gradients [B, H, T, D] side by side, [B T, all heads D]; all but the last turned back.
Tensor join_heads(Tensor d_query, Tensor d_key, Tensor d_value, OptionalTensor cos,
                  OptionalTensor sin) {
  const Tensor* all[] = {&d_query, &d_key, &d_value};
  STD_TORCH_CHECK(d_query.dim() == 4, "d_query must have 4 axes");
  const int64_t B = d_query.size(0), T = d_query.size(2), D = d_query.size(3);
  int64_t wide = 0;
  for (const Tensor* t : all) {
    STD_TORCH_CHECK(t->dim() == 4 && t->size(0) == B && t->size(2) == T && t->size(3) == D &&
                        t->stride(3) == 1 && t->scalar_type() == ScalarType::Float,
                    "gradients must be float32 [B, heads, T, D] with features one behind the other");
    wide += t->size(1) * D;
  }
  const Angles angles(cos, sin, B, T, D);
  Tensor out = empty({B * T, wide}, d_query, ScalarType::Float);
  for_blocks(B * T, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / T, t = n % T, at = b * angles.batch + t * angles.half;
      float* to = floats(out) + n * wide;
      for (const Tensor* from : all)
        for (int64_t h = 0; h < from->size(1); ++h, to += D) {
          const float* x =
              floats(*from) + b * from->stride(0) + h * from->stride(1) + t * from->stride(2);
          if (angles.cos && from != all[2])
            kernels().training.rotate(D, x, angles.cos + at, angles.sin + at, -1.0f, to);
          else
            std::copy(x, x + D, to);
        }
    }
  });
  return out;
}

Tensor gate_rows(Tensor gate, Tensor up) {
  STD_TORCH_CHECK(gate.dim() == 2, "gate must have 2 axes");
  const int64_t N = gate.size(0), F = gate.size(1);
  check_plain("gate", gate, {N, F}), check_plain("up", up, {N, F});
  Tensor out = empty({N, F}, gate, ScalarType::Float);
  for_blocks(N, [&](int64_t, int64_t begin, int64_t end) {
    kernels().training.gate((end - begin) * F, floats(gate) + begin * F, floats(up) + begin * F,
                        floats(out) + begin * F);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gate_rows_backward(Tensor d_out, Tensor gate, Tensor up) {
  STD_TORCH_CHECK(gate.dim() == 2, "gate must have 2 axes");
  const int64_t N = gate.size(0), F = gate.size(1);
  check_plain("d_out", d_out, {N, F}), check_plain("gate", gate, {N, F}), check_plain("up", up, {N, F});
  Tensor d_gate = empty({N, F}, gate, ScalarType::Float);
  Tensor d_up = empty({N, F}, gate, ScalarType::Float), out = empty({N, F}, gate, ScalarType::Float);
  for_blocks(N, [&](int64_t, int64_t begin, int64_t end) {
    const int64_t at = begin * F;
    kernels().training.gate_backward((end - begin) * F, floats(d_out) + at, floats(gate) + at,
                                 floats(up) + at, floats(d_gate) + at, floats(d_up) + at,
                                 floats(out) + at);
  });
  return {d_gate, d_up, out};
}

// The cross-entropy of each row of logits, which become its gradient; 0 where labels are `ignored`.
Tensor cross_entropy_rows(Tensor logits, Tensor labels, int64_t ignored) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must have 2 axes");
  const int64_t N = logits.size(0), V = logits.size(1);
  check_plain("logits", logits, {N, V}), check_shape("labels", labels, {N});
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.is_contiguous(),
                  "labels must be contiguous int64");
  const auto* label = static_cast<const int64_t*>(labels.data_ptr());
  for (int64_t n = 0; n < N; ++n)
    STD_TORCH_CHECK(label[n] == ignored || (label[n] >= 0 && label[n] < V), "labels must be ", ignored,
                    " or in [0, ", V, "), got ", label[n]);
  Tensor losses = empty({N}, logits, ScalarType::Float);
  for_blocks(N, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      float* row = floats(logits) + n * V;
      if (label[n] == ignored) {
        std::fill(row, row + V, 0.0f);
        floats(losses)[n] = 0.0f;
      } else {
        floats(losses)[n] = kernels().training.cross_entropy(V, label[n], row);
      }
    }
  });
  return losses;
}

}  // namespace
}  // namespace memattn

STABLE_TORCH_LIBRARY_FRAGMENT(memattn_cpp, m) {
  m.def("norm_rows(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("norm_rows_again(Tensor x, Tensor weight, Tensor scale) -> Tensor");
  m.def("norm_rows_backward(Tensor d_out, Tensor x, Tensor weight, Tensor scale, Tensor? residual) "
        "-> (Tensor, Tensor)");
  m.def("rotate_heads(Tensor(a!) heads, Tensor cos, Tensor sin) -> ()");
  m.def("join_heads(Tensor d_query, Tensor d_key, Tensor d_value, Tensor? cos, Tensor? sin) "
        "-> Tensor");
  m.def("gate_rows(Tensor gate, Tensor up) -> Tensor");
  m.def("gate_rows_backward(Tensor d_out, Tensor gate, Tensor up) -> (Tensor, Tensor, Tensor)");
  m.def("cross_entropy_rows(Tensor(a!) logits, Tensor labels, int ignored) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(memattn_cpp, CPU, m) {
  m.impl("norm_rows", TORCH_BOX(&memattn::norm_rows));
  m.impl("norm_rows_again", TORCH_BOX(&memattn::norm_rows_again));
  m.impl("norm_rows_backward", TORCH_BOX(&memattn::norm_rows_backward));
  m.impl("rotate_heads", TORCH_BOX(&memattn::rotate_heads));
  m.impl("join_heads", TORCH_BOX(&memattn::join_heads));
  m.impl("gate_rows", TORCH_BOX(&memattn::gate_rows));
  m.impl("gate_rows_backward", TORCH_BOX(&memattn::gate_rows_backward));
  m.impl("cross_entropy_rows", TORCH_BOX(&memattn::cross_entropy_rows));
}
