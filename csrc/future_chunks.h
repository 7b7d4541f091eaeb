// How the backward of future attention is divided between threads.
#pragma once

#include <numeric>

#include "tensors.h"

namespace memattn {

// Queries [t_begin, t_end) of key head (b, hkv), and the keys that they reach.
struct FutureUnit {
  int64_t b, hkv, t_begin, t_end;
  int64_t key_begin = 0, key_end = 0;
  Buffer sums;  // kept where other units add to the same keys
};

// Units that one thread takes in order, and the rows of the owner's table heads that they reach.
struct FutureChunk {
  int64_t owner;
  std::vector<FutureUnit> units;
  int64_t future_begin = 0, future_end = 0;
  Buffer sums;
};

// Who sums what: an owner has a run of query heads that contains all queries of its key heads and
// of its table heads, in one sequence or, where the table is shared, in all.
struct FutureOwners {
  int64_t tables;       // 1, or B where each sequence has its own table
  int64_t groups;       // of heads
  int64_t key_heads;    // of a group
  int64_t table_heads;  // of a group
  int64_t split;        // chunks of an owner

  FutureOwners(const FutureArgs& a, bool per_sequence) : tables(per_sequence ? a.B : 1) {
    const int64_t heads = std::lcm(a.H / a.Hkv, a.H / a.Hf);
    groups = a.H / heads, key_heads = heads / (a.H / a.Hkv), table_heads = heads / (a.H / a.Hf);
    // split further only where that leaves threads idle
    const int64_t threads = torch::stable::get_num_threads(), n = count();
    const bool even = !n || n >= 4 * threads || n % threads == 0;
    split = even ? 1 : std::min<int64_t>((2 * threads + n - 1) / n, 8);
  }
  int64_t count() const { return tables * groups; }
};

// Grows a chunk's and a unit's reach to what row r sees.
inline void future_reach(const FutureRow& r, bool with_target, FutureUnit& unit,
                         FutureChunk& chunk) {
  auto grow = [](int64_t lo, int64_t hi, int64_t& begin, int64_t& end) {
    if (lo >= hi) return;
    const bool none = begin >= end;
    begin = none ? lo : std::min(begin, lo), end = none ? hi : std::max(end, hi);
  };
  grow(r.lo, with_target ? r.hi : r.mid, unit.key_begin, unit.key_end);
  grow(r.future_lo, r.future_hi, chunk.future_begin, chunk.future_end);
}

// The work of one owner in `split` chunks of about equal size.
inline std::vector<FutureChunk> future_chunks(const FutureArgs& a, const FutureOwners& owners,
                                              int64_t owner) {
  const int64_t b0 = owners.tables == 1 ? 0 : owner / owners.groups;
  const int64_t b1 = owners.tables == 1 ? a.B : b0 + 1;
  const int64_t hkv0 = owner % owners.groups * owners.key_heads;
  const bool with_target = a.walks_target(true);
  auto cost = [&](const FutureRow& r) {
    return r.mid - r.lo + r.future_hi - r.future_lo + (with_target ? r.hi - r.mid : 0) + 1.0;
  };
  double work = 0, done = 0;
  for (int64_t b = b0; b < b1; ++b)
    for (int64_t t = 0; t < a.T; ++t)
      work += cost(a.rows[b * a.rows_stride + t]) * static_cast<double>(owners.key_heads);

  std::vector<FutureChunk> chunks(1);
  chunks[0].owner = owner;
  for (int64_t b = b0; b < b1; ++b)
    for (int64_t hkv = hkv0; hkv < hkv0 + owners.key_heads; ++hkv) {
      bool begins = true;
      for (int64_t t = 0; t < a.T; ++t) {
        const int64_t n = static_cast<int64_t>(chunks.size());
        const double due = work * static_cast<double>(n) / static_cast<double>(owners.split);
        if (n < owners.split && done >= due) {
          chunks.emplace_back();
          chunks.back().owner = owner, begins = true;
        }
        if (begins) chunks.back().units.push_back({b, hkv, t, t});
        begins = false;
        const FutureRow& row = a.rows[b * a.rows_stride + t];
        FutureUnit& unit = chunks.back().units.back();
        unit.t_end = t + 1;
        future_reach(row, with_target, unit, chunks.back());
        done += cost(row);
      }
      if (a.T == 0) chunks.back().units.push_back({b, hkv, 0, 0});
    }
  return chunks;
}

}  // namespace memattn
