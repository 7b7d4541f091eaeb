"""What a program works on: a tile of rows of one unit, and the keys that they see.

With ``G`` query heads for each key head, row ``i`` of a unit is head ``i % G`` of its entry
``i // G``: heads that share keys share a tile.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from memattn_kernels._tiles import attend_tile, dq_tile


class Rows(NamedTuple):
    """Rows of a tile, and the keys that they see. Behind the last of its unit a tile repeats it."""

    b: Any  # sequence
    f: Any  # branch
    h_kv: Any  # key head
    a: Any  # slot of each row
    h: Any  # its head
    t: Any  # its token
    entry: Any  # and its entry
    number: Any  # among all rows, active or not
    place: Any  # among all active rows of the key head
    valid: Any  # whether it is no repetition
    key_start: Any  # first key of all
    key_end: Any  # the one after the last that a row sees


@triton.jit
def rows_of_tile(tile, unit, h_kv, F, H, n_documents, first_ptr, entry_ptr, bounds_ptr,
                 key_start_ptr, key_end_ptr, A: tl.constexpr, G: tl.constexpr, T,
                 BLOCK_M: tl.constexpr):  # fmt: skip
    """The rows of a tile, which are some of ``unit``."""
    begin, end = tl.load(bounds_ptr + unit), tl.load(bounds_ptr + unit + 1)
    branch = unit // n_documents
    i = tl.load(first_ptr + tile) + tl.arange(0, BLOCK_M)
    n_rows = (end - begin) * G
    valid = i < n_rows
    i = tl.minimum(i, n_rows - 1)
    entry = tl.load(entry_ptr + begin + i // G)
    b = branch // F
    a, t = entry % A, entry // A - b * T
    h = h_kv * G + i % G
    number = ((b * A + a).to(tl.int64) * H + h) * T + t
    key_end = tl.load(key_end_ptr + b * T + t)
    key_start = tl.load(key_start_ptr + b * T + tl.min(t))
    return Rows(
        b.to(tl.int64), (branch % F).to(tl.int64), h_kv.to(tl.int64), a.to(tl.int64),
        h.to(tl.int64), t.to(tl.int64), entry, number, begin * G + i, valid, key_start, key_end,
    )  # fmt: skip


@triton.jit
def at_slots(r, stride_b, stride_s, stride_h, stride_t):
    """Where rows lie in a tensor ``[B, A, H, T, ...]``."""
    return r.b * stride_b + r.a * stride_s + r.h * stride_h + r.t * stride_t


@triton.jit
def at_branch(ptr, r, stride_b, stride_f, stride_h):
    """Where the rows' branch begins in a tensor ``[B, F, Hkv, ...]``."""
    return ptr + r.b * stride_b + r.f * stride_f + r.h_kv * stride_h


@triton.jit
def attend_until(acc, l_i, m_i, q, k_ptr, v_ptr, stride_k, stride_v, first, last, scale,
                 D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                 BLOCK_DV: tl.constexpr):  # fmt: skip
    """Add the keys ``[first, last[r])`` to the running softmax of row ``r``.

    Tiles of keys rise from ``first``, which is that of the unit, whatever rows a tile has: other
    tokens change no bit of a row.
    """
    n_whole = (tl.min(last) - first) // BLOCK_N
    end = tl.max(last)
    for n in range(first, first + n_whole * BLOCK_N, BLOCK_N):
        acc, l_i, m_i = attend_tile(
            acc, l_i, m_i, q, k_ptr, v_ptr, stride_k, stride_v, n, None, last, end, scale,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, True, False,
        )  # fmt: skip
    for n in range(first + n_whole * BLOCK_N, end, BLOCK_N):
        acc, l_i, m_i = attend_tile(
            acc, l_i, m_i, q, k_ptr, v_ptr, stride_k, stride_v, n, None, last, end, scale,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, True, True,
        )  # fmt: skip
    return acc, l_i, m_i


@triton.jit
def dq_until(dq, pk, rest, q, do, lse, residual, delta, k_ptr, v_ptr, stride_k, stride_v, first,
             last, scale, D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
             IS_CORRECTED: tl.constexpr):  # fmt: skip
    """Add the gradient of the queries from the keys ``[first, last[r])``, in the same order.

    IS_CORRECTED is that of ``dq_source``.
    """
    n_whole = (tl.min(last) - first) // BLOCK_N
    end = tl.max(last)
    for n in range(first, first + n_whole * BLOCK_N, BLOCK_N):
        dq, pk, rest = dq_tile(
            dq, pk, rest, q, do, lse, residual, delta, lse, lse, lse,
            k_ptr, v_ptr, stride_k, stride_v, n, None, last, end, scale,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, False, IS_CORRECTED, False,
        )  # fmt: skip
    # a corrected loop needs its registers more than a tile that is loaded ahead
    stages: tl.constexpr = 1 if IS_CORRECTED else None
    for n in tl.range(first + n_whole * BLOCK_N, end, BLOCK_N, num_stages=stages):
        dq, pk, rest = dq_tile(
            dq, pk, rest, q, do, lse, residual, delta, lse, lse, lse,
            k_ptr, v_ptr, stride_k, stride_v, n, None, last, end, scale,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, False, IS_CORRECTED, True,
        )  # fmt: skip
    return dq, pk, rest
