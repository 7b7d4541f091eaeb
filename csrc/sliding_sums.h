// Sums of key gradients in memory that slides along the keys, for an owner that visits its tiles of
// queries in order: rows that no later tile reaches are stored, and their memory is used again.
#pragma once

#include <cstring>

#include "gradient_sums.h"

namespace memattn {

// What the tiles of an owner reach of its keys, tile by tile.
struct Reach {
  int64_t begin, end;  // the first key of this and later tiles, the last of this and earlier ones
};

class SlidingSums {
 public:
  // Rows to hold so that no tile needs more; twice that, so that most tiles move nothing.
  static int64_t rows_for(const std::vector<Reach>& tiles) {
    int64_t most = 0, begin = INT64_MAX, end = 0;
    for (const Reach& r : tiles) {
      most = std::max(most, r.end - r.begin);
      begin = std::min(begin, r.begin), end = std::max(end, r.end);
    }
    return std::max<int64_t>(0, std::min(2 * most, end - begin));
  }

  SlidingSums(const KeyGradients& owner, int64_t head, const std::vector<Reach>& tiles,
              int64_t rows, float* memory)
      : gradients{owner.keys_of(head), owner.values_of(head)},
        keys(owner.rows),
        rows(rows),
        begin(tiles.empty() ? 0 : tiles[0].begin),
        sums{memory, owner.values(memory, rows)} {}

  // Makes room for the keys of a tile; the rows of key `first()` come first in the memory.
  void slide_to(const Reach& tile) {
    if (tile.end - begin <= rows) return;
    const int64_t next = std::min(tile.begin, begin + rows), left = rows - (next - begin);
    store(next);
    for (int i = 0; i < 2; ++i) {
      const int64_t ld = gradients[i].ld;
      if (left) std::memmove(sums[i], sums[i] + (next - begin) * ld, left * ld * sizeof(float));
      std::fill_n(sums[i] + left * ld, (rows - left) * ld, 0.0f);
    }
    begin = std::max(begin, tile.begin);
  }

  // Stores what is left; keys that no tile reached get 0.
  void finish() { store(keys); }

  int64_t first() const { return begin; }
  float* d_key() { return sums[0]; }
  float* d_value() { return sums[1]; }

 private:
  // stores the keys before `end` that are not stored yet
  void store(int64_t end) {
    const int64_t held = std::min(end, begin + rows);
    for (int i = 0; i < 2; ++i) {
      const GradientRows& g = gradients[i];
      store_sum(g.to, g.offset + stored * g.width, end - stored, g.width, g.ld, g.factor,
                {{sums[i], begin - stored, held - stored}});
    }
    stored = end;
  }

  GradientRows gradients[2];
  int64_t keys, rows, begin, stored = 0;
  float* sums[2];
};

}  // namespace memattn
