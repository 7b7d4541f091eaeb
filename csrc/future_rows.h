// Which keys and rows of the table each query of future attention sees.
#pragma once

#include "sequences.h"

namespace memattn {

struct FutureBand {
  int64_t table_len;  // rows of the table that one document has
  bool by_distance;
  int64_t future_dim;
};

inline FutureRow future_row(const FutureArgs& a, int64_t i, const Document& doc,
                            const FutureBand& band) {
  FutureRow r{0, 0, 0, 0, 0, 0};
  if (i < doc.start || i >= doc.end) return r;
  const int64_t end = std::min(doc.end, a.S), position = i - doc.start;
  const int64_t lo = std::max<int64_t>(doc.start, 0), mid = std::min(i + 1, end);
  int64_t last = position + band.future_dim;  // the last position of the band
  if (!band.by_distance) last = std::min(last, band.table_len);
  if (lo < mid) r.lo = static_cast<int32_t>(lo), r.mid = r.hi = static_cast<int32_t>(mid);
  if (a.loss != FutureLoss::none && last > position && last < end - doc.start)
    r.hi = static_cast<int32_t>(doc.start + last + 1);

  const bool own_rows = band.table_len < a.R;
  const int64_t base = own_rows ? doc.number * band.table_len : 0;
  const int64_t first = band.by_distance ? 0 : position;
  const int64_t behind = band.by_distance ? band.future_dim : last;
  if (first < behind) {
    r.future_lo = static_cast<int32_t>(base + first);
    r.future_hi = static_cast<int32_t>(base + behind);
  }
  // rows by distance are seen without gaps, unless each document has its own
  r.table = static_cast<int32_t>(band.by_distance && !own_rows ? 0 : doc.number);
  return r;
}

// What every query sees; refuses anything that would read outside a tensor.
inline std::vector<FutureRow> future_rows(FutureArgs& a, const OptionalTensor& cu_seqlens,
                                          const OptionalTensor& seq_start,
                                          const OptionalTensor& seq_end, const FutureBand& band,
                                          int64_t query_offset) {
  STD_TORCH_CHECK(a.S < INT32_MAX && a.T < INT32_MAX && a.R < INT32_MAX,
                  "memattn_cpp takes lengths below 2^31");
  STD_TORCH_CHECK(query_offset >= 0 && query_offset < INT32_MAX,
                  "query_offset must be at least 0 and below 2^31, got ", query_offset);
  STD_TORCH_CHECK(band.future_dim >= 1, "future_dim must be at least 1, got ", band.future_dim);
  STD_TORCH_CHECK(band.table_len >= band.future_dim && band.table_len <= a.R,
                  "table_len must be at least future_dim=", band.future_dim,
                  " and at most the rows of future_key, ", a.R, ", got ", band.table_len);
  if (cu_seqlens) {
    const int64_t n = cu_seqlens->numel() - 1;
    STD_TORCH_CHECK(band.table_len == a.R || n * band.table_len <= a.R,
                    "future_key must have table_len=", band.table_len, " rows for each of ", n,
                    " documents, got ", a.R);
  }
  const auto samples = documents_of(a.B, cu_seqlens, seq_start, seq_end);
  std::vector<FutureRow> rows(samples.size() * a.T);
  for_each_token(samples, a.T, query_offset, [&](int64_t row, int64_t i, const Document& doc) {
    rows[row] = future_row(a, i, doc, band);
  });
  a.rows_stride = seq_start || seq_end ? a.T : 0;
  return rows;
}

}  // namespace memattn
