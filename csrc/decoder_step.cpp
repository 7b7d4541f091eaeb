// One more token of each sequence through the sublayers of a decoder on the CPU: what a layer does
// between its residuals is one call, so that a token costs little more than one read of the weights.
// The arithmetic is in decoder_step_tile.h, the definition in memattn/models/plain_step.py.
#include <cmath>
#include <cstring>
#include <utility>

#include "decoder_args.h"

namespace memattn {
namespace {

constexpr int64_t BLOCK = 32;  // rows of a weight that are handed out together

// Some weights [rows, K] and where their products with each x go: to[b * stride + row].
struct Product {
  const float* weight;
  int64_t rows;
  float* to;
};

// The products of all weights with B vectors x[b * ldx], which are padded; ldy rows apart.
void multiply(const std::vector<Product>& products, int64_t B, int64_t K, const float* x,
              int64_t ldx, int64_t ldy) {
  const auto& k = kernels().step;
  std::vector<std::pair<size_t, int64_t>> blocks;
  for (size_t i = 0; i < products.size(); ++i)
    for (int64_t row = 0; row < products[i].rows; row += BLOCK) blocks.push_back({i, row});
  const int64_t n = static_cast<int64_t>(blocks.size());
  if (!n) return;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), n);
  torch::stable::parallel_for(0, n, (n + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Product& p = products[blocks[i].first];
      const int64_t row = blocks[i].second, rows = std::min(BLOCK, p.rows - row);
      for (int64_t b = 0; b < B; ++b)
        k.products(rows, K, p.weight + row * K, K, x + b * ldx, p.to + b * ldy + row);
    }
  });
}

// x + y of rows y[b * ldy].
Tensor add_residual(const Tensor& x, const float* y, int64_t ldy) {
  const int64_t B = x.size(0), E = x.size(2);
  Tensor out = empty({B, 1, E}, x, ScalarType::Float);
  auto* to = static_cast<float*>(out.data_ptr());
  for (int64_t b = 0; b < B; ++b)
    for (int64_t e = 0; e < E; ++e) to[b * E + e] = floats(x)[b * E + e] + y[b * ldy + e];
  return out;
}

// The normed rows, padded, with a row every `ld`.
void normed(const Tensor& x, const Tensor& norm, double eps, float* to, int64_t ld) {
  const int64_t B = x.size(0), E = x.size(2);
  for (int64_t b = 0; b < B; ++b)
    kernels().step.norm(E, floats(x) + b * E, floats(norm), static_cast<float>(eps), to + b * ld);
}

