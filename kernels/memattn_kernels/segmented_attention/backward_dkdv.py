"""Key-stationary backward of segmented attention: one program per tile of keys of one source.

    d_key = scale * dS^T Q,  d_value = P^T d_out

summed over the queries that see the key, of all query heads of its group.
"""

import triton
import triton.language as tl

from memattn_kernels._common import (
    NO_END,
    cap_products,
    load_tile,
    n_partial_tiles,
    partial_tile,
    power,
    score_scale,
    sequence_of,
    store_tile,
    tile_ranges,
)
from memattn_kernels._products import dot
from memattn_kernels._tiles import columns_between
from memattn_kernels.segmented_attention.intervals import queries_of_token


@triton.jit
def _queries_of_key(offs_n, b, part, documents_ptr, segments_ptr, seq_start_ptr, seq_end_ptr,
                    T, S, n_keys, chunk, L, W, n_sinks, query_offset, n_parts,
                    SOURCE: tl.constexpr, IS_CAUSAL: tl.constexpr):  # fmt: skip
    """Rows ``[lo, hi)`` of the queries that see each key of the tile, and whether it is a key."""
    valid = offs_n < n_keys
    if SOURCE == "token":
        start, end, _ = sequence_of(offs_n, b, documents_ptr, seq_start_ptr, seq_end_ptr, S)
        valid &= (offs_n >= start) & (offs_n < end)
        lo, hi = queries_of_token(offs_n, start, end, L, W, n_sinks, IS_CAUSAL)
    else:
        start, end, _ = sequence_of(offs_n, b, None, seq_start_ptr, seq_end_ptr, S)
        if SOURCE == "persistent":
            lo = query_offset + part * chunk
            hi = tl.minimum(lo + chunk, end)
            lo = tl.maximum(lo, start)
        elif segments_ptr is not None:
            lo = tl.load(segments_ptr + part)
            hi = tl.load(segments_ptr + n_parts + part)
        else:  # the number of a segment that no query is in may be any
            lo = start + part.to(tl.int64) * L
            hi = tl.minimum(lo + L, end).to(tl.int32)
            lo = tl.minimum(lo, NO_END - n_keys).to(tl.int32)
        if SOURCE == "memory" and IS_CAUSAL:
            lo += offs_n
        lo += 0 * offs_n
        hi += 0 * offs_n
    return tl.maximum(lo - query_offset, 0), tl.minimum(hi - query_offset, T), valid


