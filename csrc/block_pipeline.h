// Blocks of work in two steps, shared by all threads without waiting for each other between steps.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>

namespace memattn {

// The first step of a block fills one of a few buffers, item by item; the second takes what is in
// it, item by item, and each item must do so in the order of the blocks. Items are handed out one by
// one: the first step of a block, then the second step of the block before. So what an item needs
// was handed out well before it, and threads seldom wait for each other. Each item waits only for
// earlier ones, so one thread alone can run all of them.
class BlockPipeline {
 public:
  // `items` of first steps, so many a block; `second` items of second steps for each block
  BlockPipeline(int64_t items, int64_t block, int64_t second)
      : items(items), block(block), second(second), blocks((items + block - 1) / block),
        first_done(std::make_unique<Counter[]>(blocks)),
        second_done(std::make_unique<Counter[]>(blocks)) {}

  // Block b has buffer b % buffers(). Three: with two, the first step of a block would need the
  // second steps that have just been handed out.
  int64_t buffers() const { return std::min<int64_t>(blocks, 3); }

  // Runs first_step(b, i, thread's state) and second_step(b, i).
  template <class State, class First, class Second>
  void run(State make_state, First first_step, Second second_step) const {
    const int64_t round = block + second, steps = (blocks + 1) * round;
    const int64_t useful = blocks > 1 ? round : std::max(std::min(items, block), second);
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), useful);
    if (blocks == 0) return;
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        auto state = make_state();
        for (int64_t step; (step = next.fetch_add(1)) < steps;) {
          const int64_t b = step / round, i = step % round;
          if (i < block) {
            if (i >= first_items(b)) continue;
            if (b >= 3) wait(second_done[b - 3], second);
            first_step(b, i, state);
            first_done[b].fetch_add(1, std::memory_order_release);
          } else if (b > 0) {
            wait(first_done[b - 1], first_items(b - 1));
            if (b > 1) wait(second_done[b - 2], second);
            second_step(b - 1, i - block);
            second_done[b - 1].fetch_add(1, std::memory_order_release);
          }
        }
      }
    });
  }

 private:
  using Counter = std::atomic<int64_t>;

  int64_t first_items(int64_t b) const { return std::clamp<int64_t>(items - b * block, 0, block); }

  static void wait(const Counter& done, int64_t wanted) {
    constexpr int PATIENCE = 2000;  // about a millisecond: the thread waited for is not running
    for (int turns = 0; done.load(std::memory_order_acquire) < wanted; ++turns) {
      if (turns < PATIENCE) std::this_thread::yield();
      else std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

  int64_t items, block, second, blocks;
  std::unique_ptr<Counter[]> first_done, second_done;
};

}  // namespace memattn
