// Which slots selected each chapter, sorted once for forward and backward.
#pragma once

#include "tensors.h"

namespace memattn {

// The routing rows of a call: the slots of each and the queries that it is for.
struct RoutingRows {
  int64_t B, N, K, T;
  const int32_t* indices;             // [B, N, K], -1 is empty
  const float* weights;               // [B, N, K] or null
  const int32_t *row_start, *row_end;  // [B, N]
  bool is_joint;

  // whether slot s of a row holds a chapter; one without weight is empty where chapters share a softmax
  bool holds(int64_t row, int64_t s, int64_t C) const {
    const int64_t i = row * K + s;
    return indices[i] >= 0 && indices[i] < C && !(weights && is_joint && weights[i] <= 0.0f);
  }
};

// The chapters' lists, as one int32 tensor: where the list of each chapter begins, [C + 1]; whether a
// row has a chapter in several slots; and the slots of all lists, each rising: for every row that
// selected the chapter the first slot that holds it, row * K + s.
class ChapterIndex {
 public:
  const int32_t *begin, *entries;
  bool has_repeats;

  ChapterIndex(const Tensor& index, int64_t C) {
    const auto* data = static_cast<const int32_t*>(index.data_ptr());
    begin = data, has_repeats = data[C + 1] != 0, entries = data + C + 2;
  }

  static Tensor make(const RoutingRows& rows, int64_t C, const Tensor& like) {
    const int64_t n_rows = rows.B * rows.N, size = C + 2 + n_rows * rows.K;
    STD_TORCH_CHECK(size < INT32_MAX, "memattn_cpp takes less than 2^31 slots");
    Tensor index = empty({size}, like, ScalarType::Int);
    auto* data = static_cast<int32_t*>(index.data_ptr());
    std::fill_n(data, size, 0);
    int32_t *counts = data + 1, *entries = data + C + 2;
    std::vector<int32_t> last_row(C);
    // calls visit(chapter, slot) once for each row and chapter; repeats are merged
    auto for_each = [&](auto visit) {
      std::fill(last_row.begin(), last_row.end(), -1);
      for (int64_t row = 0; row < n_rows; ++row) {
        if (rows.row_start[row] >= rows.row_end[row]) continue;
        for (int64_t s = 0; s < rows.K; ++s) {
          if (!rows.holds(row, s, C)) continue;
          const int32_t c = rows.indices[row * rows.K + s];
          if (last_row[c] == row) {
            data[C + 1] = 1;
            continue;
          }
          last_row[c] = static_cast<int32_t>(row);
          visit(c, static_cast<int32_t>(row * rows.K + s));
        }
      }
    };
    for_each([&](int32_t c, int32_t) { ++counts[c]; });
    for (int64_t c = 0; c < C; ++c) data[c + 1] += data[c];
    std::vector<int32_t> next(data, data + C);
    for_each([&](int32_t c, int32_t slot) { entries[next[c]++] = slot; });
    return index;
  }

  // The class of each row by the number of its keys.
  std::vector<uint8_t> row_classes(int64_t n_rows, int64_t K, int64_t C, int64_t M,
                                   uint32_t& present) const {
    std::vector<int32_t> chapters(n_rows);
    for (int32_t e = 0; e < begin[C]; ++e) ++chapters[entries[e] / K];
    std::vector<uint8_t> classes(n_rows);
    present = 0;
    for (int64_t row = 0; row < n_rows; ++row) {
      if (!chapters[row]) continue;
      while (chapters[row] * M > ROW_CLASS_KEYS[classes[row]]) ++classes[row];
      present |= uint32_t{1} << classes[row];
    }
    return classes;
  }
};

}  // namespace memattn
