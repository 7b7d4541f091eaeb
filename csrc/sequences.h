// Which sequence or packed document each token is in.
#pragma once

#include "tensors.h"

namespace memattn {

// One document or sequence: tokens [start, end), the how-many-th document it is.
struct Document {
  int64_t start, end, number;
};

// Documents of each sample, of one for all where samples are alike.
inline std::vector<std::vector<Document>> documents_of(int64_t B, const OptionalTensor& cu_seqlens,
                                                       const OptionalTensor& seq_start,
                                                       const OptionalTensor& seq_end) {
  check_bounds("seq_start", seq_start, B), check_bounds("seq_end", seq_end, B);
  const bool alike = !seq_start && !seq_end;
  std::vector<std::vector<Document>> samples(alike ? std::min<int64_t>(B, 1) : B);
  if (cu_seqlens) {
    check_bounds("cu_seqlens", cu_seqlens, cu_seqlens->numel());
    const auto bounds = int_values(*cu_seqlens);
    STD_TORCH_CHECK(bounds.size() >= 2, "cu_seqlens must have at least 2 entries, got ",
                    bounds.size());
    std::vector<Document> documents;
    for (size_t d = 0; d + 1 < bounds.size(); ++d) {
      STD_TORCH_CHECK(bounds[d] >= 0 && bounds[d] <= bounds[d + 1], "cu_seqlens must rise");
      documents.push_back({bounds[d], bounds[d + 1], static_cast<int64_t>(d)});
    }
    std::fill(samples.begin(), samples.end(), documents);
    return samples;
  }
  const auto starts = seq_start ? int_values(*seq_start) : std::vector<int64_t>(B, 0);
  const auto ends = seq_end ? int_values(*seq_end) : std::vector<int64_t>(B, INT32_MAX);
  for (size_t b = 0; b < samples.size(); ++b) samples[b] = {{starts[b], ends[b], 0}};
  return samples;
}

// Calls visit(row, i, document) for T tokens of each sample, from position `query_offset` on: row
// b * T + t is at i. Tokens before or behind all documents get the first or the last of them.
template <class Visit>
void for_each_token(const std::vector<std::vector<Document>>& samples, int64_t T,
                    int64_t query_offset, Visit visit) {
  for (size_t b = 0; b < samples.size(); ++b) {
    const std::vector<Document>& documents = samples[b];
    size_t d = 0;
    for (int64_t t = 0; t < T; ++t) {
      const int64_t i = t + query_offset;
      while (d + 1 < documents.size() && i >= documents[d].end) ++d;
      visit(static_cast<int64_t>(b) * T + t, i, documents[d]);
    }
  }
}

}  // namespace memattn
