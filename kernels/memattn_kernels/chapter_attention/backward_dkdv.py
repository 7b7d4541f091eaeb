"""Key-stationary backward of chapter attention: one program per tile of keys of a chapter.

    d_key = scale * dS^T Q,  d_value = (w P)^T d_out

summed over all rows of the batch that select the chapter, in the order of the index.
"""

import triton
import triton.language as tl

from memattn_kernels._common import exponent_factor, power, store_tile
from memattn_kernels.chapter_attention.forward import RUNTIME_SIZES
from memattn_kernels.chapter_attention.tiles import (
    entries_of,
    exp_lse,
    gather_rows,
    load_bank_tile,
    rows_of_entries,
)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def chapter_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, weight_ptr,  # inputs
    entry_ptr, sequence_ptr, start_ptr, length_ptr, offset_ptr,  # index
    lse_ptr, residual_ptr, do_ptr, dlse_ptr, delta_ptr, stat_ptr,
    dk_ptr, dv_ptr,  # outputs
    stride_qb, stride_qh, stride_qt, stride_kc, stride_kh, stride_km,
    stride_vc, stride_vh, stride_vm, stride_dob, stride_doh, stride_dot,
    stride_dkc, stride_dkh, stride_dkm, stride_dvc, stride_dvh, stride_dvm,
    H, T, K, row_width, n_entries, scale,  # sizes
    G: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, IS_JOINT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: (C * cdiv(M, BLOCK_N) * Hkv,), heads first. One program owns BLOCK_N keys."""
    HAS_WEIGHTS: tl.constexpr = weight_ptr is not None
    IN_TILE: tl.constexpr = M <= BLOCK_N
    n_key_tiles: tl.constexpr = (M + BLOCK_N - 1) // BLOCK_N
    n_heads = H // G
    pid = tl.program_id(0)
    h_kv = pid % n_heads
    n = pid // n_heads % n_key_tiles * BLOCK_N
    chapter = (pid // n_heads // n_key_tiles).to(tl.int64)
    begin, end = entries_of(chapter, 0, K, K, offset_ptr)

    dtype: tl.constexpr = k_ptr.dtype.element_ty
    k_ptr += chapter * stride_kc + h_kv * stride_kh
    k = load_bank_tile(k_ptr, None, 0, n, stride_km, dtype, M, D, BLOCK_N, BLOCK_D)
    v_ptr += chapter * stride_vc + h_kv * stride_vh
    v = load_bank_tile(v_ptr, None, 0, n, stride_vm, dtype, M, DV, BLOCK_N, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)

    exponent_scale = scale * exponent_factor(dtype)
    is_key = n + tl.arange(0, BLOCK_N) < M
    n_stats = tl.cast(n_entries, tl.int64) * n_heads * row_width
    offs_m = tl.arange(0, BLOCK_M)
    # tiles of one entry each where it has many rows, else rows of several entries
    n_entry_tiles = tl.cdiv(row_width, BLOCK_M)
    n_tiles = tl.cdiv((end - begin) * row_width, BLOCK_M)
    if WIDTH is None:
        n_tiles = (end - begin) * n_entry_tiles
    for index in range(n_tiles):
        if WIDTH is None:
            place = begin + index // n_entry_tiles
            b = tl.load(sequence_ptr + place)
            start = tl.load(start_ptr + place)
            i = index % n_entry_tiles * BLOCK_M + offs_m
            valid = i < tl.load(length_ptr + place)
        else:
            place, b, start, i, valid = rows_of_entries(
                index * BLOCK_M + offs_m, begin, end, sequence_ptr, start_ptr, length_ptr, WIDTH
            )  # fmt: skip
        h, t = h_kv * G + i % G, start + i // G
        number = (b * H + h) * T + t
        b, h, t = b.to(tl.int64), h.to(tl.int64), t.to(tl.int64)
        q = gather_rows(q_ptr, b * stride_qb + h * stride_qh + t * stride_qt, valid, D, BLOCK_D)
        offs_do = b * stride_dob + h * stride_doh + t * stride_dot
        do = gather_rows(do_ptr, offs_do, valid, DV, BLOCK_DV)
        if HAS_WEIGHTS:
            if WIDTH is None:
                w = tl.load(weight_ptr + place) + tl.zeros([BLOCK_M], dtype=tl.float32)
            else:
                w = tl.load(weight_ptr + place, mask=valid, other=0.0)

        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # keys by rows
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        residual = 0.0
        if IS_JOINT or dlse_ptr is not None:
            lse = tl.load(lse_ptr + number, mask=valid, other=float("inf")) * exponent_factor(dtype)
            if dtype == tl.float32:
                residual = tl.load(residual_ptr + number, mask=valid, other=0.0)
        if IS_JOINT:
            x = scores * exponent_scale - lse[None, :]
            if dtype == tl.float32:
                x -= residual[None, :]
            p = power(x, dtype)
            ds = dp - tl.load(delta_ptr + number, mask=valid, other=0.0)[None, :]
            if HAS_WEIGHTS:
                p *= w[None, :]
            ds *= p
        else:
            if IN_TILE:
                if M < BLOCK_N:
                    scores = tl.where(is_key[:, None], scores, -float("inf"))
                m = tl.max(scores, 0) * exponent_scale
                p = power(scores * exponent_scale - m[None, :], dtype)
                l = tl.sum(p, 0)
                p /= l[None, :]
                delta = tl.sum(p * dp, 0)
            else:
                entry = tl.load(entry_ptr + place + 0 * i, mask=valid, other=0)
                offs = (entry.to(tl.int64) * n_heads + h_kv) * row_width + i
                m = tl.load(stat_ptr + offs, mask=valid, other=0.0)
                l = tl.load(stat_ptr + n_stats + offs, mask=valid, other=1.0)
                delta = tl.load(stat_ptr + 2 * n_stats + offs, mask=valid, other=0.0)
                p = power(scores * exponent_scale - m[None, :], dtype) / l[None, :]
            ds = dp - delta[None, :]
            if HAS_WEIGHTS:
                ds *= w[None, :]
            if dlse_ptr is not None:
                dlse = tl.load(dlse_ptr + number, mask=valid, other=0.0)
                ds += (dlse * exp_lse(m, l, lse, residual, dtype))[None, :]
            ds *= p
            if HAS_WEIGHTS:
                p *= w[None, :]
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    dk_ptr += chapter * stride_dkc + h_kv * stride_dkh
    store_tile(dk_ptr, n, stride_dkm, M, dk * scale, D, BLOCK_N, BLOCK_D)
    dv_ptr += chapter * stride_dvc + h_kv * stride_dvh
    store_tile(dv_ptr, n, stride_dvm, M, dv, DV, BLOCK_N, BLOCK_DV)
