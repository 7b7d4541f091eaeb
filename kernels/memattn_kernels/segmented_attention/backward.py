"""Backward of segmented attention: no atomics, every gradient has one owner.

With P the softmax's weights, dS = P * (d_out V^T - rowsum(out * d_out) + d_lse):

    d_query = scale * dS K        one program per tile of queries
    d_key = scale * dS^T Q        one program per tile of keys,
    d_value = P^T d_out           which loops over the query heads of its group

A persistent key is seen by all queries of the batch: its programs each take a chunk of queries and
write a partial sum, added up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memattn_kernels import configs
from memattn_kernels._common import (
    NO_END,
    block_length,
    device_guard,
    empty_rows,
    exponent_factor,
    load_tile,
    n_partial_tiles,
    partial_tile,
    power,
    rows_ready,
    store_tile,
    tile_ranges,
)
from memattn_kernels.segmented_attention.forward import (
    RUNTIME_SIZES,
    kernel_inputs,
    row_tiles,
    rows,
    segmented_attention_op,
)
from memattn_kernels.segmented_attention.intervals import (
    memory_of_query,
    queries_of_token,
    segment_table,
    sequence_of,
    tokens_of_query,
)

# a partial sum of the persistent gradients takes at least this many queries, and there are about
# this many partial sums, which fill any card
MIN_CHUNK = 1024
N_PARTIALS = 512


@triton.jit
def _dq_tile(dq, pk, rest, q, do, lse, residual, delta, k_ptr, v_ptr, stride_k, stride_v, n, lo, hi,
             last, scale, D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """One tile of keys from column ``n``; ``scale`` and ``lse`` with ``exponent_factor``."""
    k = load_tile(k_ptr, n, stride_k, last, D, BLOCK_N, BLOCK_D, MASKED)
    v = load_tile(v_ptr, n, stride_v, last, DV, BLOCK_N, BLOCK_DV, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    x = scores * scale - lse[:, None]
    if q.dtype == tl.float32:
        x -= residual[:, None]
    p = power(x, q.dtype)
    ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
    if MASKED:
        offs_n = (n + tl.arange(0, BLOCK_N))[None, :]
        mask = (offs_n >= lo[:, None]) & (offs_n < hi[:, None])
        ds = tl.where(mask, ds, 0.0)
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    if q.dtype == tl.float32:
        rest += tl.sum(ds, 1)
        if MASKED:
            p = tl.where(mask, p, 0.0)
        pk = tl.dot(p, k, pk, input_precision="ieee")
    return dq, pk, rest


@triton.jit
def _dq_source(dq, pk, rest, q, do, lse, residual, delta, k_ptr, v_ptr, stride_k, stride_v, lo, hi,
               valid, scale, D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr,
               BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
               HAS_WHOLE_TILES: tl.constexpr):  # fmt: skip
    """All keys of one source that the tile of queries sees."""
    first, full_first, full_last, last = tile_ranges(lo, hi, valid, BLOCK_N)
    if not HAS_WHOLE_TILES:
        full_first = first
        full_last = first
    for index in range(n_partial_tiles(first, full_first, full_last, last, BLOCK_N)):
        n = partial_tile(index, first, full_first, full_last, BLOCK_N)
        dq, pk, rest = _dq_tile(
            dq, pk, rest, q, do, lse, residual, delta, k_ptr, v_ptr, stride_k, stride_v,
            n, lo, hi, last, scale, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, True,
        )  # fmt: skip
    if HAS_WHOLE_TILES:
        for n in range(full_first, full_last, BLOCK_N):
            dq, pk, rest = _dq_tile(
                dq, pk, rest, q, do, lse, residual, delta, k_ptr, v_ptr, stride_k, stride_v,
                n, lo, hi, last, scale, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, False,
            )  # fmt: skip
    return dq, pk, rest


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _segmented_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, mk_ptr, mv_ptr, o_ptr, lse_ptr, residual_ptr,
    do_ptr, dlse_ptr,
    documents_ptr, seq_start_ptr, seq_end_ptr,  # bounds of sequences, or None
    dq_ptr, scaled_lse_ptr, delta_ptr,  # outputs
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_pkh, stride_pkt, stride_pvh, stride_pvt,
    stride_mkb, stride_mkh, stride_mkt, stride_mvb, stride_mvh, stride_mvt,
    stride_ob, stride_oh, stride_ot, stride_dob, stride_doh, stride_dot,
    stride_dqb, stride_dqh, stride_dqt,
    H, G, T, S, P, M, n_memory, L, W, query_offset, scale,  # sizes
    IS_CAUSAL: tl.constexpr, MEMORY_IS_CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_NP: tl.constexpr,
    BLOCK_NM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
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

    if pk_ptr is not None:
        lo = tl.zeros([BLOCK_M], dtype=tl.int32)
        dq, pk, rest = _dq_source(
            dq, pk, rest, q, do, lse, residual, delta, pk_ptr + h_kv * stride_pkh,
            pv_ptr + h_kv * stride_pvh, stride_pkt, stride_pvt, lo, lo + P, valid, exponent_scale,
            D, DV, BLOCK_NP, BLOCK_D, BLOCK_DV, False,
        )  # fmt: skip
    if mk_ptr is not None:
        lo, hi = memory_of_query(i, start, first_segment, n_memory, L, M, MEMORY_IS_CAUSAL)
        dq, pk, rest = _dq_source(
            dq, pk, rest, q, do, lse, residual, delta, mk_ptr + b * stride_mkb + h_kv * stride_mkh,
            mv_ptr + b * stride_mvb + h_kv * stride_mvh, stride_mkt, stride_mvt,
            lo, hi, valid, exponent_scale, D, DV, BLOCK_NM, BLOCK_D, BLOCK_DV, False,
        )  # fmt: skip
    lo, hi = tokens_of_query(i, start, end, S, L, W, IS_CAUSAL)
    dq, pk, rest = _dq_source(
        dq, pk, rest, q, do, lse, residual, delta, k_ptr + b * stride_kb + h_kv * stride_kh,
        v_ptr + b * stride_vb + h_kv * stride_vh, stride_kt, stride_vt,
        lo, hi, valid, exponent_scale, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, True,
    )  # fmt: skip

    if q.dtype == tl.float32:
        dq += (dlse - rest)[:, None] * pk
        tl.store(delta_ptr + row, delta + rest, mask=mask_m)
    # a row without keys, and its NaN, ends here
    valid &= lse < float("inf")
    dq = tl.where(valid[:, None], dq * scale, 0.0)
    dq_ptr += b * stride_dqb + h * stride_dqh
    store_tile(dq_ptr, t, stride_dqt, T, dq, D, BLOCK_M, BLOCK_D)


@triton.jit
def _queries_of_key(offs_n, b, part, documents_ptr, segments_ptr, seq_start_ptr, seq_end_ptr,
                    T, S, n_keys, chunk, L, W, query_offset, n_parts, SOURCE: tl.constexpr,
                    IS_CAUSAL: tl.constexpr):  # fmt: skip
    """Rows ``[lo, hi)`` of the queries that see each key of the tile, and whether it is a key."""
    valid = offs_n < n_keys
    if SOURCE == "token":
        start, end, _ = sequence_of(offs_n, b, documents_ptr, seq_start_ptr, seq_end_ptr, S)
        valid &= (offs_n >= start) & (offs_n < end)
        lo, hi = queries_of_token(offs_n, start, end, L, W, IS_CAUSAL)
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
               stride_q, stride_do, t, lo, hi, last, scale, D: tl.constexpr, DV: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
               MASKED: tl.constexpr):  # fmt: skip
    """One tile of queries from row ``t``; scores are transposed: keys by queries.

    ``lse`` and ``scale`` have ``exponent_factor`` in them.
    """
    columns = tl.arange(0, BLOCK_M)
    offs_m = t + columns
    q = load_tile(q_ptr, t, stride_q, last, D, BLOCK_M, BLOCK_D, MASKED)
    do = load_tile(do_ptr, t, stride_do, last, DV, BLOCK_M, BLOCK_DV, MASKED)
    # padded by a tile, so no mask; pointer plus scalar first, which leaves one address for a thread
    lse = tl.load(lse_ptr + t + columns)
    delta = tl.load(delta_ptr + t + columns)

    scores = tl.dot(k, tl.trans(q), input_precision="ieee")
    x = scores * scale - lse[None, :]
    if q.dtype == tl.float32:
        x -= tl.load(residual_ptr + t + columns, mask=offs_m < last, other=0.0)[None, :]
    p = power(x, q.dtype)
    mask = (offs_m[None, :] >= lo[:, None]) & (offs_m[None, :] < hi[:, None])
    if MASKED:
        p = tl.where(mask, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    ds = tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :]
    if q.dtype == tl.float32 and dlse_ptr is not None:
        ds += tl.load(dlse_ptr + t + columns, mask=offs_m < last, other=0.0)[None, :]
    ds *= p
    if MASKED:  # delta may be NaN where p is 0
        ds = tl.where(mask, ds, 0.0)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=("T", "S", "n_keys", "chunk", "L", "W", "query_offset", "n_parts"))
def _segmented_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, scaled_lse_ptr, residual_ptr, delta_ptr, dlse_ptr,
    documents_ptr, segments_ptr, seq_start_ptr, seq_end_ptr,  # bounds of sequences, or None
    dk_ptr, dv_ptr,  # outputs
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_dob, stride_doh, stride_dot,
    stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    B, H, G, T, S, n_keys, n_parts, chunk, L, W, query_offset, scale,  # sizes
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
        T, S, n_keys, chunk, L, W, query_offset, n_parts, SOURCE, IS_CAUSAL,
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

    exponent_scale = scale * exponent_factor(k.dtype)
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
                exponent_scale, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, True,
            )  # fmt: skip
        for t in range(full_first, full_last, BLOCK_M):
            dk, dv = _dkdv_tile(
                dk, dv, k, v, head_q_ptr, head_do_ptr, head_lse_ptr, head_residual_ptr,
                head_delta_ptr, head_dlse_ptr, stride_qt, stride_dot, t, lo, hi, last,
                exponent_scale, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, False,
            )  # fmt: skip

    # a key that no query may see, and its NaN, ends here
    valid &= lo < hi
    dk = tl.where(valid[:, None], dk * scale, 0.0)
    dv = tl.where(valid[:, None], dv, 0.0)
    dk_ptr += out_b * stride_dkb + h_kv * stride_dkh
    store_tile(dk_ptr, row, stride_dkt, end, dk, D, BLOCK_N, BLOCK_D)
    dv_ptr += out_b * stride_dvb + h_kv * stride_dvh
    store_tile(dv_ptr, row, stride_dvt, end, dv, DV, BLOCK_N, BLOCK_DV)


@torch.library.custom_op("memattn_kernels::segmented_attention_backward", mutates_args=())
def segmented_attention_backward_op(
    d_out: Tensor | None,
    d_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    residual: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    persistent_key: Tensor | None,
    persistent_value: Tensor | None,
    memory_key: Tensor | None,
    memory_value: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    segment_len: int | None,
    window_size: int | None,
    is_causal: bool,
    memory_is_causal: bool,
    query_offset: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the seven floating inputs, of size 0 for those not given."""
    tensors = (query, key, value, persistent_key, persistent_value, memory_key, memory_value)
    bounds = (cu_seqlens, seq_start, seq_end)
    d_query, d_key, d_value, d_pk, d_pv, d_mk, d_mv = grads = _empty_gradients(*tensors)
    B, H, T, D = query.shape
    d_out = torch.zeros_like(out) if d_out is None else rows_ready(d_out)
    d_lse = None if d_lse is None else d_lse.contiguous()
    # the key-stationary kernel reads whole tiles of these
    scaled_lse = lse.new_empty(lse.numel() + configs.MAX_BLOCK)
    delta = torch.empty_like(scaled_lse)
    inputs = kernel_inputs(*tensors, *bounds, segment_len, window_size, query_offset, scale)
    cotangents = rows("do", d_out, "bht") | {
        "scaled_lse_ptr": scaled_lse,
        "delta_ptr": delta,
        "dlse_ptr": d_lse,
        "residual_ptr": residual if query.dtype == torch.float32 else None,
    }

    with device_guard(query):
        if lse.numel():
            tiles = row_tiles("segmented_attention_bwd_dq", query, inputs)
            _segmented_attention_bwd_dq_kernel[(triton.cdiv(T, tiles["BLOCK_M"]) * B * H,)](
                **inputs,
                **tiles,
                **cotangents,
                **rows("o", rows_ready(out), "bht"),
                **rows("dq", d_query, "bht"),
                lse_ptr=lse,
                IS_CAUSAL=is_causal,
                MEMORY_IS_CAUSAL=memory_is_causal,
            )
        shared = {
            name: inputs[name]
            for name in ("q_ptr", "stride_qb", "stride_qh", "stride_qt", "documents_ptr",
                         "seq_start_ptr", "seq_end_ptr", "H", "G", "T", "S", "L", "W",
                         "query_offset", "scale", "D", "DV", "BLOCK_D", "BLOCK_DV")
        }  # fmt: skip
        shared |= cotangents | {"B": B, "segments_ptr": None}
        _launch_dkdv("token", query, key, value, d_key, d_value, key.shape[2], 1, is_causal, shared)
        if persistent_key is not None and persistent_value is not None:
            Hkv, P, _ = persistent_key.shape
            wanted = min(triton.cdiv(T, MIN_CHUNK), triton.cdiv(N_PARTIALS, max(B * Hkv, 1)))
            chunk = triton.cdiv(T, max(wanted, 1))
            n_parts = triton.cdiv(T, max(chunk, 1))
            # [n_parts * B, Hkv, P, D]
            sums = [
                torch.empty(n_parts * B, *t.shape, dtype=torch.float32, device=t.device)
                for t in (persistent_key, persistent_value)
            ]
            _launch_dkdv(
                "persistent", query, persistent_key.expand(B, -1, -1, -1),
                persistent_value.expand(B, -1, -1, -1), *sums, P, n_parts, is_causal,
                shared | {"chunk": chunk},
            )  # fmt: skip
            d_pk.copy_(sums[0].sum(0))
            d_pv.copy_(sums[1].sum(0))
        if memory_key is not None and memory_value is not None:
            n_segments, M = memory_key.shape[2:4]
            if cu_seqlens is not None and segment_len is not None:
                shared["segments_ptr"] = segment_table(cu_seqlens, n_segments, segment_len)
            _launch_dkdv(
                "memory", query, memory_key.flatten(2, 3), memory_value.flatten(2, 3),
                d_mk.flatten(2, 3), d_mv.flatten(2, 3), M, n_segments, memory_is_causal, shared,
            )  # fmt: skip
    return grads


