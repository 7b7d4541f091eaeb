"""Query-stationary backward of task-masked attention: one program per tile of queries.

d_query = scale * dS K,  dS = P * (d_out V^T - rowsum(out * d_out) + d_lse)
"""

import triton
import triton.language as tl

from memattn_kernels._common import exponent_factor, load_tile, power, store_tile
from memattn_kernels._products import dot
from memattn_kernels.task_masked_attention.forward import (
    RUNTIME_SIZES,
    allowed_to_queries,
    load_seen_rows,
    steps_of_queries,
)
from memattn_kernels.task_masked_attention.tiles import (
    bounds_of_sequence,
    empty_rows_before,
    masked_step,
    query_bits,
    step_tile,
)


@triton.jit
def _dq_step(dq, pk, rest, q, do, lse, residual, delta, k_ptr, v_ptr, stride_k, stride_v, n_keys,
             tiles_ptr, step, is_partial, hi, bits, mask, queries, scale, D: tl.constexpr,
             DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
             BLOCK_DV: tl.constexpr, IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Add the keys of one step; ``scale`` and ``lse`` with ``exponent_factor``."""
    tile, n = step_tile(tiles_ptr, step, BLOCK_N)
    HAS_SLOTS: tl.constexpr = mask[1] is not None
    k = load_seen_rows(
        k_ptr, n, stride_k, n_keys, tile, is_partial, queries, mask,
        D, BLOCK_N, BLOCK_D, dq.shape[0], IS_CAUSAL, MASKED,
    )  # fmt: skip
    v = load_tile(v_ptr, n, stride_v, n_keys, DV, BLOCK_N, BLOCK_DV, MASKED)
    scores = dot(q, tl.trans(k))
    x = scores * scale - lse[:, None]
    if q.dtype == tl.float32:
        x -= residual[:, None]
    p = power(x, q.dtype)
    ds = dot(do, tl.trans(v)) - delta[:, None]
    if MASKED:
        allowed = allowed_to_queries(n, tile, is_partial, hi, bits, mask, BLOCK_N)
        p = tl.where(allowed, p, 0.0)
        ds = tl.where(p != 0.0, ds, 0.0)  # keys, values and delta that nobody sees may be NaN
    ds *= p
    if MASKED and not HAS_SLOTS:
        k = tl.where((tl.max(p, 0) > 0.0)[:, None], k, 0.0)
    dq = dot(ds.to(k.dtype), k, dq)
    if q.dtype == tl.float32:
        rest += tl.sum(ds, 1)
        pk = dot(p, k, pk)
    return dq, pk, rest


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def task_masked_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, task_ptr, seq_start_ptr, seq_end_ptr,  # inputs; bounds may be None
    bits_ptr, slots_ptr, query_node_ptr, key_node_ptr, tiles_ptr, counts_ptr,  # mask
    o_ptr, lse_ptr, residual_ptr, do_ptr, dlse_ptr,
    dq_ptr, scaled_lse_ptr, delta_ptr,  # outputs
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot,
    stride_dob, stride_doh, stride_dot, stride_dqb, stride_dqh, stride_dqt,
    H, G, HM, T, S, n_query_tiles, n_key_tiles, n_nodes, n_words, scale,  # sizes
    IS_CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(T, BLOCK_M) * B * H,). One program computes BLOCK_M rows of d_query.

    It also writes delta, and lse with ``exponent_factor`` in it, for the key-stationary kernel, and
    empties as many rows before the sequence.
    """
    n_tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    t = pid % n_tiles * BLOCK_M
    if IS_CAUSAL:  # the longest rows first
        t = (n_tiles - 1 - pid % n_tiles) * BLOCK_M
    b = (pid // n_tiles // H).to(tl.int64)
    h = (pid // n_tiles % H).to(tl.int64)

    # what each row sees
    start, n_queries, n_keys = bounds_of_sequence(b, seq_start_ptr, seq_end_ptr, T, S)
    mask_head = tl.load(task_ptr + b).to(tl.int64) * HM + h % HM
    hi, slot, steps = steps_of_queries(
        tiles_ptr, counts_ptr, mask_head, t, n_queries, n_keys, n_query_tiles, n_key_tiles,
        BLOCK_M, BLOCK_N, IS_CAUSAL,
    )  # fmt: skip
    tiles_ptr, before, whole_first, whole_last, full_last, partial, n_masked = steps
    i = t + tl.arange(0, BLOCK_M)
    bits = query_bits(query_node_ptr, t, T, BLOCK_M)

    end = start + n_queries
    q_ptr += b * stride_qb + h * stride_qh
    q = load_tile(q_ptr, start + t, stride_qt, end, D, BLOCK_M, BLOCK_D, True)
    o_ptr += b * stride_ob + h * stride_oh
    o = load_tile(o_ptr, start + t, stride_ot, end, DV, BLOCK_M, BLOCK_DV, True)
    do_ptr += b * stride_dob + h * stride_doh
    do = load_tile(do_ptr, start + t, stride_dot, end, DV, BLOCK_M, BLOCK_DV, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    row = (b * H + h) * T + start + i
    mask_m = start + i < T
    dlse = tl.zeros([BLOCK_M], dtype=tl.float32)
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + row, mask=mask_m, other=0.0)
    if q.dtype != tl.float32:
        delta -= dlse
        tl.store(delta_ptr + row, delta, mask=mask_m)
    lse = tl.load(lse_ptr + row, mask=mask_m, other=0.0) * exponent_factor(q.dtype)
    lse = tl.where(lse > -float("inf"), lse, float("inf"))  # no keys: all weights 0
    tl.store(scaled_lse_ptr + row, lse, mask=mask_m)
    residual = lse
    if q.dtype == tl.float32:
        residual = tl.load(residual_ptr + row, mask=mask_m, other=0.0)
    exponent_scale = scale * exponent_factor(q.dtype)
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # float32 results show the rounding of out and lse in delta, most where dS cancels (a row with
    # one key): there dS without d_lse must sum to 0, so the rest of that sum corrects delta, and
    # pk = P K corrects d_query
    pk = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    rest = tl.zeros([BLOCK_M], dtype=tl.float32)

    k_ptr += b * stride_kb + h // G * stride_kh + start.to(tl.int64) * stride_kt
    v_ptr += b * stride_vb + h // G * stride_vh + start.to(tl.int64) * stride_vt
    mask = (bits_ptr + mask_head * n_nodes * n_words, slots_ptr, slot, key_node_ptr, S, n_words)
    for index in range(n_masked):
        step, is_partial = masked_step(index, before, whole_first, whole_last, full_last, partial)
        dq, pk, rest = _dq_step(
            dq, pk, rest, q, do, lse, residual, delta, k_ptr, v_ptr, stride_kt, stride_vt, n_keys,
            tiles_ptr, step, is_partial, hi, bits, mask, (t, n_queries), exponent_scale,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, IS_CAUSAL, True,
        )  # fmt: skip
    for index in range(whole_last - whole_first):
        dq, pk, rest = _dq_step(
            dq, pk, rest, q, do, lse, residual, delta, k_ptr, v_ptr, stride_kt, stride_vt, n_keys,
            tiles_ptr, whole_first + index, False, hi, bits, mask, (t, n_queries), exponent_scale,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, IS_CAUSAL, False,
        )  # fmt: skip

    if q.dtype == tl.float32:
        dq += (dlse - rest)[:, None] * pk
        tl.store(delta_ptr + row, delta + rest, mask=mask_m)
    # a row without keys, and its NaN, ends here
    valid = (i < n_queries) & (lse < float("inf"))
    dq = tl.where(valid[:, None], dq * scale, 0.0)
    dq_ptr += b * stride_dqb + h * stride_dqh
    store_tile(dq_ptr, start + t, stride_dqt, T, dq, D, BLOCK_M, BLOCK_D)
    if seq_start_ptr is not None:
        empty_rows_before(dq_ptr, t, stride_dqt, tl.minimum(start, T), D, BLOCK_M, BLOCK_D)
