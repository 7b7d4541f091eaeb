// The router of chapters on the CPU: arguments, threads, losses. The arithmetic is in
// chapter_router_tile.h, the definition in memattn/reference/chapter_router.py.
//
// Nothing of the size (rows x chapters) is stored: a thread has the logits of one tile of rows, and
// the backward computes them again for a few blocks of tiles. Sums over rows have an order that
// depends on the sizes only, not on threads.
#include <cmath>
#include <tuple>

#include "block_pipeline.h"
#include "gradient_sums.h"
#include "tensors.h"

namespace memattn {
namespace {

// The arguments of both operators, in their order.
struct Inputs {
  Tensor hidden, weight;
  OptionalTensor bias, valid;
  int64_t top_k, num_shared;
  double temperature, routed_scale;
  bool is_mean;
};

struct Call {
  RouterArgs args;
  Buffer weight, pairs, bias;
  std::vector<uint8_t> valid;
};

float element(const View& view, int64_t offset) {
  const auto* half = static_cast<const uint16_t*>(view.data) + offset;
  switch (view.dtype) {
    case Dtype::float16:
      return torch::headeronly::Half(*half, torch::headeronly::Half::from_bits());
    case Dtype::bfloat16:
      return torch::headeronly::BFloat16(*half, torch::headeronly::BFloat16::from_bits());
    default: return static_cast<const float*>(view.data)[offset];
  }
}

// Floats between two rows of `width`: whole lines of the cache, an odd number of them.
int64_t apart(int64_t width) {
  constexpr int64_t LINE = 16;
  return ((width + LINE - 1) / LINE | 1) * LINE;
}

// Calls work(chapter) for all of them.
template <class Work>
void each_chapter(int64_t C, Work work) {
  torch::stable::parallel_for(0, C, 64, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) work(c);
  });
}

// The weights as rows of pairs of bfloat16, where kernels multiply these.
void take_pairs(const Tensor& weight, Call& call) {
  RouterArgs& a = call.args;
  const View view = view_of(weight);
  const Dtype pair = Dtype::bfloat16;
  if (!kernels().has_pairs || view.dtype != pair || a.hidden.dtype != pair) return;
  a.pair_stride = apart((a.E + 1) / 2);
  call.pairs = buffer(a.C * a.pair_stride);
  a.pairs = call.pairs.get();
  each_chapter(a.C, [&](int64_t c) {
    const uint16_t* from = static_cast<const uint16_t*>(view.data) + c * view.stride[0];
    auto* to = reinterpret_cast<uint16_t*>(call.pairs.get() + c * a.pair_stride);
    for (int64_t d = 0; d < a.E; ++d) to[d] = from[d * view.stride[1]];
    std::fill(to + a.E, to + 2 * a.pair_stride, uint16_t{0});
  });
}

// The weights as float32 rows: in place where they are so and do not fall on each other's lines of
// the cache, which rows a multiple of many lines apart do.
void take_weight(const Tensor& weight, Call& call) {
  constexpr int64_t LINE = 16;
  RouterArgs& a = call.args;
  const View view = view_of(weight);
  const bool collide = a.E >= 16 * LINE && view.stride[0] / LINE % 4 == 0;
  if (view.dtype == Dtype::float32 && view.stride[1] == 1 && !collide) {
    a.weight = static_cast<const float*>(view.data), a.weight_stride = view.stride[0];
    return;
  }
  a.weight_stride = apart(a.E);
  call.weight = buffer(a.C * a.weight_stride);
  a.weight = call.weight.get();
  each_chapter(a.C, [&](int64_t c) {
    float* row = call.weight.get() + c * a.weight_stride;
    if (view.dtype == Dtype::float32 && view.stride[1] == 1)
      std::copy_n(static_cast<const float*>(view.data) + c * view.stride[0], a.E, row);
    else
      for (int64_t d = 0; d < a.E; ++d) row[d] = element(view, c * view.stride[0] + d * view.stride[1]);
  });
}

