// Head of the files isa_*.cpp: what the tile kernels include, and how a file names its instructions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "kernels.h"

// MEMATTN_TARGET_BEGIN("avx2,fma") to MEMATTN_TARGET_END: functions between the two may use these
// instructions. After all headers, so that no function shared with other files gets them.
#define MEMATTN_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MEMATTN_TARGET_BEGIN(features) \
  MEMATTN_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define MEMATTN_TARGET_END MEMATTN_PRAGMA(clang attribute pop)
#else
#define MEMATTN_TARGET_BEGIN(features) \
  MEMATTN_PRAGMA(GCC push_options) MEMATTN_PRAGMA(GCC target(features))
#define MEMATTN_TARGET_END MEMATTN_PRAGMA(GCC pop_options)
#endif
