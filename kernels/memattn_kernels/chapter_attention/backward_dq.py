"""Query-stationary backward of chapter attention: the two forms of the forward.

    d_query = scale * dS K

    joint:        dS = P * (d_out V^T - Delta + d_lse),  Delta = rowsum(out * d_out)
    independent:  dS = P_s * (w_s (d_out V^T - Delta_s) + d_lse exp(l_s - lse)),
                  Delta_s = rowsum(P_s * d_out V^T), where P_s is the softmax of a chapter

A weight's gradient is the row sum of ``dS / w`` (joint) or ``Delta_s``.
"""

import triton
import triton.language as tl

from memattn_kernels._common import exponent_factor, power, scatter_rows
from memattn_kernels._products import dot
from memattn_kernels.chapter_attention.forward import RUNTIME_SIZES
from memattn_kernels.chapter_attention.tiles import (
    chapter_pointers,
    chapter_scores,
    exp_lse,
    gather_rows,
    load_bank_tile,
    rows_of_program,
)

PART: tl.constexpr = tl.constexpr(16)  # rows of a partial sum of a weight's gradient, by row


@triton.jit
def _scores_and_dp(q, do, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, head, n, stride_k, stride_v,
                   M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Keys of a tile, ``q k^T`` and ``do v^T``."""
    k = load_bank_tile(k_ptr, k_scale_ptr, head, n, stride_k, q.dtype, M, D, BLOCK_N, BLOCK_D)
    v = load_bank_tile(v_ptr, v_scale_ptr, head, n, stride_v, q.dtype, M, DV, BLOCK_N, BLOCK_DV)
    return (
        k,
        chapter_scores(q, k, n, M, BLOCK_N),
        dot(do, tl.trans(v)),
    )


@triton.jit
def _independent_chapter(dq, q, do, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, head, stride_k,
                         stride_v, weight, lse, residual, dlse, scale, M: tl.constexpr,
                         D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr,
                         BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                         HAS_DLSE: tl.constexpr):  # fmt: skip
    """Add a chapter of several tiles, whose softmax must be known first.

    Returns:
        ``dq``, and the chapter's largest exponent, sum and ``Delta_s``.
    """
    m = tl.full([q.shape[0]], -float("inf"), dtype=tl.float32)
    l = tl.zeros([q.shape[0]], dtype=tl.float32)
    delta = tl.zeros([q.shape[0]], dtype=tl.float32)
    for n in range(0, M, BLOCK_N):
        _, scores, dp = _scores_and_dp(
            q, do, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, head, n, stride_k, stride_v,
            M, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        m_new = tl.maximum(m, tl.max(scores, 1) * scale)
        alpha = power(m - m_new, q.dtype)
        p = power(scores * scale - m_new[:, None], q.dtype)
        l = l * alpha + tl.sum(p, 1)
        delta = delta * alpha + tl.sum(p * dp, 1)
        m = m_new
    delta /= l
    of_lse = tl.zeros([q.shape[0]], dtype=tl.float32)
    if HAS_DLSE:
        of_lse = dlse * exp_lse(m, l, lse, residual, q.dtype)
    for n in range(0, M, BLOCK_N):
        k, scores, dp = _scores_and_dp(
            q, do, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, head, n, stride_k, stride_v,
            M, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        p = power(scores * scale - m[:, None], q.dtype) / l[:, None]
        ds = p * (weight[:, None] * (dp - delta[:, None]) + of_lse[:, None])
        dq = dot(ds.to(k.dtype), k, dq)
    return dq, m, l, delta


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def chapter_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr,  # inputs; scales of a quantised bank, or None
    slots_ptr, weight_ptr, n_slots_ptr, row_start_ptr, row_end_ptr,  # by routing row
    entry_ptr, sequence_ptr, start_ptr, length_ptr,  # index by chapter, or None
    offset_ptr, chapter_ptr, first_ptr,
    o_ptr, o_rest_ptr, lse_ptr, residual_ptr, do_ptr, dlse_ptr,
    dq_ptr, dw_ptr, delta_ptr,  # outputs; the last joint
    place_ptr, shift_ptr, rest_ptr, list_ptr,  # lists by entry, independent, or None
    acc_ptr,  # what rows have so far, by chapter only
    stride_qb, stride_qh, stride_qt, stride_kc, stride_kh, stride_km,
    stride_vc, stride_vh, stride_vm, stride_ob, stride_oh, stride_ot,
    stride_dob, stride_doh, stride_dot, stride_dqb, stride_dqh, stride_dqt,
    H, T, N, K, C, row_width, n_tiles, slot, n_list, scale,  # sizes
    G: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, IS_JOINT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: that of the forward. One program computes BLOCK_M rows of d_query, or adds a chapter.

    It also writes ``delta - d_lse``, and partial sums of the weights' gradients: by row over
    PART rows and a tile of keys, by chapter one for each row.
    """
    BY_CHAPTER: tl.constexpr = entry_ptr is not None
    HAS_WEIGHTS: tl.constexpr = weight_ptr is not None
    n_heads = H // G
    h_kv = tl.program_id(0) % n_heads
    tile = tl.program_id(0) // n_heads
    n_slots, chapter, entry, b, start, i, valid = rows_of_program(
        tile, slot, N, K, C, row_width, n_tiles, n_slots_ptr, row_start_ptr, row_end_ptr,
        entry_ptr, sequence_ptr, start_ptr, length_ptr, offset_ptr, chapter_ptr, first_ptr,
        G, WIDTH, BLOCK_M,
    )  # fmt: skip
    if n_slots == 0:
        return
    h, t = h_kv * G + i % G, start + i // G
    number = (b * H + h) * T + t
    b, h, t = b.to(tl.int64), h.to(tl.int64), t.to(tl.int64)
    q = gather_rows(q_ptr, b * stride_qb + h * stride_qh + t * stride_qt, valid, D, BLOCK_D)
    offs_do = b * stride_dob + h * stride_doh + t * stride_dot
    do = gather_rows(do_ptr, offs_do, valid, DV, BLOCK_DV)
    lse = tl.load(lse_ptr + number, mask=valid, other=float("inf")) * exponent_factor(q.dtype)
    residual = lse
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + number, mask=valid, other=0.0)
    dlse = tl.zeros([BLOCK_M], dtype=tl.float32)
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + number, mask=valid, other=0.0)
    is_first = valid & (slot == 0)
    delta = dlse
    if IS_JOINT:
        offs_o = b * stride_ob + h * stride_oh + t * stride_ot
        o = gather_rows(o_ptr, offs_o, is_first, DV, BLOCK_DV).to(tl.float32)
        if o_rest_ptr is not None:
            o += gather_rows(o_rest_ptr, offs_o, is_first, DV, BLOCK_DV).to(tl.float32)
        delta = tl.sum(o * do.to(tl.float32), 1) - dlse
        if BY_CHAPTER:
            earlier = tl.load(delta_ptr + number, mask=valid & (slot > 0), other=0.0)
            delta = tl.where(is_first, delta, earlier)
        tl.store(delta_ptr + number, delta, mask=is_first)

    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    weight = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    dw = tl.zeros([BLOCK_M], dtype=tl.float32)
    if BY_CHAPTER:
        state = (b * T + t) * H + h
        dq += gather_rows(acc_ptr, state * D, valid & (slot > 0), D, BLOCK_D)
        if HAS_WEIGHTS:
            weight = tl.load(weight_ptr + entry, mask=valid, other=0.0)

    exponent_scale = scale * exponent_factor(q.dtype)
    N_PARTS: tl.constexpr = BLOCK_M // PART
    IN_TILE: tl.constexpr = M <= BLOCK_N
    n_key_tiles: tl.constexpr = (M + BLOCK_N - 1) // BLOCK_N
    N_INNER: tl.constexpr = n_key_tiles if IS_JOINT else 1
    for index in range(n_slots * N_INNER):
        at, w = chapter, weight
        place = entry
        if not BY_CHAPTER:
            place = entry + index // N_INNER
            at = tl.load(slots_ptr + place)
            if HAS_WEIGHTS:
                w = weight * tl.load(weight_ptr + place)
        n = index % N_INNER * BLOCK_N
        head_k_ptr, head_v_ptr, head = chapter_pointers(
            at, h_kv, n_heads, k_ptr, v_ptr, stride_kc, stride_kh, stride_vc, stride_vh
        )
        if IS_JOINT or IN_TILE:
            k, scores, dp = _scores_and_dp(
                q, do, head_k_ptr, head_v_ptr, k_scale_ptr, v_scale_ptr, head, n,
                stride_km, stride_vm, M, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
            if IS_JOINT:
                x = scores * exponent_scale - lse[:, None]
                if q.dtype == tl.float32:
                    x -= residual[:, None]
                ds = power(x, q.dtype) * (dp - delta[:, None])
                if HAS_WEIGHTS:
                    of_weight = tl.sum(ds, 1)
                    ds *= w[:, None]
            else:
                m = tl.max(scores, 1) * exponent_scale
                p = power(scores * exponent_scale - m[:, None], q.dtype)
                l = tl.sum(p, 1)
                p /= l[:, None]
                of_weight = tl.sum(p * dp, 1)
                ds = dp - of_weight[:, None]
                if HAS_WEIGHTS:
                    ds *= w[:, None]
                if dlse_ptr is not None:
                    ds += (dlse * exp_lse(m, l, lse, residual, q.dtype))[:, None]
                ds *= p
        else:
            dq, m, l, of_weight = _independent_chapter(
                dq, q, do, head_k_ptr, head_v_ptr, k_scale_ptr, v_scale_ptr, head, stride_km,
                stride_vm, w, lse, residual, dlse, exponent_scale, M, D, DV, BLOCK_N, BLOCK_D,
                BLOCK_DV, dlse_ptr is not None,
            )  # fmt: skip
        if place_ptr is not None:
            # see the key-stationary kernel: w (d_out V^T - Delta_s) + d_lse exp(l_s - lse)
            offs = tl.cast(h_kv, tl.int64) * n_list + tl.load(place_ptr + place) + i
            listed = w * of_weight
            if dlse_ptr is not None:
                listed -= dlse * exp_lse(m, l, lse, residual, q.dtype)
            tl.store(list_ptr + offs, listed, mask=valid)
            if rest_ptr is not None:  # a logarithm would cost float32 digits
                tl.store(shift_ptr + offs, m, mask=valid)
                tl.store(rest_ptr + offs, 1.0 / l, mask=valid)
            else:
                tl.store(shift_ptr + offs, m + tl.log2(l), mask=valid)
        if HAS_WEIGHTS:
            if BY_CHAPTER:
                dw += of_weight
            else:
                n_row_tiles = tl.cdiv(row_width, BLOCK_M)
                offs = (tl.cast(entry, tl.int64) * N_INNER + index) * n_heads + h_kv
                offs = (offs * n_row_tiles + tile % n_row_tiles) * N_PARTS
                # a sum over more rows than one warp has would serialise the matrix products
                parts = tl.sum(tl.reshape(of_weight, [N_PARTS, PART]), 1)
                tl.store(dw_ptr + offs + tl.arange(0, N_PARTS), parts)
        if IS_JOINT or IN_TILE:
            dq = dot(ds.to(k.dtype), k, dq)

    if BY_CHAPTER:
        is_last = tl.load(n_slots_ptr + entry // K, mask=valid, other=0) == slot + 1
        scatter_rows(acc_ptr, state * D, valid & (is_last == 0), dq, D, BLOCK_D)
        if HAS_WEIGHTS:
            offs = (entry.to(tl.int64) * n_heads + h_kv) * row_width + i
            tl.store(dw_ptr + offs, dw, mask=valid)
        valid &= is_last
    offs_dq = b * stride_dqb + h * stride_dqh + t * stride_dqt
    scatter_rows(dq_ptr, offs_dq, valid, dq * scale, D, BLOCK_D)
