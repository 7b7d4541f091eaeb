// What decoding hands to the kernels of one more token or of many, and the tables of these.
#pragma once

#include <cstdint>

namespace memattn {

// One more token of each sequence in a layer, float32; see decoder_step.cpp.
struct StepAttention {
  int64_t H, Hkv, S, D, Dv, P, R;
  int64_t ahead;  // rows of the table that a query sees, at most
  double scale;
  const float *key, *value;  // [B, Hkv, S, D], the new token the last
  int64_t key_stride[3], value_stride[3];
  const float *persistent_key, *persistent_value;  // [Hkv, P, D]
  const float *table_key, *table_value;            // [H, R, D], a row for each position from 1 on
  const float *cos, *sin;                          // [positions, D / 2], or null
};

// What the new token of a sequence sees: keys [lo, hi), persistent ones, rows of the table.
struct StepRange {
  bool sees;
  int64_t lo, hi, ahead_begin, ahead_end;
};

struct StepKernels {
  // floats of scratch for attend
  int64_t (*scratch)(const StepAttention&);
  void (*attend)(const StepAttention&, int64_t b, int64_t h, const StepRange&, const float* query,
                 float* scratch, float* out);
  // to[m] = <row m of W, x>; x and `to` are padded to lanes, x with zeros
  void (*products)(int64_t M, int64_t K, const float* W, int64_t ld, const float* x, float* to);
  void (*norm)(int64_t E, const float* x, const float* weight, float eps, float* out);
  void (*rotate)(int64_t D, const float* x, const float* cos, const float* sin, float* out);
  void (*gate)(int64_t n, const float* gate, const float* up, float* to);
};

struct RowKernels {
  // rows [lanes][ld] to panels [K][lanes of a panel], and panels to rows; ld is a multiple of lanes
  void (*panels)(int64_t lanes, int64_t K, const float* rows, int64_t ld, float* panels);
  void (*rows)(int64_t lanes, int64_t K, const float* panels, float* rows, int64_t ld);
  // panels `to` [M], one every to_stride floats, of the products of W [M, K] with panels `from` [K]
  void (*products)(int64_t M, int64_t K, const float* W, const float* from, int64_t lanes, float* to,
                   int64_t to_stride);
};

}  // namespace memattn
