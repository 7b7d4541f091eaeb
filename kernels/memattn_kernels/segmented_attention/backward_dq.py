"""Query-stationary backward of segmented attention: one program per tile of queries.

d_query = scale * dS K,  dS = P * (d_out V^T - rowsum(out * d_out) + d_lse)
"""

import triton
import triton.language as tl

from memattn_kernels._common import (
    exponent_factor,
    load_tile,
    score_scale,
    sequence_of,
    store_tile,
)
from memattn_kernels._tiles import dq_source
from memattn_kernels.segmented_attention.forward import RUNTIME_SIZES
from memattn_kernels.segmented_attention.intervals import (
    memory_of_query,
    tokens_of_query,
)
from memattn_kernels.segmented_attention.sinks import dq_sinks


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def segmented_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, mk_ptr, mv_ptr, o_ptr, lse_ptr, residual_ptr,
    do_ptr, dlse_ptr,
    documents_ptr, seq_start_ptr, seq_end_ptr,  # bounds of sequences, or None
    dq_ptr, scaled_lse_ptr, delta_ptr,  # outputs
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_pkh, stride_pkt, stride_pvh, stride_pvt,
    stride_mkb, stride_mkh, stride_mkt, stride_mvb, stride_mvh, stride_mvt,
    stride_ob, stride_oh, stride_ot, stride_dob, stride_doh, stride_dot,
    stride_dqb, stride_dqh, stride_dqt,
    H, G, T, S, P, M, n_memory, L, W, n_sinks, query_offset, scale, softcap,  # sizes
    IS_CAUSAL: tl.constexpr, MEMORY_IS_CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_NP: tl.constexpr,
    BLOCK_NM: tl.constexpr, BLOCK_NS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(T, BLOCK_M) * B * H,). One program computes BLOCK_M rows of d_query.

    It also writes delta, and lse with ``exponent_factor`` in it, for the key-stationary kernel.
    """
    n_tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    pid_m = pid % n_tiles
    if IS_CAUSAL:  # the longest rows first
        pid_m = n_tiles - 1 - pid_m
    b = (pid // n_tiles // H).to(tl.int64)
    h = (pid // n_tiles % H).to(tl.int64)
    h_kv = h // G

    t = pid_m * BLOCK_M
    offs_m = t + tl.arange(0, BLOCK_M)
    mask_m = offs_m < T
    i = query_offset + offs_m
    start, end, first_segment = sequence_of(i, b, documents_ptr, seq_start_ptr, seq_end_ptr, S)
    valid = mask_m & (i >= start) & (i < end)

    q_ptr += b * stride_qb + h * stride_qh
    q = load_tile(q_ptr, t, stride_qt, T, D, BLOCK_M, BLOCK_D, True)
    o_ptr += b * stride_ob + h * stride_oh
    o = load_tile(o_ptr, t, stride_ot, T, DV, BLOCK_M, BLOCK_DV, True)
    do_ptr += b * stride_dob + h * stride_doh
    do = load_tile(do_ptr, t, stride_dot, T, DV, BLOCK_M, BLOCK_DV, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    row = (b * H + h) * T + offs_m
    IS_CORRECTED: tl.constexpr = q.dtype == tl.float32
    if not IS_CORRECTED:
        if dlse_ptr is not None:
            delta -= tl.load(dlse_ptr + row, mask=mask_m, other=0.0)
        tl.store(delta_ptr + row, delta, mask=mask_m)
    lse = tl.load(lse_ptr + row, mask=mask_m, other=0.0) * exponent_factor(q.dtype)
    lse = tl.where(lse > -float("inf"), lse, float("inf"))  # no keys: all weights 0
    tl.store(scaled_lse_ptr + row, lse, mask=mask_m)
    residual = lse
    if IS_CORRECTED:
        residual = tl.load(residual_ptr + row, mask=mask_m, other=0.0)
    cap_scale = softcap
    if softcap is not None:
        cap_scale = scale / softcap
    exponent_scale = score_scale(scale, softcap, q.dtype)
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # float32 results show the rounding of out and lse in delta, most where dS cancels (a row with
    # one key): there dS without d_lse must sum to 0, so the rest of that sum corrects delta, and
    # pk = P K corrects d_query
    pk = tl.zeros([BLOCK_D, BLOCK_M], dtype=tl.float32)
    rest = tl.zeros([BLOCK_M], dtype=tl.float32)

    if pk_ptr is not None:
        lo = tl.zeros([BLOCK_M], dtype=tl.int32)
        dq, pk, rest = dq_source(
            dq, pk, rest, q, do, lse, residual, delta, lse, lse, lse, pk_ptr + h_kv * stride_pkh,
            pv_ptr + h_kv * stride_pvh, stride_pkt, stride_pvt, lo, lo + P, valid, exponent_scale,
            D, DV, BLOCK_NP, BLOCK_D, BLOCK_DV, False, IS_CORRECTED, False, cap_scale,
        )  # fmt: skip
    if mk_ptr is not None:
        lo, hi = memory_of_query(i, start, first_segment, n_memory, L, M, MEMORY_IS_CAUSAL)
        dq, pk, rest = dq_source(
            dq, pk, rest, q, do, lse, residual, delta, lse, lse, lse,
            mk_ptr + b * stride_mkb + h_kv * stride_mkh,
            mv_ptr + b * stride_mvb + h_kv * stride_mvh, stride_mkt, stride_mvt, lo, hi, valid,
            exponent_scale, D, DV, BLOCK_NM, BLOCK_D, BLOCK_DV, False, IS_CORRECTED, False,
            cap_scale,
        )  # fmt: skip
    if n_sinks is not None:
        dq, pk, rest = dq_sinks(
            dq, pk, rest, q, do, lse, residual, delta, k_ptr + b * stride_kb + h_kv * stride_kh,
            v_ptr + b * stride_vb + h_kv * stride_vh, stride_kt, stride_vt, i, start, end, S, L, W,
            n_sinks, valid, exponent_scale, IS_CAUSAL, documents_ptr is not None,
            D, DV, BLOCK_NS, BLOCK_D, BLOCK_DV, IS_CORRECTED, cap_scale,
        )  # fmt: skip
    lo, hi = tokens_of_query(i, start, end, S, L, W, n_sinks, IS_CAUSAL)
    dq, pk, rest = dq_source(
        dq, pk, rest, q, do, lse, residual, delta, lse, lse, lse,
        k_ptr + b * stride_kb + h_kv * stride_kh, v_ptr + b * stride_vb + h_kv * stride_vh,
        stride_kt, stride_vt, lo, hi, valid, exponent_scale,
        D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, False, IS_CORRECTED, True, cap_scale,
    )  # fmt: skip

    if IS_CORRECTED:
        tl.store(delta_ptr + row, delta + rest, mask=mask_m)
        if dlse_ptr is not None:
            rest -= tl.load(dlse_ptr + row, mask=mask_m, other=0.0)
        dq -= rest[:, None] * tl.trans(pk)
    # a row without keys, and its NaN, ends here
    valid &= lse < float("inf")
    dq = tl.where(valid[:, None], dq * scale, 0.0)
    dq_ptr += b * stride_dqb + h * stride_dqh
    store_tile(dq_ptr, t, stride_dqt, T, dq, D, BLOCK_M, BLOCK_D)
