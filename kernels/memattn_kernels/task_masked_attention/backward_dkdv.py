"""Key-stationary backward of task-masked attention: one program per tile of keys.

    d_key = scale * dS^T Q,  d_value = P^T d_out

summed over the queries that see the key, of all query heads of its group.
"""

import triton
import triton.language as tl

from memattn_kernels._common import NO_END, exponent_factor, load_tile, power, store_tile
from memattn_kernels._products import dot
from memattn_kernels.task_masked_attention.forward import RUNTIME_SIZES
from memattn_kernels.task_masked_attention.tiles import (
    TILE,
    bounds_of_sequence,
    empty_rows_before,
    key_bits,
    listed_steps,
    load_allowed,
    load_rows,
    masked_step,
    query_bits,
    step_tile,
)


@triton.jit
def _dkdv_step(dk, dv, k, v, q_ptr, do_ptr, lse_ptr, residual_ptr, delta_ptr, dlse_ptr,
               stride_q, stride_do, n_queries, tiles_ptr, step, is_partial, lo, bits, mask,
               scale, D: tl.constexpr, DV: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
               MASKED: tl.constexpr):  # fmt: skip
    """Add the queries of one step; scores are transposed: keys by queries.

    ``lse`` and ``scale`` have ``exponent_factor`` in them.
    """
    tile, t = step_tile(tiles_ptr, step, BLOCK_M)
    columns = tl.arange(0, BLOCK_M)
    i = t + columns
    # padded by a tile, so no mask; pointer plus scalar first, which leaves one address for a thread
    lse = tl.load(lse_ptr + t + columns)
    delta = tl.load(delta_ptr + t + columns)
    if MASKED:  # a query without keys may be NaN
        sees = (i < n_queries) & (lse < float("inf"))
        q = load_rows(q_ptr, t, stride_q, sees, D, BLOCK_M, BLOCK_D)
    else:
        q = load_tile(q_ptr, t, stride_q, n_queries, D, BLOCK_M, BLOCK_D, False)
    do = load_tile(do_ptr, t, stride_do, n_queries, DV, BLOCK_M, BLOCK_DV, MASKED)

    scores = dot(k, tl.trans(q))
    x = scores * scale - lse[None, :]
    if q.dtype == tl.float32:
        x -= tl.load(residual_ptr + t + columns, mask=i < n_queries, other=0.0)[None, :]
    p = power(x, q.dtype)
    if MASKED:
        bits_ptr, slots_ptr, slot, n_key_tiles, query_node_ptr, T = mask
        row, offsets = bits
        word, words, bit = query_bits(query_node_ptr, t, T, BLOCK_M)
        allowed = load_allowed(
            bits_ptr, slots_ptr, slot + tl.cast(tile, tl.int64) * n_key_tiles, row + word,
            offsets[:, None] + words[None, :], bit[None, :], is_partial,
        )  # fmt: skip
        allowed &= (i[None, :] >= lo[:, None]) & (i < n_queries)[None, :]
        p = tl.where(allowed, p, 0.0)
    dv = dot(p.to(do.dtype), do, dv)
    ds = dot(v, tl.trans(do)) - delta[None, :]
    if q.dtype == tl.float32 and dlse_ptr is not None:
        ds += tl.load(dlse_ptr + t + columns, mask=i < n_queries, other=0.0)[None, :]
    if MASKED:
        ds = tl.where(p != 0.0, ds, 0.0)  # values and delta that nobody sees may be NaN
    ds *= p
    dk = dot(ds.to(q.dtype), q, dk)
    return dk, dv


