"""The first tokens of a sequence as one more source of keys, which its later queries see.

A tile of queries may hold several packed documents, whose first tokens lie far apart: it walks
those of one document after the other.
"""

import triton
import triton.language as tl

from memattn_kernels._common import NO_END
from memattn_kernels._tiles import attend, dq_source
from memattn_kernels.segmented_attention.intervals import sinks_of_query, tokens_of_query


@triton.jit
def attend_sinks(acc, l_i, m_i, q, k_ptr, v_ptr, stride_k, stride_v, i, start, end, S, L, W,
                 n_sinks, is_wanted, valid, scale, IS_CAUSAL: tl.constexpr,
                 HAS_DOCUMENTS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                 BLOCK_DV: tl.constexpr, cap_scale):  # fmt: skip
    """Add the sinks of each row to the running softmax, if ``is_wanted``."""
    lo, _ = tokens_of_query(i, start, end, S, L, W, n_sinks, IS_CAUSAL)
    lo, hi = sinks_of_query(lo, start, end, S, n_sinks)
    hi = tl.where(is_wanted, hi, lo)
    if HAS_DOCUMENTS:
        document = tl.min(tl.where(valid, start, NO_END))
        while document < NO_END:
            own_hi = tl.where(start == document, hi, lo)
            acc, l_i, m_i = attend(
                acc, l_i, m_i, q, k_ptr, v_ptr, stride_k, stride_v, lo, own_hi, valid, scale,
                D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, False, False, cap_scale,
            )  # fmt: skip
            document = tl.min(tl.where(valid & (start > document), start, NO_END))
    else:
        acc, l_i, m_i = attend(
            acc, l_i, m_i, q, k_ptr, v_ptr, stride_k, stride_v, lo, hi, valid, scale,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, False, False, cap_scale,
        )  # fmt: skip
    return acc, l_i, m_i


@triton.jit
def dq_sinks(dq, pk, rest, q, do, lse, residual, delta, k_ptr, v_ptr, stride_k, stride_v,
             i, start, end, S, L, W, n_sinks, valid, scale, IS_CAUSAL: tl.constexpr,
             HAS_DOCUMENTS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
             IS_CORRECTED: tl.constexpr, cap_scale):  # fmt: skip
    """Add the gradient of the queries from the sinks of each row."""
    lo, _ = tokens_of_query(i, start, end, S, L, W, n_sinks, IS_CAUSAL)
    lo, hi = sinks_of_query(lo, start, end, S, n_sinks)
    if HAS_DOCUMENTS:
        document = tl.min(tl.where(valid, start, NO_END))
        while document < NO_END:
            own_hi = tl.where(start == document, hi, lo)
            dq, pk, rest = dq_source(
                dq, pk, rest, q, do, lse, residual, delta, lse, lse, lse, k_ptr, v_ptr,
                stride_k, stride_v, lo, own_hi, valid, scale,
                D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, False, IS_CORRECTED, False, cap_scale,
            )  # fmt: skip
            document = tl.min(tl.where(valid & (start > document), start, NO_END))
    else:
        dq, pk, rest = dq_source(
            dq, pk, rest, q, do, lse, residual, delta, lse, lse, lse, k_ptr, v_ptr,
            stride_k, stride_v, lo, hi, valid, scale,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, False, IS_CORRECTED, False, cap_scale,
        )  # fmt: skip
    return dq, pk, rest