void make_call(const Inputs& in, bool is_backward, Call& call) {
  STD_TORCH_CHECK(in.hidden.dim() == 3 && in.weight.dim() == 2,
                  "hidden must have 3 axes and weight 2");
  RouterArgs& a = call.args;
  a = RouterArgs{};
  const int64_t B = in.hidden.size(0);
  a.N = in.hidden.size(1), a.E = in.hidden.size(2), a.C = in.weight.size(0), a.rows = B * a.N;
  check_shape("weight", in.weight, {a.C, a.E});
  STD_TORCH_CHECK(in.top_k >= 1 && in.top_k <= a.C, "top_k must be from 1 to ", a.C, ", got ",
                  in.top_k);
  STD_TORCH_CHECK(in.num_shared >= 0, "num_shared must be at least 0, got ", in.num_shared);
  STD_TORCH_CHECK(a.C + in.num_shared < INT32_MAX, "memattn_cpp takes fewer than 2^31 chapters");
  a.top_k = in.top_k, a.num_shared = in.num_shared;
  a.factor = static_cast<float>(1.0 / in.temperature);
  a.routed_scale = static_cast<float>(in.routed_scale);
  a.hidden = view_of(in.hidden);
  take_pairs(in.weight, call);
  if (is_backward || !a.pairs) take_weight(in.weight, call);
  if (in.bias) {
    check_shape("bias", *in.bias, {a.C});
    const View view = view_of(*in.bias);
    call.bias = buffer(a.C);
    for (int64_t c = 0; c < a.C; ++c) call.bias.get()[c] = element(view, c * view.stride[0]);
    a.bias = call.bias.get();
  }
  call.valid.assign(a.rows, 1);
  if (in.valid) {
    check_shape("valid", *in.valid, {B, a.N});
    STD_TORCH_CHECK(in.valid->scalar_type() == ScalarType::Bool, "valid must have dtype bool");
    const auto* valid = static_cast<const uint8_t*>(in.valid->data_ptr());
    for (int64_t row = 0; row < a.rows; ++row)
      call.valid[row] = valid[row / a.N * in.valid->stride(0) + row % a.N * in.valid->stride(1)];
  }
  a.valid = call.valid.data();
}

float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// ---- forward -----------------------------------------------------------------------------------

// What the tiles of one chunk of rows add up to.
struct Chunk {
  std::vector<float> probability;
  std::vector<int64_t> chosen;
  RouterSums sums;
};

// Rows of a chunk: at most 64 chunks, whatever the threads.
int64_t chunk_rows(const RouterArgs& a) {
  constexpr int64_t MOST_CHUNKS = 64;
  const int64_t tile = kernels().tile_rows;
  return std::max<int64_t>((a.rows + tile * MOST_CHUNKS - 1) / (tile * MOST_CHUNKS), 1) * tile;
}

void run_chunk(const RouterArgs& a, int64_t begin, int64_t end, float* scratch, Chunk& chunk) {
  chunk.probability.resize(a.C), chunk.chosen.assign(a.C, 0);
  chunk.sums.probability = chunk.probability.data(), chunk.sums.chosen = chunk.chosen.data();
  kernels().router.forward(a, begin, end, chunk.sums, scratch);
}

struct Losses {
  double balance, auxiliary, z, entropy;
};

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                           Tensor>;