@triton.jit
def _dkdv_tile(dk, dv, k, v, q_ptr, do_ptr, lse_ptr, residual_ptr, delta_ptr, dlse_ptr,
               stride_q, stride_do, t, lo, hi, last, scale, cap_scale, D: tl.constexpr,
               DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_DV: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """One tile of queries from row ``t``; scores are transposed: keys by queries.

    ``lse`` has ``exponent_factor`` in it; ``scale`` is a ``score_scale``.
    """
    columns = tl.arange(0, BLOCK_M)
    offs_m = t + columns
    q = load_tile(q_ptr, t, stride_q, last, D, BLOCK_M, BLOCK_D, MASKED)
    do = load_tile(do_ptr, t, stride_do, last, DV, BLOCK_M, BLOCK_DV, MASKED)
    # padded by a tile, so no mask; pointer plus scalar first, which leaves one address for a thread
    lse = tl.load(lse_ptr + t + columns)
    delta = tl.load(delta_ptr + t + columns)

    products = dot(k, tl.trans(q))
    scores = cap_products(products, cap_scale, q.dtype)
    x = scores * scale - lse[None, :]
    if q.dtype == tl.float32:
        x -= tl.load(residual_ptr + t + columns, mask=offs_m < last, other=0.0)[None, :]
    p = power(x, q.dtype)
    weights = p
    if cap_scale is not None:  # at once, so that scores need not wait in registers
        weights = p * (1.0 - scores * scores)
    # wide rows: a shorter mask, and none that lives until the end. Narrow ones fit two programs on
    # a multiprocessor only with one address for all columns, and with a cap the mask is shorter so
    IS_WIDE: tl.constexpr = BLOCK_D > 64 and cap_scale is None
    mask = columns_between(lo, hi, t, BLOCK_M, IS_WIDE)
    if MASKED:
        p = tl.where(mask, p, 0.0)
        weights = tl.where(mask, weights, 0.0)
    dv = dot(p.to(do.dtype), do, dv)
    ds = dot(v, tl.trans(do)) - delta[None, :]
    if q.dtype == tl.float32 and dlse_ptr is not None:
        ds += tl.load(dlse_ptr + t + columns, mask=offs_m < last, other=0.0)[None, :]
    # delta may be NaN where p is 0
    if MASKED and IS_WIDE:
        ds = tl.where(weights != 0.0, ds, 0.0)
    ds *= weights
    if MASKED and not IS_WIDE:
        ds = tl.where(mask, ds, 0.0)
    dk = dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(
    do_not_specialize=("T", "S", "n_keys", "chunk", "L", "W", "n_sinks", "query_offset", "n_parts")
)
def segmented_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, scaled_lse_ptr, residual_ptr, delta_ptr, dlse_ptr,
    documents_ptr, segments_ptr, seq_start_ptr, seq_end_ptr,  # bounds of sequences, or None
    dk_ptr, dv_ptr,  # outputs
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_dob, stride_doh, stride_dot,
    stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    B, H, G, T, S, n_keys, n_parts, chunk, L, W, n_sinks, query_offset, scale, softcap,  # sizes
    SOURCE: tl.constexpr, IS_CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(n_keys, BLOCK_N) * n_parts * B * Hkv,). One program owns BLOCK_N keys.

    SOURCE "token" has one part; "memory" has one for each segment, with ``n_keys`` rows each;
    "persistent" has one for each ``chunk`` of queries, and writes each to its own slice.
    """
    n_tiles = tl.cdiv(n_keys, BLOCK_N)
    pid = tl.program_id(0)
    n = pid % n_tiles * BLOCK_N
    part = pid // n_tiles % n_parts
    H_kv = H // G
    b = (pid // n_tiles // n_parts // H_kv).to(tl.int64)
    h_kv = (pid // n_tiles // n_parts % H_kv).to(tl.int64)

    # what sees each key
    offs_n = n + tl.arange(0, BLOCK_N)
    lo, hi, valid = _queries_of_key(
        offs_n, b, part, documents_ptr, segments_ptr, seq_start_ptr, seq_end_ptr,
        T, S, n_keys, chunk, L, W, n_sinks, query_offset, n_parts, SOURCE, IS_CAUSAL,
    )  # fmt: skip
    first, full_first, full_last, last = tile_ranges(lo, hi, valid, BLOCK_M)

    row, out_b = tl.cast(n, tl.int64), b
    end = row + (n_keys - n)
    if SOURCE == "memory":
        row += part.to(tl.int64) * n_keys
        end += part.to(tl.int64) * n_keys
    elif SOURCE == "persistent":
        out_b += part.to(tl.int64) * B
    k_ptr += b * stride_kb + h_kv * stride_kh
    k = load_tile(k_ptr, row, stride_kt, end, D, BLOCK_N, BLOCK_D, True)
    v_ptr += b * stride_vb + h_kv * stride_vh
    v = load_tile(v_ptr, row, stride_vt, end, DV, BLOCK_N, BLOCK_DV, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)

    cap_scale = softcap
    if softcap is not None:
        cap_scale = scale / softcap
    exponent_scale = score_scale(scale, softcap, k.dtype)
    for g in range(G):
        h = h_kv * G + g
        head_q_ptr = q_ptr + b * stride_qb + h * stride_qh
        head_do_ptr = do_ptr + b * stride_dob + h * stride_doh
        head_lse_ptr = scaled_lse_ptr + (b * H + h) * T
        head_residual_ptr = scaled_lse_ptr
        if k.dtype == tl.float32:
            head_residual_ptr = residual_ptr + (b * H + h) * T
        head_delta_ptr = delta_ptr + (b * H + h) * T
        head_dlse_ptr = dlse_ptr
        if dlse_ptr is not None:
            head_dlse_ptr = dlse_ptr + (b * H + h) * T
        for index in range(n_partial_tiles(first, full_first, full_last, last, BLOCK_M)):
            t = partial_tile(index, first, full_first, full_last, BLOCK_M)
            dk, dv = _dkdv_tile(
                dk, dv, k, v, head_q_ptr, head_do_ptr, head_lse_ptr, head_residual_ptr,
                head_delta_ptr, head_dlse_ptr, stride_qt, stride_dot, t, lo, hi, last,
                exponent_scale, cap_scale, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, True,
            )  # fmt: skip
        for t in range(full_first, full_last, BLOCK_M):
            dk, dv = _dkdv_tile(
                dk, dv, k, v, head_q_ptr, head_do_ptr, head_lse_ptr, head_residual_ptr,
                head_delta_ptr, head_dlse_ptr, stride_qt, stride_dot, t, lo, hi, last,
                exponent_scale, cap_scale, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, False,
            )  # fmt: skip

    # a key that no query may see, and its NaN, ends here
    valid &= lo < hi
    dk = tl.where(valid[:, None], dk * scale, 0.0)
    dv = tl.where(valid[:, None], dv, 0.0)
    dk_ptr += out_b * stride_dkb + h_kv * stride_dkh
    store_tile(dk_ptr, row, stride_dkt, end, dk, D, BLOCK_N, BLOCK_D)
    dv_ptr += out_b * stride_dvb + h_kv * stride_dvh
    store_tile(dv_ptr, row, stride_dvt, end, dv, DV, BLOCK_N, BLOCK_DV)
