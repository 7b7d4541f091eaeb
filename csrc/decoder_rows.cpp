// Many tokens through the sublayers of a decoder on the CPU: norm, products with weights, rotation,
// the activation of the MLP and the residual of a tile of tokens are one walk, so nothing between
// them goes through memory, and keys and values are written where the cache has them. The arithmetic
// is in decoder_rows_tile.h, the definition in memattn/models/plain_rows.py.
#include <cstring>
#include <utility>

#include "decoder_args.h"

namespace memattn {
namespace {

constexpr int64_t TILE = 64;   // tokens, at most
constexpr int64_t BLOCK = 48;  // rows of a weight whose products are there at a time

// How tokens are handed to threads: tiles of them, and where these are few, parts of the weights.
struct Tiles {
  int64_t rows, tile, count, parts, lanes;

  explicit Tiles(int64_t n) : rows(n) {
    const int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 1);
    const int64_t vector = kernels().lanes;
    const int64_t turns = (rows + TILE * threads - 1) / (TILE * threads);
    const int64_t even = turns ? (rows + turns * threads - 1) / (turns * threads) : 1;
    tile = even <= vector ? vector : round_up(even, 2 * vector);
    lanes = tile, count = (rows + tile - 1) / tile;
    parts = count ? (threads + count - 1) / count : 1;
  }

  int64_t panel() const { return std::min(lanes, 2 * kernels().lanes); }
  int64_t begin(int64_t i) const { return i * tile; }
  int64_t size(int64_t i) const { return std::min(tile, rows - i * tile); }

  // Runs work(tile, part, scratch of so many floats).
  template <class Work>
  void run(int64_t scratch, Work work) const {
    parallel_work(count * parts, [&] { return buffer(scratch); },
                  [&](int64_t i, Buffer& own) { work(i / parts, i % parts, own.get()); });
  }

  // The share of n things that a part has.
  std::pair<int64_t, int64_t> share(int64_t part, int64_t n) const {
    return {n * part / parts, n * (part + 1) / parts};
  }
};

// Tokens t >= first of each sequence, as rows one behind the other.
struct Newest {
  int64_t T, n;  // of all T tokens the newest n

