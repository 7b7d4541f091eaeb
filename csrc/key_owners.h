// The gradients of keys, one owner for each key head: it goes through the tiles of the queries that
// see its keys, in order, alone or in chunks that add up theirs at last.
#pragma once

#include "sliding_sums.h"
#include "tensors.h"

namespace memattn {

// Some queries [begin, end) of one owner, and their sums until its last chunk is done.
struct KeyChunk {
  int64_t owner, begin, end;
  int64_t key_begin = 0, key_end = 0;
  Buffer sums;
};

// Chunks of the queries of a key head, at most `most`, where one owner for each head would leave
// threads idle. Whatever the batch: a sequence alone gives the same bits.
inline int64_t chunks_of_head(int64_t key_heads, int64_t most) {
  const int64_t threads = torch::stable::get_num_threads();
  if (key_heads >= 4 * threads || key_heads % threads == 0) return 1;
  return std::min({(2 * threads + key_heads - 1) / key_heads, std::max<int64_t>(most, 1), int64_t{8}});
}

// What tiles reach, in their order; reach(tile) is what one does, [keys, 0) for none.
template <class ReachOf>
std::vector<Reach> reaches(const std::vector<Tile>& tiles, int64_t keys, ReachOf reach) {
  std::vector<Reach> found;
  int64_t end = 0, begin = keys;
  for (const Tile& tile : tiles) {
    found.push_back(reach(tile));
    end = found.back().end = std::max(end, found.back().end);
  }
  for (size_t i = tiles.size(); i-- > 0;) begin = found[i].begin = std::min(begin, found[i].begin);
  return found;
}

// Calls backward(tile, sums, scratch) for the tiles of all chunks, and stores the gradients of all
// `owners`. Chunks come owner by owner, at least one for each.
template <class TilesOf, class ReachOf, class Backward>
void run_owners(const KeyGradients& gradients, std::vector<KeyChunk>& chunks, int64_t owners,
                int64_t scratch_floats, TilesOf tiles_of, ReachOf reach_of, Backward backward) {
  std::vector<size_t> first_chunk;
  for (size_t c = 0; c < chunks.size(); ++c)
    if (c == 0 || chunks[c].owner != chunks[c - 1].owner) first_chunk.push_back(c);
  first_chunk.push_back(chunks.size());
  std::vector<std::atomic<int64_t>> done(owners);

  auto store_chunks = [&](int64_t owner) {
    std::vector<Part> parts;
    for (size_t c = first_chunk[owner]; c < first_chunk[owner + 1]; ++c)
      parts.push_back({chunks[c].sums.get(), chunks[c].key_begin, chunks[c].key_end});
    gradients.store(owner, parts);
    for (size_t c = first_chunk[owner]; c < first_chunk[owner + 1]; ++c) chunks[c].sums.reset();
  };

  // an owner that is not split stores its sums at once, so its thread uses their memory again
  struct State {
    Buffer scratch, sums;
    int64_t floats = 0;
  };
  parallel_work(
      chunks.size(), [&] { return State{buffer(scratch_floats), nullptr}; },
      [&](int64_t i, State& state) {
        KeyChunk& c = chunks[i];
        const size_t parts = first_chunk[c.owner + 1] - first_chunk[c.owner];
        const std::vector<Tile> tiles = tiles_of(c);
        const std::vector<Reach> reach = reaches(tiles, gradients.rows, reach_of);
        if (!tiles.empty() && reach[0].begin < reach.back().end)
          c.key_begin = reach[0].begin, c.key_end = reach.back().end;
        if (parts == 1 && gradients.in_place()) {
          const KeyGrads grads{gradients.key_sums(c.owner), gradients.value_sums(c.owner), 0};
          gradients.clear(c.owner);
          for (const Tile& tile : tiles) backward(tile, grads, state.scratch.get());
          gradients.scale(c.owner, c.key_begin, c.key_end);
          return;
        }
        const int64_t keys = parts > 1 ? c.key_end - c.key_begin : SlidingSums::rows_for(reach);
        const int64_t floats = gradients.floats(keys);
        if (!state.sums || state.floats < floats)
          state.sums = buffer(floats), state.floats = floats;
        std::fill_n(state.sums.get(), floats, 0.0f);
        if (parts > 1) {
          c.sums = std::move(state.sums);
          const KeyGrads grads{c.sums.get(), gradients.values(c.sums.get(), keys), c.key_begin};
          for (const Tile& tile : tiles) backward(tile, grads, state.scratch.get());
          if (done[c.owner].fetch_add(1) + 1 == static_cast<int64_t>(parts)) store_chunks(c.owner);
          return;
        }
        SlidingSums sliding(gradients, c.owner, reach, keys, state.sums.get());
        for (size_t n = 0; n < tiles.size(); ++n) {
          sliding.slide_to(reach[n]);
          const KeyGrads grads{sliding.d_key(), sliding.d_value(), sliding.first()};
          backward(tiles[n], grads, state.scratch.get());
        }
        sliding.finish();
      });
}

}  // namespace memattn