Tensor attention_step(Tensor hidden, Tensor norm, Tensor q_proj, Tensor k_proj, Tensor v_proj,
                      Tensor o_proj, Tensor key, Tensor value, OptionalTensor persistent_key,
                      OptionalTensor persistent_value, OptionalTensor table_key,
                      OptionalTensor table_value, OptionalTensor cos, OptionalTensor sin,
                      Tensor positions, OptionalTensor seq_start, OptionalTensor seq_end,
                      OptionalInt segment_len, OptionalInt window_size, int64_t future_dim,
                      double eps) {
  STD_TORCH_CHECK(hidden.dim() == 3 && key.dim() == 4 && value.dim() == 4,
                  "hidden must have 3 axes, key and value 4");
  StepAttention a{};
  const int64_t B = hidden.size(0), E = hidden.size(2);
  a.Hkv = key.size(1), a.S = key.size(2), a.D = key.size(3), a.Dv = a.D;
  STD_TORCH_CHECK(a.D > 0 && q_proj.dim() == 2 && q_proj.size(0) % a.D == 0, "q_proj has no heads");
  a.H = q_proj.size(0) / a.D;
  STD_TORCH_CHECK(a.Hkv > 0 && a.H % a.Hkv == 0, "key has heads that do not divide those of q_proj");
  check_plain("hidden", hidden, {B, 1, E}), check_plain("norm", norm, {E});
  check_plain("q_proj", q_proj, {a.H * a.D, E}), check_plain("k_proj", k_proj, {a.Hkv * a.D, E});
  check_plain("v_proj", v_proj, {a.Hkv * a.D, E}), check_plain("o_proj", o_proj, {E, a.H * a.D});
  STD_TORCH_CHECK(a.S > 0, "key must have a place for the new token");
  check_kept("key", key, {B, a.Hkv, a.S, a.D}), check_kept("value", value, {B, a.Hkv, a.S, a.D});
  for (int i = 0; i < 3; ++i) a.key_stride[i] = key.stride(i), a.value_stride[i] = value.stride(i);
  auto* keys = static_cast<float*>(key.data_ptr());
  auto* values = static_cast<float*>(value.data_ptr());
  a.key = keys, a.value = values;
  a.scale = 1.0 / std::sqrt(static_cast<double>(a.D));
  STD_TORCH_CHECK(persistent_key.has_value() == persistent_value.has_value() &&
                      table_key.has_value() == table_value.has_value() &&
                      cos.has_value() == sin.has_value(),
                  "arguments of a pair are given together");
  if (persistent_key) {
    STD_TORCH_CHECK(persistent_key->dim() == 3, "persistent_key must have 3 axes");
    a.P = persistent_key->size(1);
    check_plain("persistent_key", *persistent_key, {a.Hkv, a.P, a.D});
    check_plain("persistent_value", *persistent_value, {a.Hkv, a.P, a.D});
    a.persistent_key = floats(*persistent_key), a.persistent_value = floats(*persistent_value);
  }
  if (table_key) {
    STD_TORCH_CHECK(table_key->dim() == 3 && future_dim > 0, "table_key must have 3 axes");
    a.R = table_key->size(1), a.ahead = std::min(future_dim, a.R);
    check_plain("table_key", *table_key, {a.H, a.R, a.D});
    check_plain("table_value", *table_value, {a.H, a.R, a.D});
    a.table_key = floats(*table_key), a.table_value = floats(*table_value);
  }
  const Places positioned(positions, B, 1);
  check_bounds("seq_start", seq_start, B), check_bounds("seq_end", seq_end, B);
  const auto starts = seq_start ? int_values(*seq_start) : std::vector<int64_t>(B, 0);
  const auto ends = seq_end ? int_values(*seq_end) : std::vector<int64_t>(B, INT32_MAX);

  const int64_t i = a.S - 1;  // the column of the new token
  std::vector<StepRange> ranges(B);
  std::vector<int64_t> places(B);
  for (int64_t b = 0; b < B; ++b) {
    StepRange& r = ranges[b];
    r = StepRange{};
    places[b] = positioned.of(b, 0);
    if (i < starts[b] || i >= ends[b]) continue;  // padding sees nothing
    int64_t lo = starts[b];
    if (segment_len || window_size) {
      lo = i;
      if (segment_len) lo = i - (i - starts[b]) % *segment_len;
      if (window_size) lo = std::min(lo, i - std::min<int64_t>(*window_size, INT32_MAX) + 1);
      lo = std::max(lo, starts[b]);
    }
    r.sees = true, r.lo = std::max<int64_t>(lo, 0), r.hi = a.S;
    r.ahead_begin = std::min(places[b], a.R);
    r.ahead_end = std::min(places[b] + a.ahead, a.R);
  }
  if (cos) {
    STD_TORCH_CHECK(cos->dim() == 2 && a.D % 2 == 0,
                    "cos must have 2 axes, and a head an even number of features");
    const int64_t rows = cos->size(0);
    check_plain("cos", *cos, {rows, a.D / 2}), check_plain("sin", *sin, {rows, a.D / 2});
    for (int64_t b = 0; b < B; ++b)
      STD_TORCH_CHECK(places[b] < rows && ranges[b].ahead_end < rows, "cos must have a row for each position");
    a.cos = floats(*cos), a.sin = floats(*sin);
  }

  const auto& k = kernels().step;
  const int64_t wide = round_up(E, BLOCK), Q = round_up(a.H * a.D, BLOCK);
  const int64_t KV = round_up(a.Hkv * a.D, BLOCK), row = Q + 2 * KV;
  Buffer scratch = buffer(B * (wide + row + Q + wide));
  float *x = scratch.get(), *projected = x + B * wide, *attended = projected + B * row;
  float* result = attended + B * Q;
  normed(hidden, norm, eps, x, wide);
  multiply({{floats(q_proj), a.H * a.D, projected},
            {floats(k_proj), a.Hkv * a.D, projected + Q},
            {floats(v_proj), a.Hkv * a.D, projected + Q + KV}},
           B, E, x, wide, row);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < a.Hkv; ++h) {
      const float* from = projected + b * row + Q + h * a.D;
      float* to = keys + b * a.key_stride[0] + h * a.key_stride[1] + i * a.key_stride[2];
      if (a.cos)
        k.rotate(a.D, from, a.cos + places[b] * (a.D / 2), a.sin + places[b] * (a.D / 2), to);
      else
        std::memcpy(to, from, a.D * sizeof(float));
      std::memcpy(values + b * a.value_stride[0] + h * a.value_stride[1] + i * a.value_stride[2],
                  from + KV, a.D * sizeof(float));
    }
  std::memset(attended, 0, B * Q * sizeof(float));
  const int64_t features = round_up(a.D, kernels().lanes);
  parallel_work(
      B * a.H, [&] { return buffer(features + k.scratch(a)); },
      [&](int64_t n, Buffer& own) {
        const int64_t b = n / a.H, h = n % a.H;
        if (!ranges[b].sees) return;
        float* query = own.get();
        const float* from = projected + b * row + h * a.D;
        if (a.cos)
          k.rotate(a.D, from, a.cos + places[b] * (a.D / 2), a.sin + places[b] * (a.D / 2), query);
        else
          std::memcpy(query, from, a.D * sizeof(float));
        std::fill(query + a.D, query + features, 0.0f);
        k.attend(a, b, h, ranges[b], query, query + features, attended + b * Q + h * a.D);
      });
  multiply({{floats(o_proj), E, result}}, B, a.H * a.D, attended, Q, wide);
  return add_residual(hidden, result, wide);
}