  Newest(int64_t T, int64_t n) : T(T), n(n) {
    STD_TORCH_CHECK(0 <= n && n <= T, "newest must be between 0 and ", T, ", got ", n);
  }
  // the row among all tokens
  int64_t token(int64_t row) const { return row / n * T + T - n + row % n; }
};

// The normed rows of a tile as panels; rows of scratch are [lanes][ld].
void normed_panels(const Tiles& tiles, int64_t i, const Newest& newest, const Tensor& hidden,
                   const Tensor& norm, double eps, float* rows, float* panels) {
  const auto& k = kernels();
  const int64_t E = hidden.size(2), ld = round_up(E, k.lanes), n = tiles.size(i);
  for (int64_t r = 0; r < n; ++r)
    k.step.norm(E, floats(hidden) + newest.token(tiles.begin(i) + r) * E, floats(norm),
                static_cast<float>(eps), rows + r * ld);
  std::fill(rows + n * ld, rows + tiles.lanes * ld, 0.0f);
  k.rows.panels(tiles.lanes, E, rows, ld, panels);
}

// to = hidden + the products of weight [E, K] with panels, for the part of E that a thread has.
void add_products(const Tiles& tiles, int64_t i, int64_t part, const Newest& newest,
                  const Tensor& hidden, const Tensor& weight, const float* panels, float* scratch,
                  float* to) {
  const auto& k = kernels();
  const int64_t E = weight.size(0), K = weight.size(1);
  float *products = scratch, *rows = scratch + tiles.lanes * BLOCK;
  const auto [first, last] = tiles.share(part, (E + BLOCK - 1) / BLOCK);
  for (int64_t e = first * BLOCK; e < std::min(E, last * BLOCK); e += BLOCK) {
    const int64_t wide = std::min(BLOCK, E - e), ld = round_up(wide, k.lanes);
    k.rows.products(wide, K, floats(weight) + e * K, panels, tiles.lanes, products,
                    wide * tiles.panel());
    k.rows.rows(tiles.lanes, wide, products, rows, ld);
    for (int64_t r = 0; r < tiles.size(i); ++r) {
      const int64_t row = tiles.begin(i) + r;
      const float *from = floats(hidden) + newest.token(row) * E + e, *sum = rows + r * ld;
      float* out = to + row * E + e;
      for (int64_t c = 0; c < wide; ++c) out[c] = from[c] + sum[c];
    }
  }
}

// floats of scratch for add_products
int64_t product_scratch(const Tiles& tiles) {
  return tiles.lanes * (BLOCK + round_up(BLOCK, kernels().lanes));
}

Tensor project_rows(Tensor hidden, Tensor norm, Tensor q_proj, Tensor k_proj, Tensor v_proj,
                    Tensor key, Tensor value, OptionalTensor cos, OptionalTensor sin,
                    Tensor positions, int64_t newest, double eps) {
  STD_TORCH_CHECK(hidden.dim() == 3 && key.dim() == 4, "hidden must have 3 axes, key 4");
  const int64_t B = hidden.size(0), T = hidden.size(1), E = hidden.size(2);
  const int64_t Hkv = key.size(1), D = key.size(3);
  STD_TORCH_CHECK(D > 0 && q_proj.dim() == 2 && q_proj.size(0) % D == 0, "q_proj has no heads");
  const int64_t H = q_proj.size(0) / D;
  check_plain("hidden", hidden, {B, T, E}), check_plain("norm", norm, {E});
  check_plain("q_proj", q_proj, {H * D, E}), check_plain("k_proj", k_proj, {Hkv * D, E});
  check_plain("v_proj", v_proj, {Hkv * D, E});
  check_kept("key", key, {B, Hkv, T, D}), check_kept("value", value, {B, Hkv, T, D});
  const Places places(positions, B, T);
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos and sin are given together");
  if (cos) {
    STD_TORCH_CHECK(cos->dim() == 2 && D % 2 == 0,
                    "cos must have 2 axes, and a head an even number of features");
    const int64_t rows = cos->size(0);
    check_plain("cos", *cos, {rows, D / 2}), check_plain("sin", *sin, {rows, D / 2});
    for (int64_t b = 0; b < B; ++b)
      for (int64_t t = 0; t < T; ++t)
        STD_TORCH_CHECK(places.of(b, t) < rows, "cos must have a row for each position");
  }
  const Newest all(T, T), asked(T, newest);
  Tensor query = empty({B, H, newest, D}, hidden, ScalarType::Float);
  // where heads of queries, keys and values go: [B, heads, T - first, D]
  struct Target {
    const float* weight;
    float* to;
    int64_t heads, first, stride[3];
    bool turns;
  };
  auto kept = [&](const Tensor& weight, const Tensor& to, bool turns) {
    return Target{floats(weight), static_cast<float*>(to.data_ptr()), to.size(1), T - to.size(2),
                  {to.stride(0), to.stride(1), to.stride(2)}, turns};
  };
  const Target targets[3] = {kept(q_proj, query, cos.has_value()), kept(k_proj, key, cos.has_value()),
                             kept(v_proj, value, false)};
  const auto& k = kernels();
  const Tiles tiles(B * T);
  const int64_t ld = round_up(E, k.lanes), ldd = round_up(D, k.lanes), lanes = tiles.lanes;
  tiles.run(lanes * (ld + E + D + ldd), [&](int64_t i, int64_t part, float* rows) {
    float *panels = rows + lanes * ld, *products = panels + lanes * E, *turned = products + lanes * D;
    normed_panels(tiles, i, all, hidden, norm, eps, rows, panels);
    const auto [begin, end] = tiles.share(part, H + 2 * Hkv);
    for (int64_t unit = begin; unit < end; ++unit) {
      int64_t h = unit;
      const Target* target = targets;
      while (h >= target->heads) h -= target++->heads;
      // where a tile has tokens of one sequence alone, its queries may not be wanted
      const int64_t first = tiles.begin(i), last = first + tiles.size(i) - 1;
      if (first / T == last / T && last % T < target->first) continue;
      k.rows.products(D, E, target->weight + h * D * E, panels, lanes, products, D * tiles.panel());
      k.rows.rows(lanes, D, products, turned, ldd);
      for (int64_t row = first; row <= last; ++row) {
        const int64_t b = row / T, t = row % T, place = places.of(b, t) * (D / 2);
        if (t < target->first) continue;
        const float* from = turned + (row - first) * ldd;
        float* to = target->to + b * target->stride[0] + h * target->stride[1] +
                    (t - target->first) * target->stride[2];
        if (target->turns)
          k.step.rotate(D, from, floats(*cos) + place, floats(*sin) + place, to);
        else
          std::memcpy(to, from, D * sizeof(float));
      }
    }
  });
  return query;
}

Tensor output_rows(Tensor hidden, Tensor attended, Tensor o_proj) {
  STD_TORCH_CHECK(hidden.dim() == 3 && attended.dim() == 4, "hidden must have 3 axes, attended 4");
  const int64_t B = hidden.size(0), T = hidden.size(1), E = hidden.size(2);
  const int64_t H = attended.size(1), n = attended.size(2), D = attended.size(3), K = H * D;
  check_plain("hidden", hidden, {B, T, E}), check_plain("o_proj", o_proj, {E, K});
  check_kept("attended", attended, {B, H, n, D});
  const Newest newest(T, n);
  const auto& k = kernels();
  const Tiles tiles(B * n);
  Tensor out = empty({B, n, E}, hidden, ScalarType::Float);
  const int64_t ld = round_up(K, k.lanes), lanes = tiles.lanes;
  tiles.run(lanes * (ld + K) + product_scratch(tiles), [&](int64_t i, int64_t part, float* rows) {
    float* panels = rows + lanes * ld;
    for (int64_t r = 0; r < tiles.size(i); ++r) {
      const int64_t row = tiles.begin(i) + r;
      for (int64_t h = 0; h < H; ++h)
        std::memcpy(rows + r * ld + h * D,
                    floats(attended) + row / n * attended.stride(0) + h * attended.stride(1) +
                        row % n * attended.stride(2),
                    D * sizeof(float));
    }
    std::fill(rows + tiles.size(i) * ld, rows + lanes * ld, 0.0f);
    k.rows.panels(lanes, K, rows, ld, panels);
    add_products(tiles, i, part, newest, hidden, o_proj, panels, panels + lanes * K,
                 static_cast<float*>(out.data_ptr()));
  });
  return out;
}

Tensor swiglu_rows(Tensor hidden, Tensor norm, Tensor gate_proj, Tensor up_proj, Tensor down_proj,
                   int64_t newest, double eps) {
  STD_TORCH_CHECK(hidden.dim() == 3 && gate_proj.dim() == 2, "hidden must have 3 axes, gate_proj 2");
  const int64_t B = hidden.size(0), T = hidden.size(1), E = hidden.size(2), F = gate_proj.size(0);
  check_plain("hidden", hidden, {B, T, E}), check_plain("norm", norm, {E});
  check_plain("gate_proj", gate_proj, {F, E}), check_plain("up_proj", up_proj, {F, E});
  check_plain("down_proj", down_proj, {E, F});
  const Newest asked(T, newest);
  const auto& k = kernels();
  const Tiles tiles(B * newest);
  Tensor out = empty({B, newest, E}, hidden, ScalarType::Float);
  auto* to = static_cast<float*>(out.data_ptr());
  const int64_t ld = round_up(E, k.lanes), lanes = tiles.lanes, panel = tiles.panel();
  const int64_t inside = lanes * (ld + E) + BLOCK * lanes, act = lanes * F;
  // panels of F features, act, from the tile's tokens
  auto up = [&](int64_t i, int64_t part, float* rows, float* act) {
    float *panels = rows + lanes * ld, *products = panels + lanes * E;
    normed_panels(tiles, i, asked, hidden, norm, eps, rows, panels);
    const auto [first, last] = tiles.share(part, (F + BLOCK - 1) / BLOCK);
    for (int64_t f = first * BLOCK; f < std::min(F, last * BLOCK); f += BLOCK) {
      const int64_t wide = std::min(BLOCK, F - f);
      k.rows.products(wide, E, floats(gate_proj) + f * E, panels, lanes, act + f * panel, F * panel);
      k.rows.products(wide, E, floats(up_proj) + f * E, panels, lanes, products, wide * panel);
      for (int64_t p = 0; p < lanes / panel; ++p) {
        float* gate = act + p * F * panel + f * panel;
        k.step.gate(wide * panel, gate, products + p * wide * panel, gate);
      }
    }
  };
  if (tiles.parts == 1) {
    tiles.run(std::max(inside, product_scratch(tiles)) + act, [&](int64_t i, int64_t, float* own) {
      up(i, 0, own + act, own);
      add_products(tiles, i, 0, asked, hidden, down_proj, own, own + act, to);
    });
    return out;
  }
  Buffer all = buffer(tiles.count * act);
  tiles.run(inside, [&](int64_t i, int64_t part, float* own) {
    up(i, part, own, all.get() + i * act);
  });
  tiles.run(product_scratch(tiles), [&](int64_t i, int64_t part, float* own) {
    add_products(tiles, i, part, asked, hidden, down_proj, all.get() + i * act, own, to);
  });
  return out;
}

}  // namespace
}  // namespace memattn

STABLE_TORCH_LIBRARY_FRAGMENT(memattn_cpp, m) {
  m.def("project_rows(Tensor hidden, Tensor norm, Tensor q_proj, Tensor k_proj, Tensor v_proj, "
        "Tensor(a!) key, Tensor(b!) value, Tensor? cos, Tensor? sin, Tensor positions, int newest, "
        "float eps) -> Tensor");
  m.def("output_rows(Tensor hidden, Tensor attended, Tensor o_proj) -> Tensor");
  m.def("swiglu_rows(Tensor hidden, Tensor norm, Tensor gate_proj, Tensor up_proj, "
        "Tensor down_proj, int newest, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(memattn_cpp, CPU, m) {
  m.impl("project_rows", TORCH_BOX(&memattn::project_rows));
  m.impl("output_rows", TORCH_BOX(&memattn::output_rows));
  m.impl("swiglu_rows", TORCH_BOX(&memattn::swiglu_rows));
}
