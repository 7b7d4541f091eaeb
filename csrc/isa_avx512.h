// Vectors of AVX-512: sixteen floats.
#pragma once

#define MEMATTN_VL 16
#define MEMATTN_REGISTERS 32
#define MEMATTN_FMA(a, b, c) (vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c))
#define MEMATTN_MAX(a, b) (vf)_mm512_max_ps((__m512)(a), (__m512)(b))
#define MEMATTN_FMA1(a, b, c) __builtin_fmaf(a, b, c)
#define MEMATTN_AT_LEAST(a, b) \
  (uint32_t)_mm512_cmp_ps_mask((__m512)(a), (__m512)(b), _CMP_GE_OQ)
#define MEMATTN_F16C