Results run_forward(const Inputs& in) {
  Call call;
  make_call(in, false, call);
  RouterArgs& a = call.args;
  const int64_t B = in.hidden.size(0), slots = a.num_shared + a.top_k;
  Tensor indices = empty({B, a.N, slots}, in.hidden, ScalarType::Int);
  Tensor weights = empty({B, a.N, slots}, in.hidden, ScalarType::Float);
  Tensor lse = empty({2, B, a.N}, in.hidden, ScalarType::Float);
  Tensor load = empty({a.C}, in.hidden, ScalarType::Float);
  Tensor importance = empty({a.C}, in.hidden, ScalarType::Float);
  a.indices = static_cast<int32_t*>(indices.data_ptr()), a.weights = floats(weights);
  take_pair(lse, a.lse_high, a.lse_low);

  const int64_t step = chunk_rows(a);
  std::vector<Chunk> chunks((a.rows + step - 1) / step);
  parallel_work(
      chunks.size(), [&] { return buffer(kernels().router.forward_scratch(a)); },
      [&](int64_t i, Buffer& scratch) {
        run_chunk(a, i * step, std::min((i + 1) * step, a.rows), scratch.get(), chunks[i]);
      });

  int64_t count = 0;
  Losses losses{};
  std::vector<double> probabilities(a.C, 0.0);
  std::vector<int64_t> chosen(a.C, 0);
  for (const Chunk& chunk : chunks) {
    count += chunk.sums.count;
    losses.z += chunk.sums.z_square, losses.entropy += chunk.sums.entropy;
    for (int64_t c = 0; c < a.C; ++c)
      probabilities[c] += chunk.probability[c], chosen[c] += chunk.chosen[c];
  }
  const double n = static_cast<double>(std::max<int64_t>(count, 1));
  const double C = static_cast<double>(a.C);
  for (int64_t c = 0; c < a.C; ++c) {
    const double probability = probabilities[c] / n, share = static_cast<double>(chosen[c]) / n;
    floats(importance)[c] = static_cast<float>(probability);
    floats(load)[c] = static_cast<float>(share);
    losses.balance += share * probability;
    if (count > 0) losses.auxiliary += (probability - 1.0 / C) * (probability - 1.0 / C);
  }
  auto scalar = [&](double value) {
    Tensor t = empty({}, in.hidden, ScalarType::Float);
    *floats(t) = static_cast<float>(value);
    return t;
  };
  const double balance = in.is_mean ? C / static_cast<double>(a.top_k) : C;
  return {weights,
          indices,
          scalar(balance * losses.balance),
          scalar(C * losses.auxiliary),
          scalar(losses.z / n),
          scalar(static_cast<double>(count)),
          load,
          scalar(losses.entropy / n),
          lse,
          importance};
}

// ---- backward ----------------------------------------------------------------------------------

double value_of(const OptionalTensor& cotangent) {
  return cotangent ? static_cast<double>(*floats(*cotangent)) : 0.0;
}

// Tiles of a block: whole runs of the sums over rows, and work for every thread.
int64_t block_tiles(const RouterArgs& a) {
  const int64_t threads = torch::stable::get_num_threads(), tile = kernels().tile_rows;
  const int64_t all = (a.rows + tile - 1) / tile, least = a.C <= 2048 ? 4 : 2;
  const int64_t tiles = (std::max(threads, least) + least - 1) / least * least;
  return std::min(tiles, std::max<int64_t>(all, 1));
}

struct Cotangents {
  OptionalTensor weights, balance, auxiliary, z;
};

