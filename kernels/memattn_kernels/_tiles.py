"""One tile of scores, forward and backward, and the loops over the tiles in reach.

Weights of the backward are ``exp(score - lse)``, where ``lse`` and the scores' ``scale`` have
``exponent_factor`` in them and ``lse`` is infinite for a row without keys. With a ``cap_scale``
scores are the ``cap_products``, and ``scale`` is a ``score_scale``. A *target* is a second softmax
over the same keys that has a gradient of its own. It adds minus its weights times ``delta_target``.
"""

import triton
import triton.language as tl

from memattn_kernels._common import (
    cap_products,
    load_tile,
    n_partial_tiles,
    online_softmax_step,
    partial_tile,
    power,
    tile_ranges,
)
from memattn_kernels._products import dot


@triton.jit
def columns_between(lo, hi, n, BLOCK: tl.constexpr, IS_RELATIVE: tl.constexpr):
    """Whether rows see the columns from ``n``: ``lo[r] <= column < hi[r]``, ``[rows, BLOCK]``.

    With None as ``lo`` they see all columns before ``hi[r]``.

    IS_RELATIVE counts columns from ``n``, which makes them constants: fewer instructions, but a few
    registers more where bounds and other sources wait in them.
    """
    columns = tl.arange(0, BLOCK)
    if IS_RELATIVE:
        if lo is not None:
            lo -= n
        hi -= n
    else:
        columns += n
    if lo is None:
        return columns[None, :] < hi[:, None]
    else:
        return (columns[None, :] >= lo[:, None]) & (columns[None, :] < hi[:, None])


@triton.jit
def attend_tile(acc, l_i, m_i, q, k_ptr, v_ptr, stride_k, stride_v, n, lo, hi, last, scale,
                D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                BLOCK_DV: tl.constexpr, IS_RELATIVE: tl.constexpr,
                MASKED: tl.constexpr, cap_scale=None):  # fmt: skip
    """One tile of keys from column ``n``."""
    k = load_tile(k_ptr, n, stride_k, last, D, BLOCK_N, BLOCK_D, MASKED)
    products = dot(q, tl.trans(k))
    scores = cap_products(products, cap_scale, q.dtype)
    if MASKED:
        mask = columns_between(lo, hi, n, BLOCK_N, IS_RELATIVE)
        scores = tl.where(mask, scores, -float("inf"))
    v = load_tile(v_ptr, n, stride_v, last, DV, BLOCK_N, BLOCK_DV, MASKED)
    return online_softmax_step(acc, l_i, m_i, scores, v, scale)


@triton.jit
def attend(acc, l_i, m_i, q, k_ptr, v_ptr, stride_k, stride_v, lo, hi, valid, scale,
           D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
           BLOCK_DV: tl.constexpr, IS_RELATIVE: tl.constexpr,
           HAS_WHOLE_TILES: tl.constexpr, cap_scale=None):  # fmt: skip
    """Add all keys of one source to the running softmax: row ``r`` sees ``[lo[r], hi[r])``.

    IS_RELATIVE is that of ``columns_between``.
    """
    first, full_first, full_last, last = tile_ranges(lo, hi, valid, BLOCK_N)
    if not HAS_WHOLE_TILES:
        full_first = first
        full_last = first
    for index in range(n_partial_tiles(first, full_first, full_last, last, BLOCK_N)):
        n = partial_tile(index, first, full_first, full_last, BLOCK_N)
        acc, l_i, m_i = attend_tile(
            acc, l_i, m_i, q, k_ptr, v_ptr, stride_k, stride_v, n, lo, hi, last, scale,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, IS_RELATIVE, True, cap_scale,
        )  # fmt: skip
    if HAS_WHOLE_TILES:
        for n in range(full_first, full_last, BLOCK_N):
            acc, l_i, m_i = attend_tile(
                acc, l_i, m_i, q, k_ptr, v_ptr, stride_k, stride_v, n, lo, hi, last, scale,
                D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, IS_RELATIVE, False, cap_scale,
            )  # fmt: skip
    return acc, l_i, m_i


