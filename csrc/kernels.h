// What the operators hand to the tile kernels, and the table of kernels of one instruction set.
//
// Plain structs only: every translation unit sees them, whatever instructions it is compiled for.
#pragma once

#include <cstdint>

namespace memattn {

enum class Dtype : int { float32, float16, bfloat16 };

// A tensor of up to five axes; strides count elements.
struct View {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t stride[5] = {0, 0, 0, 0, 0};
};

// What the queries of one sequence may see. Row t sees the token keys [lo, hi), the first
// `persistent` persistent keys, and the first `memory` memory keys of segment `segment`.
struct RowRange {
  int32_t lo, hi;
  int32_t persistent;
  int32_t segment, memory;
};

struct SegmentedArgs {
  int64_t B, H, Hkv, T, S, D, Dv, P, M;
  double scale;
  View query, key, value, out;       // [B, H or Hkv, T or S, D or Dv]
  View persistent_key, persistent_value;  // [Hkv, P, D or Dv]
  View memory_key, memory_value;     // [B, Hkv, n_segments, M, D or Dv]
  float* lse;                        // [B, H, T]
  float* lse_low;                    // [B, H, T], what float32 lost of lse
  const RowRange* rows;              // [B or 1, T]
  int64_t rows_stride;               // T, or 0 where all sequences are alike
  // backward only
  View d_out, d_query;               // [B, H, T, Dv or D]
  const float* d_lse;                // [B, H, T]
};

// Float32 sums of the gradients of one (sequence, key head, chunk of queries).
struct SegmentedGrads {
  float* d_key;    // [key_end - key_begin, D rounded up to lanes]
  float* d_value;  // [key_end - key_begin, Dv rounded up to lanes]
  int64_t key_begin;
  float* d_persistent_key;    // [P, ...]
  float* d_persistent_value;
  float* d_memory_key;    // [(segment_end - segment_begin) * M, ...]
  float* d_memory_value;
  int64_t segment_begin;
};

// The queries of one tile: rows [t0, t1) of heads [h0, h1), all of one key head.
struct Tile {
  int64_t b, hkv, h0, h1, t0, t1;
};

struct Kernels {
  const char* name;
  int64_t lanes;      // gradient rows are padded to a multiple of this
  int64_t tile_rows;  // most query rows of a tile
  // floats of scratch that one thread needs
  int64_t (*forward_scratch)(const SegmentedArgs&);
  int64_t (*backward_scratch)(const SegmentedArgs&);
  void (*segmented_forward)(const SegmentedArgs&, const Tile&, float* scratch);
  void (*segmented_backward)(const SegmentedArgs&, const Tile&, const SegmentedGrads&, float* scratch);
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

// The widest kernels that this processor runs.
const Kernels& kernels();

}  // namespace memattn