# with one query head for each key head, a constant G, ptxas would wait after each matrix product
@triton.jit(do_not_specialize=(*RUNTIME_SIZES, "G"))
def task_masked_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, task_ptr, seq_start_ptr, seq_end_ptr,  # inputs; bounds may be None
    bits_ptr, slots_ptr, query_node_ptr, key_node_ptr, tiles_ptr, counts_ptr,  # mask
    residual_ptr, do_ptr, dlse_ptr, scaled_lse_ptr, delta_ptr,
    dk_ptr, dv_ptr,  # outputs
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_dob, stride_doh, stride_dot,
    stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    H, G, HM, T, S, n_query_tiles, n_key_tiles, n_nodes, n_words, scale,  # sizes
    IS_CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(S, BLOCK_N) * B * Hkv,). One program owns BLOCK_N keys.

    It also empties as many rows before the sequence.
    """
    n_tiles = tl.cdiv(S, BLOCK_N)
    pid = tl.program_id(0)
    n = pid % n_tiles * BLOCK_N
    H_kv = H // G
    b = (pid // n_tiles // H_kv).to(tl.int64)
    h_kv = (pid // n_tiles % H_kv).to(tl.int64)

    start, n_queries, n_keys = bounds_of_sequence(b, seq_start_ptr, seq_end_ptr, T, S)
    task = tl.load(task_ptr + b).to(tl.int64)
    j = n + tl.arange(0, BLOCK_N)
    bits = key_bits(key_node_ptr, n, S, n_words, BLOCK_N)
    # queries in reach, and those that see all keys of the tile if it is full
    first = 0
    whole_first = 0
    lo = 0 * j
    if IS_CAUSAL:
        lo = j
        first = n
        whole_first = n + BLOCK_N - 1
    last = tl.where(n < n_keys, n_queries, 0)
    lo = tl.where(j < n_keys, lo, NO_END)

    end = start + n_keys
    k_ptr += b * stride_kb + h_kv * stride_kh
    k = load_tile(k_ptr, start + n, stride_kt, end, D, BLOCK_N, BLOCK_D, True)
    v_ptr += b * stride_vb + h_kv * stride_vh
    v = load_tile(v_ptr, start + n, stride_vt, end, DV, BLOCK_N, BLOCK_DV, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)

    exponent_scale = scale * exponent_factor(k.dtype)
    for g in range(G):
        h = h_kv * G + g
        mask_head = task * HM + h % HM
        head_tiles_ptr, before, begin, whole_last, full_last, partial, n_masked = listed_steps(
            tiles_ptr, counts_ptr, mask_head * n_key_tiles + n // TILE, n_query_tiles,
            first, whole_first, last, last, BLOCK_M, IS_CAUSAL,
        )  # fmt: skip
        mask = (
            bits_ptr + mask_head * n_nodes * n_words, slots_ptr,
            mask_head * n_query_tiles * n_key_tiles + n // TILE, n_key_tiles, query_node_ptr, T,
        )  # fmt: skip
        head_q_ptr = q_ptr + b * stride_qb + h * stride_qh + start.to(tl.int64) * stride_qt
        head_do_ptr = do_ptr + b * stride_dob + h * stride_doh + start.to(tl.int64) * stride_dot
        at = (b * H + h) * T + start
        head_residual_ptr = scaled_lse_ptr
        if k.dtype == tl.float32:
            head_residual_ptr = residual_ptr + at
        head_dlse_ptr = dlse_ptr
        if dlse_ptr is not None:
            head_dlse_ptr = dlse_ptr + at
        for index in range(n_masked):
            step, is_partial = masked_step(index, before, begin, whole_last, full_last, partial)
            dk, dv = _dkdv_step(
                dk, dv, k, v, head_q_ptr, head_do_ptr, scaled_lse_ptr + at, head_residual_ptr,
                delta_ptr + at, head_dlse_ptr, stride_qt, stride_dot, n_queries, head_tiles_ptr,
                step, is_partial, lo, bits, mask, exponent_scale,
                D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, True,
            )  # fmt: skip
        for index in range(whole_last - begin):
            dk, dv = _dkdv_step(
                dk, dv, k, v, head_q_ptr, head_do_ptr, scaled_lse_ptr + at, head_residual_ptr,
                delta_ptr + at, head_dlse_ptr, stride_qt, stride_dot, n_queries, head_tiles_ptr,
                begin + index, False, lo, bits, mask, exponent_scale,
                D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, False,
            )  # fmt: skip

    # a key past the end ends here
    valid = (j < n_keys)[:, None]
    dk = tl.where(valid, dk * scale, 0.0)
    dv = tl.where(valid, dv, 0.0)
    dk_ptr += b * stride_dkb + h_kv * stride_dkh
    store_tile(dk_ptr, start + n, stride_dkt, S, dk, D, BLOCK_N, BLOCK_D)
    dv_ptr += b * stride_dvb + h_kv * stride_dvh
    store_tile(dv_ptr, start + n, stride_dvt, S, dv, DV, BLOCK_N, BLOCK_DV)
    if seq_start_ptr is not None:
        empty_rows_before(dk_ptr, n, stride_dkt, tl.minimum(start, S), D, BLOCK_N, BLOCK_D)
        empty_rows_before(dv_ptr, n, stride_dvt, tl.minimum(start, S), DV, BLOCK_N, BLOCK_DV)
