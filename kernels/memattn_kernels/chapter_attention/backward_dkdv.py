"""Key-stationary backward of chapter attention: one program per tile of keys of a chapter's part.

    d_key = scale * dS^T Q,  d_value = (w P)^T d_out

summed over all rows of the batch that select the chapter, in the order of the index. Long chapters
are cut into parts (``lists``), whose sums are added in their order.
"""

import triton
import triton.language as tl

from memattn_kernels._common import exponent_factor, load_rows, power, store_tile
from memattn_kernels._products import dot
from memattn_kernels.chapter_attention.forward import RUNTIME_SIZES
from memattn_kernels.chapter_attention.tiles import entries_of, exp_lse, load_bank_tile


@triton.jit(do_not_specialize=(*RUNTIME_SIZES, "most"))
def chapter_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, weight_ptr,  # inputs; weights in the order of the index, or None
    sequence_ptr, start_ptr, length_ptr, offset_ptr,  # index
    chapter_ptr, first_ptr, tiles_ptr, sums_ptr,  # parts
    # lists [Hkv, n_list], by entry with LIST_ENTRIES, else where an entry's routing row has its own
    shift_ptr, rest_ptr, list_ptr, place_ptr,
    dk_ptr, dv_ptr, part_dk_ptr, part_dv_ptr,  # outputs; the last None if no chapter has parts
    stride_qb, stride_qh, stride_qt, stride_kc, stride_kh, stride_km,
    stride_vc, stride_vh, stride_vm, stride_dob, stride_doh, stride_dot,
    stride_dkc, stride_dkh, stride_dkm, stride_dvc, stride_dvh, stride_dvm,
    H, K, C, row_width, most, n_list, scale,  # sizes
    G: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, IS_JOINT: tl.constexpr,
    LIST_ENTRIES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: (n_parts * cdiv(M, BLOCK_N) * Hkv,), heads first. One program owns BLOCK_N keys.

    With WIDTH a tile has rows of several entries, of WIDTH each, else of one. Places of a tile
    without a row read that of a row of their chapter, and their exponent in the list is infinite.
    The joint form in half precision has logarithms of weights, to base 2, and with WIDTH none, as
    they are in the list.
    """
    HAS_WEIGHTS: tl.constexpr = weight_ptr is not None
    n_key_tiles: tl.constexpr = (M + BLOCK_N - 1) // BLOCK_N
    n_heads = H // G
    pid = tl.program_id(0)
    h_kv = pid % n_heads
    n = pid // n_heads % n_key_tiles * BLOCK_N
    chapter = tl.load(chapter_ptr + pid // n_heads // n_key_tiles)
    if chapter >= C:
        return
    first = tl.load(first_ptr + pid // n_heads // n_key_tiles)
    begin, end = entries_of(chapter, 0, K, K, offset_ptr)
    first_tile = tl.load(tiles_ptr + chapter)
    n_tiles = tl.load(tiles_ptr + chapter + 1) - first_tile
    sums = first // most
    if part_dk_ptr is not None:
        sums += tl.load(sums_ptr + chapter)
    chapter = chapter.to(tl.int64)

    dtype: tl.constexpr = k_ptr.dtype.element_ty
    k_ptr += chapter * stride_kc + h_kv * stride_kh
    k = load_bank_tile(k_ptr, None, 0, n, stride_km, dtype, M, D, BLOCK_N, BLOCK_D)
    v_ptr += chapter * stride_vc + h_kv * stride_vh
    v = load_bank_tile(v_ptr, None, 0, n, stride_vm, dtype, M, DV, BLOCK_N, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)

    exponent_scale = scale * exponent_factor(dtype)
    is_key = n + tl.arange(0, BLOCK_N) < M
    offs_m = tl.arange(0, BLOCK_M)
    n_entry_tiles = tl.cdiv(row_width, BLOCK_M)
    head = tl.cast(h_kv, tl.int64)
    q_ptr += head * G * stride_qh
    do_ptr += head * G * stride_doh
    entry, tile = begin + first // n_entry_tiles, first % n_entry_tiles
    for index in range(first, tl.minimum(first + most, n_tiles)):
        at = (first_tile + index) * BLOCK_M
        if WIDTH is None:
            place = entry
            i = tile * BLOCK_M + offs_m
            valid = i < tl.load(length_ptr + place)
            if not LIST_ENTRIES:
                at = tl.load(place_ptr + place) + tile * BLOCK_M
            tile += 1
            is_last = tile == n_entry_tiles
            entry += is_last.to(tl.int32)
            tile = tl.where(is_last, 0, tile)
        else:
            i = index * BLOCK_M + offs_m
            place = tl.minimum(begin + i // WIDTH, end - 1)
            i = i % WIDTH
        if length_ptr is not None:
            i = tl.minimum(i, tl.load(length_ptr + place) - 1)
        b = tl.load(sequence_ptr + place).to(tl.int64)
        t = (tl.load(start_ptr + place) + i // G).to(tl.int64)
        offs_q, offs_do = b * stride_qb + t * stride_qt, b * stride_dob + t * stride_dot
        if G > 1:
            offs_q += i % G * tl.cast(stride_qh, tl.int64)
            offs_do += i % G * tl.cast(stride_doh, tl.int64)
        q = load_rows(q_ptr, offs_q, D, BLOCK_D)
        do = load_rows(do_ptr, offs_do, DV, BLOCK_DV)
        if HAS_WEIGHTS:
            w = tl.load(weight_ptr + place)
        offs = tl.multiple_of(head * n_list + at, BLOCK_M)  # lists begin with a tile

        scores = dot(k, tl.trans(q))  # keys by rows
        dp = dot(v, tl.trans(do))
        if IS_JOINT or LIST_ENTRIES:
            shift = tl.load(shift_ptr + offs + offs_m)
            number = tl.load(list_ptr + offs + offs_m)
            if IS_JOINT and HAS_WEIGHTS and WIDTH is None and dtype != tl.float32:
                shift -= w
            x = scores * exponent_scale - shift[None, :]
            if dtype != tl.float32:
                p = power(x, dtype)
            elif IS_JOINT:
                p = power(x - tl.load(rest_ptr + offs + offs_m)[None, :], dtype)
            else:
                p = power(x, dtype) * tl.load(rest_ptr + offs + offs_m)[None, :]
            if IS_JOINT:
                if HAS_WEIGHTS and dtype == tl.float32:
                    p *= w if WIDTH is None else w[None, :]
                weighted, ds = p, p * (dp - number[None, :])
            elif HAS_WEIGHTS:
                w_rows = w if WIDTH is None else w[None, :]
                weighted, ds = p * w_rows, p * (dp * w_rows - number[None, :])
            else:
                weighted, ds = p, p * (dp - number[None, :])
        else:
            if M < BLOCK_N:
                scores = tl.where(is_key[:, None], scores, -float("inf"))
            m = tl.max(scores, 0) * exponent_scale
            p = power(scores * exponent_scale - m[None, :], dtype)
            l = tl.sum(p, 0)
            p /= l[None, :]
            factor = tl.where(valid, w if HAS_WEIGHTS else 1.0, 0.0)
            ds = (dp - tl.sum(p * dp, 0)[None, :]) * factor[None, :]
            if list_ptr is not None:
                lse = tl.load(shift_ptr + offs + offs_m)
                rest = lse
                if dtype == tl.float32:
                    rest = tl.load(rest_ptr + offs + offs_m)
                d_lse = tl.load(list_ptr + offs + offs_m)
                ds += (d_lse * exp_lse(m, l, lse, rest, dtype))[None, :]
            weighted, ds = p * factor[None, :], p * ds
        dv = dot(weighted.to(do.dtype), do, dv)
        dk = dot(ds.to(q.dtype), q, dk)

    is_part = part_dk_ptr is not None and n_tiles > most
    if is_part:
        part = (sums.to(tl.int64) * n_heads + h_kv) * M
        store_tile(part_dk_ptr + part * D, n, D, M, dk, D, BLOCK_N, BLOCK_D)
        store_tile(part_dv_ptr + part * DV, n, DV, M, dv, DV, BLOCK_N, BLOCK_DV)
    else:
        dk_ptr += chapter * stride_dkc + h_kv * stride_dkh
        store_tile(dk_ptr, n, stride_dkm, M, dk * scale, D, BLOCK_N, BLOCK_D)
        dv_ptr += chapter * stride_dvc + h_kv * stride_dvh
        store_tile(dv_ptr, n, stride_dvm, M, dv, DV, BLOCK_N, BLOCK_DV)