@triton.jit
def dq_tile(dq, pk, rest, q, do, lse, residual, delta, lse_target, residual_target, delta_target,
            k_ptr, v_ptr, stride_k, stride_v, n, lo, hi, last, scale, D: tl.constexpr,
            DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
            BLOCK_DV: tl.constexpr, HAS_TARGET: tl.constexpr, IS_CORRECTED: tl.constexpr,
            MASKED: tl.constexpr, cap_scale=None):  # fmt: skip
    """One tile of keys from column ``n``."""
    k = load_tile(k_ptr, n, stride_k, last, D, BLOCK_N, BLOCK_D, MASKED)
    v = load_tile(v_ptr, n, stride_v, last, DV, BLOCK_N, BLOCK_DV, MASKED)
    products = dot(q, tl.trans(k))
    scores = cap_products(products, cap_scale, q.dtype)
    x = scores * scale - lse[:, None]
    if q.dtype == tl.float32:
        x -= residual[:, None]
    p = power(x, q.dtype)
    if cap_scale is not None and not IS_CORRECTED:
        p *= 1.0 - scores * scores
    ds = p * (dot(do, tl.trans(v)) - delta[:, None])
    mask = columns_between(lo, hi, n, BLOCK_N, False)
    if IS_CORRECTED:
        if MASKED:
            ds = tl.where(mask, ds, 0.0)
            p = tl.where(mask, p, 0.0)
        rest += tl.sum(ds, 1)
        if cap_scale is not None:  # the slope of the cap, where scores may be NaN
            slope = 1.0 - scores * scores
            if MASKED:
                slope = tl.where(mask, slope, 0.0)
            p *= slope
            ds *= slope
        # transposed, as then the two products read k apart, when they need it
        pk = dot(tl.trans(k), tl.trans(p), pk)
    if HAS_TARGET:
        x = scores * scale - lse_target[:, None]
        if q.dtype == tl.float32:
            x -= residual_target[:, None]
        ds -= power(x, q.dtype) * delta_target[:, None]
    if MASKED:
        ds = tl.where(mask, ds, 0.0)
    dq = dot(ds.to(k.dtype), k, dq)
    return dq, pk, rest


@triton.jit
def dq_source(dq, pk, rest, q, do, lse, residual, delta, lse_target, residual_target, delta_target,
              k_ptr, v_ptr, stride_k, stride_v, lo, hi, valid, scale, D: tl.constexpr,
              DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
              BLOCK_DV: tl.constexpr, HAS_TARGET: tl.constexpr, IS_CORRECTED: tl.constexpr,
              HAS_WHOLE_TILES: tl.constexpr, cap_scale=None):  # fmt: skip
    """Add the gradient of the queries from all keys of one source that they see.

    IS_CORRECTED also adds up ``pk``, the keys times the weights, ``[BLOCK_D, BLOCK_M]``, and
    ``rest``, the sum of ``dS`` without the target's: see the kernel.
    """
    first, full_first, full_last, last = tile_ranges(lo, hi, valid, BLOCK_N)
    if not HAS_WHOLE_TILES:
        full_first = first
        full_last = first
    n_partial = n_partial_tiles(first, full_first, full_last, last, BLOCK_N)
    # a corrected loop needs its registers more than a tile that is loaded ahead
    for index in tl.range(n_partial, num_stages=1 if IS_CORRECTED else None):
        n = partial_tile(index, first, full_first, full_last, BLOCK_N)
        dq, pk, rest = dq_tile(
            dq, pk, rest, q, do, lse, residual, delta, lse_target, residual_target, delta_target,
            k_ptr, v_ptr, stride_k, stride_v, n, lo, hi, last, scale,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_TARGET, IS_CORRECTED, True, cap_scale,
        )  # fmt: skip
    if HAS_WHOLE_TILES:
        for n in range(full_first, full_last, BLOCK_N):
            dq, pk, rest = dq_tile(
                dq, pk, rest, q, do, lse, residual, delta, lse_target, residual_target,
                delta_target, k_ptr, v_ptr, stride_k, stride_v, n, lo, hi, last, scale,
                D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_TARGET, IS_CORRECTED, False, cap_scale,
            )  # fmt: skip
    return dq, pk, rest