def _launch_dkdv(source: str, query: Tensor, key: Tensor, value: Tensor, d_key: Tensor,
                 d_value: Tensor, n_keys: int, n_parts: int, is_causal: bool,
                 shared: dict) -> None:  # fmt: skip
    """Launch the key-stationary kernel for one source of keys ``[B, Hkv, rows, D]``."""
    config = configs.lookup(
        "segmented_attention_bwd_dkdv", query, max(shared["BLOCK_D"], shared["BLOCK_DV"])
    )
    block_n = config["BLOCK_N"]
    if source != "token":
        block_n = block_length(block_n, n_keys)
    n_programs = triton.cdiv(n_keys, block_n) * n_parts * key.shape[0] * key.shape[1]
    if n_programs == 0:
        return
    _segmented_attention_bwd_dkdv_kernel[(n_programs,)](
        **{"chunk": 0, **shared, **config, "BLOCK_N": block_n},
        **rows("k", key, "bht"),
        **rows("v", value, "bht"),
        **rows("dk", d_key, "bht"),
        **rows("dv", d_value, "bht"),
        n_keys=n_keys,
        n_parts=n_parts,
        SOURCE=source,
        IS_CAUSAL=is_causal,
    )


def _empty_gradients(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor | None) -> tuple:
    """Uninitialised gradients of the seven floating inputs."""
    grads = [empty_rows(t, t.shape[-1]) for t in (query, key, value)]
    grads += [query.new_empty(0) if t is None else t.new_empty(t.shape) for t in rest]
    return tuple(grads)


@segmented_attention_backward_op.register_fake
def _(d_out, d_lse, out, lse, residual, query, key, value, pk, pv, mk, mv, *rest):
    return _empty_gradients(query, key, value, pk, pv, mk, mv)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    """Keep the tensors, and the options as they are."""
    ctx.save_for_backward(*output, *inputs[:10])
    ctx.options = inputs[10:]
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out: Tensor | None, d_lse: Tensor | None, _) -> tuple:
    """One gradient or None for each argument of the forward operator."""
    tensors = ctx.saved_tensors
    grads = segmented_attention_backward_op(d_out, d_lse, *tensors, *ctx.options)
    given = zip(grads, tensors[3:], strict=False)
    return *(None if t is None else grad for grad, t in given), *(None,) * 9


segmented_attention_op.register_autograd(_backward, setup_context=_setup_context)