std::tuple<Tensor, Tensor, Tensor> run_backward(const Inputs& in, const Cotangents& d,
                                                const Tensor& indices, const Tensor& count,
                                                const Tensor& load, const Tensor& importance,
                                                const Tensor& lse) {
  Call call;
  make_call(in, true, call);
  RouterArgs& a = call.args;
  const int64_t B = in.hidden.size(0), slots = a.num_shared + a.top_k;
  Tensor d_hidden = empty({B, a.N, a.E}, in.hidden, in.hidden.scalar_type());
  Tensor d_weight = empty({a.C, a.E}, in.weight, in.weight.scalar_type());
  Tensor d_bias = in.bias ? empty({a.C}, in.weight, in.weight.scalar_type())
                          : empty({0}, in.hidden, in.hidden.scalar_type());
  check_shape("indices", indices, {B, a.N, slots});
  check_shape("lse", lse, {2, B, a.N});
  check_shape("load", load, {a.C});
  check_shape("importance", importance, {a.C});
  const Tensor kept_indices = torch::stable::contiguous(indices);
  Tensor kept_lse = torch::stable::contiguous(lse);
  a.indices = static_cast<int32_t*>(kept_indices.data_ptr());
  for (int64_t row = 0; row < a.rows; ++row)
    for (int64_t i = row * slots; a.valid[row] && i < (row + 1) * slots; ++i)
      STD_TORCH_CHECK(a.indices[i] >= 0 && a.indices[i] < a.C + a.num_shared,
                      "indices must be those of the forward, got ", a.indices[i]);
  take_pair(kept_lse, a.lse_high, a.lse_low);
  OptionalTensor d_weights;
  if (d.weights) {
    check_shape("d_weights", *d.weights, {B, a.N, slots});
    d_weights = torch::stable::contiguous(*d.weights);
    a.d_weights = floats(*d_weights);
  }
  a.d_hidden = view_of(d_hidden);

  const double n = std::max(static_cast<double>(*floats(count)), 1.0);
  const double C = static_cast<double>(a.C);
  const double balance = value_of(d.balance) * (in.is_mean ? C / a.top_k : C) / n;
  const double auxiliary = value_of(d.auxiliary) * 2.0 * C / n;
  a.z_factor = static_cast<float>(value_of(d.z) * 2.0 / n);
  std::vector<float> gamma(a.C);
  const Tensor f = torch::stable::contiguous(load), p = torch::stable::contiguous(importance);
  for (int64_t c = 0; c < a.C; ++c)
    gamma[c] = static_cast<float>(balance * floats(f)[c] + auxiliary * (floats(p)[c] - 1.0 / C));
  a.gamma = gamma.data();

  const int64_t tile = kernels().tile_rows, lanes = 2 * kernels().lanes;
  const int64_t ld = (a.E + lanes - 1) / lanes * lanes;
  const bool in_place = in.weight.scalar_type() == ScalarType::Float && ld == a.E;
  const Buffer sums = in_place ? nullptr : buffer(a.C * ld);
  std::vector<double> bias_sums(a.C, 0.0);

  constexpr int64_t CHAPTERS = 48;
  const int64_t tiles = block_tiles(a), all = (a.rows + tile - 1) / tile;
  const BlockPipeline pipeline(all, tiles, (a.C + CHAPTERS - 1) / CHAPTERS);
  const int64_t floats_of_block = tiles * tile * (a.C + ld);
  const Buffer blocks = buffer(pipeline.buffers() * floats_of_block);
  auto block_of = [&](int64_t b) {
    float* own = blocks.get() + b % pipeline.buffers() * floats_of_block;
    return RouterBlock{b * tiles * tile,
                       std::min(tiles, all - b * tiles),
                       own,
                       own + tiles * tile * a.C,
                       in_place ? floats(d_weight) : sums.get(),
                       bias_sums.data()};
  };
  pipeline.run(
      [&] { return buffer(kernels().router.backward_scratch(a)); },
      [&](int64_t b, int64_t i, Buffer& scratch) {
        kernels().router.backward_rows(a, block_of(b), i, scratch.get());
      },
      [&](int64_t b, int64_t i) {
        const RouterBlock block = block_of(b);
        const int64_t c = i * CHAPTERS, n = std::min(CHAPTERS, a.C - c);
        if (b == 0) std::fill_n(block.d_weight + c * ld, n * ld, 0.0f);
        kernels().router.backward_chapters(a, block, c, n);
      });
  if (a.rows == 0) std::fill_n(in_place ? floats(d_weight) : sums.get(), a.C * ld, 0.0f);

  if (!in_place)
    store_sum(view_of(d_weight), 0, a.C, a.E, ld, 1.0f, {{sums.get(), 0, a.C}});
  if (in.bias) {
    std::vector<float> rounded(bias_sums.begin(), bias_sums.end());
    store_sum(view_of(d_bias), 0, 1, a.C, a.C, 1.0f, {{rounded.data(), 0, 1}});
  }
  return {d_hidden, d_weight, d_bias};
}

#define MEMATTN_PARAMETERS                                                                  \
  Tensor hidden, Tensor weight, OptionalTensor bias, OptionalTensor valid, int64_t top_k,   \
      int64_t num_shared, double temperature, double routed_scale, bool is_mean
#define MEMATTN_TAKEN \
  Inputs{hidden, weight, bias, valid, top_k, num_shared, temperature, routed_scale, is_mean}

Results forward(MEMATTN_PARAMETERS) { return run_forward(MEMATTN_TAKEN); }

std::tuple<Tensor, Tensor, Tensor> backward(OptionalTensor d_weights, OptionalTensor d_balance,
                                            OptionalTensor d_auxiliary, OptionalTensor d_z,
                                            Tensor indices, Tensor count, Tensor load,
                                            Tensor importance, Tensor lse, MEMATTN_PARAMETERS) {
  return run_backward(MEMATTN_TAKEN, {d_weights, d_balance, d_auxiliary, d_z}, indices, count,
                      load, importance, lse);
}

}  // namespace
}  // namespace memattn

// the schemas are made from the signature in memattn_kernels/signatures.py
STABLE_TORCH_LIBRARY_IMPL(memattn_cpp, CPU, m) {
  m.impl("chapter_router", TORCH_BOX(&memattn::forward));
  m.impl("chapter_router_backward", TORCH_BOX(&memattn::backward));
}