Tensor swiglu_step(Tensor hidden, Tensor norm, Tensor gate_proj, Tensor up_proj, Tensor down_proj,
                   double eps) {
  STD_TORCH_CHECK(hidden.dim() == 3 && gate_proj.dim() == 2, "hidden must have 3 axes, gate_proj 2");
  const int64_t B = hidden.size(0), E = hidden.size(2), F = gate_proj.size(0);
  check_plain("hidden", hidden, {B, 1, E}), check_plain("norm", norm, {E});
  check_plain("gate_proj", gate_proj, {F, E}), check_plain("up_proj", up_proj, {F, E});
  check_plain("down_proj", down_proj, {E, F});
  const int64_t wide = round_up(E, BLOCK), inner = round_up(F, BLOCK);
  Buffer scratch = buffer(B * (2 * wide + 2 * inner));
  float *x = scratch.get(), *gate = x + B * wide, *result = gate + 2 * B * inner;
  // what products do not reach is padding of the next product
  std::memset(gate, 0, 2 * B * inner * sizeof(float));
  normed(hidden, norm, eps, x, wide);
  multiply({{floats(gate_proj), F, gate}, {floats(up_proj), F, gate + inner}}, B, E, x, wide,
           2 * inner);
  for (int64_t b = 0; b < B; ++b)
    kernels().step.gate(inner, gate + 2 * b * inner, gate + (2 * b + 1) * inner,
                        gate + 2 * b * inner);
  multiply({{floats(down_proj), E, result}}, B, F, gate, 2 * inner, wide);
  return add_residual(hidden, result, wide);
}

// A layer after the other. Of layer i: 9 weights from weights[9 * i], those of attention_step and of
// swiglu_step; its keys and values, kept[2 * i]; persistent keys and values and those of a table,
// given[4 * i]; bounds of its sequences, bounds[2 * i]; segment, window and rows ahead, spans[3 * i],
// where -1 is none; and the eps of its norms, eps[2 * i].
Tensor decoder_step(Tensor hidden, std::vector<Tensor> weights, std::vector<Tensor> kept,
                    std::vector<OptionalTensor> given, OptionalTensor cos, OptionalTensor sin,
                    Tensor positions, std::vector<OptionalTensor> bounds,
                    std::vector<int64_t> spans, std::vector<double> eps) {
  const size_t n = weights.size() / 9;
  STD_TORCH_CHECK(weights.size() == 9 * n && kept.size() == 2 * n && given.size() == 4 * n &&
                      bounds.size() == 2 * n && spans.size() == 3 * n && eps.size() == 2 * n,
                  "lists must have an entry for each layer");
  auto span = [&](size_t i) { return spans[i] < 0 ? OptionalInt() : OptionalInt(spans[i]); };
  for (size_t i = 0; i < n; ++i) {
    const Tensor* w = &weights[9 * i];
    const OptionalTensor* more = &given[4 * i];
    hidden = attention_step(hidden, w[0], w[1], w[2], w[3], w[4], kept[2 * i], kept[2 * i + 1],
                            more[0], more[1], more[2], more[3], cos, sin, positions, bounds[2 * i],
                            bounds[2 * i + 1], span(3 * i), span(3 * i + 1),
                            std::max<int64_t>(spans[3 * i + 2], 0), eps[2 * i]);
    hidden = swiglu_step(hidden, w[5], w[6], w[7], w[8], eps[2 * i + 1]);
  }
  return hidden;
}