@triton.jit
def _dkdv_tile(dk, dv, k, v, q_ptr, do_ptr, lse_ptr, residual_ptr, delta_ptr, dlse_ptr,
               lse_target_ptr, residual_target_ptr, delta_target_ptr, row,
               stride_q, stride_do, t, lo, hi, last, scale, D: tl.constexpr, DV: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
               MASKED: tl.constexpr):  # fmt: skip
    """One tile of queries from row ``t``; scores are transposed: keys by queries."""
    columns = tl.arange(0, BLOCK_M)
    mask_m = t + columns < last
    q = load_tile(q_ptr, t, stride_q, last, D, BLOCK_M, BLOCK_D, MASKED)
    do = load_tile(do_ptr, t, stride_do, last, DV, BLOCK_M, BLOCK_DV, MASKED)
    # padded by a tile, so no mask; pointer plus scalar first, which leaves one address for a thread
    row += t
    lse = tl.load(lse_ptr + row + columns)
    delta = tl.load(delta_ptr + row + columns)

    scores = dot(k, tl.trans(q))
    x = scores * scale - lse[None, :]
    if q.dtype == tl.float32:
        x -= tl.load(residual_ptr + row + columns, mask=mask_m, other=0.0)[None, :]
    p = power(x, q.dtype)
    mask = columns_between(lo, hi, t, BLOCK_M, False)
    if MASKED:
        p = tl.where(mask, p, 0.0)
    dv = dot(p.to(do.dtype), do, dv)
    ds = dot(v, tl.trans(do)) - delta[None, :]
    if q.dtype == tl.float32 and dlse_ptr is not None:
        ds += tl.load(dlse_ptr + row + columns, mask=mask_m, other=0.0)[None, :]
    ds *= p
    if lse_target_ptr is not None:
        x = scores * scale - tl.load(lse_target_ptr + row + columns)[None, :]
        if q.dtype == tl.float32:
            x -= tl.load(residual_target_ptr + row + columns, mask=mask_m, other=0.0)[None, :]
        ds -= power(x, q.dtype) * tl.load(delta_target_ptr + row + columns)[None, :]
    if MASKED:  # delta may be NaN where p is 0
        ds = tl.where(mask, ds, 0.0)
    dk = dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def dkdv_source(dk, dv, k, v, q_ptr, do_ptr, lse_ptr, residual_ptr, delta_ptr, dlse_ptr,
                lse_target_ptr, residual_target_ptr, delta_target_ptr, row, stride_q, stride_do,
                lo, hi, first, full_first, full_last, last, scale, D: tl.constexpr,
                DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
                BLOCK_DV: tl.constexpr):  # fmt: skip
    """Add the gradients of a tile of keys from the queries ``[lo, hi)`` of one head.

    ``first`` to ``last`` are their ``tile_ranges``, the same for all heads. The numbers of these
    queries, such as ``lse``, begin at ``row``.
    """
    for index in range(n_partial_tiles(first, full_first, full_last, last, BLOCK_M)):
        t = partial_tile(index, first, full_first, full_last, BLOCK_M)
        dk, dv = _dkdv_tile(
            dk, dv, k, v, q_ptr, do_ptr, lse_ptr, residual_ptr, delta_ptr, dlse_ptr,
            lse_target_ptr, residual_target_ptr, delta_target_ptr, row, stride_q, stride_do,
            t, lo, hi, last, scale, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, True,
        )  # fmt: skip
    for t in range(full_first, full_last, BLOCK_M):
        dk, dv = _dkdv_tile(
            dk, dv, k, v, q_ptr, do_ptr, lse_ptr, residual_ptr, delta_ptr, dlse_ptr,
            lse_target_ptr, residual_target_ptr, delta_target_ptr, row, stride_q, stride_do,
            t, lo, hi, last, scale, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, False,
        )  # fmt: skip
    return dk, dv