// The normed rows alone.
Tensor norm_step(Tensor hidden, Tensor norm, double eps) {
  STD_TORCH_CHECK(hidden.dim() == 3, "hidden must have 3 axes");
  const int64_t B = hidden.size(0), E = hidden.size(2), wide = round_up(E, BLOCK);
  check_plain("hidden", hidden, {B, 1, E}), check_plain("norm", norm, {E});
  Buffer row = buffer(B * wide);
  normed(hidden, norm, eps, row.get(), wide);
  Tensor out = empty({B, 1, E}, hidden, ScalarType::Float);
  for (int64_t b = 0; b < B; ++b)
    std::memcpy(static_cast<float*>(out.data_ptr()) + b * E, row.get() + b * wide, E * sizeof(float));
  return out;
}

// The products of a weight [F, E] with the newest token of each sequence, [B, 1, F].
Tensor linear_step(Tensor hidden, Tensor weight) {
  STD_TORCH_CHECK(hidden.dim() == 3 && weight.dim() == 2, "hidden must have 3 axes, weight 2");
  const int64_t B = hidden.size(0), E = hidden.size(2), F = weight.size(0);
  check_plain("hidden", hidden, {B, 1, E}), check_plain("weight", weight, {F, E});
  const int64_t wide = round_up(E, BLOCK), row = round_up(F, BLOCK);
  Buffer scratch = buffer(B * (wide + row));
  float *x = scratch.get(), *result = x + B * wide;
  std::memset(x, 0, B * wide * sizeof(float));
  for (int64_t b = 0; b < B; ++b) std::memcpy(x + b * wide, floats(hidden) + b * E, E * sizeof(float));
  multiply({{floats(weight), F, result}}, B, E, x, wide, row);
  Tensor out = empty({B, 1, F}, hidden, ScalarType::Float);
  for (int64_t b = 0; b < B; ++b)
    std::memcpy(static_cast<float*>(out.data_ptr()) + b * F, result + b * row, F * sizeof(float));
  return out;
}

}  // namespace
}  // namespace memattn

STABLE_TORCH_LIBRARY_FRAGMENT(memattn_cpp, m) {
  m.def("attention_step(Tensor hidden, Tensor norm, Tensor q_proj, Tensor k_proj, Tensor v_proj, "
        "Tensor o_proj, Tensor(a!) key, Tensor(b!) value, Tensor? persistent_key, "
        "Tensor? persistent_value, Tensor? table_key, Tensor? table_value, Tensor? cos, Tensor? sin, "
        "Tensor positions, Tensor? seq_start, Tensor? seq_end, int? segment_len, int? window_size, "
        "int future_dim, float eps) -> Tensor");
  m.def("swiglu_step(Tensor hidden, Tensor norm, Tensor gate_proj, Tensor up_proj, "
        "Tensor down_proj, float eps) -> Tensor");
  m.def("decoder_step(Tensor hidden, Tensor[] weights, Tensor(a!)[] kept, Tensor?[] given, Tensor? cos, "
        "Tensor? sin, Tensor positions, Tensor?[] bounds, int[] spans, float[] eps) -> Tensor");
  m.def("norm_step(Tensor hidden, Tensor norm, float eps) -> Tensor");
  m.def("linear_step(Tensor hidden, Tensor weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(memattn_cpp, CPU, m) {
  m.impl("attention_step", TORCH_BOX(&memattn::attention_step));
  m.impl("swiglu_step", TORCH_BOX(&memattn::swiglu_step));
  m.impl("decoder_step", TORCH_BOX(&memattn::decoder_step));
  m.impl("norm_step", TORCH_BOX(&memattn::norm_step));
  m.impl("linear_step", TORCH_BOX(&memattn::linear_step));
}
