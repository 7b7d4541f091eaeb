"""Index sets: which keys and rows of the table a query sees, and which queries see them.

A position ``i`` lies in a sequence ``[start, end)`` and counts from ``start``. Row ``c`` of the
table stands for position ``c + 1`` of the sequence or, by distance, for position ``i + c + 1``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def past_of_query(i, start, end, S):
    """Token keys ``[lo, hi)`` up to the query at ``i``."""
    return tl.maximum(start, 0) + 0 * i, tl.minimum(tl.minimum(i + 1, end), S)


@triton.jit
def ahead_of_query(i, start, end, S, table_len, F, BY_DISTANCE: tl.constexpr):
    """Token keys ``[lo, hi)`` of the band after the query, and whether the sequence has them all.

    ``hi`` is right where the sequence has them all.
    """
    hi = i + 1 + F
    if not BY_DISTANCE:
        hi = tl.minimum(hi, start + table_len + 1)
    return i + 1, hi, (i >= start) & (i + 1 < hi) & (hi <= tl.minimum(end, S))


@triton.jit
def rows_of_query(i, start, number, table_len, F, BY_DISTANCE: tl.constexpr,
                  PER_DOCUMENT: tl.constexpr):  # fmt: skip
    """Rows ``[lo, hi)`` of the table that stand for the band after the query."""
    if BY_DISTANCE:
        lo = 0 * i
        hi = lo + F
    else:
        lo = i - start
        hi = tl.minimum(lo + F, table_len)
    if PER_DOCUMENT:
        lo += number * table_len
        hi += number * table_len
    return lo, hi


@triton.jit
def table_groups(number, valid, IS_PACKED: tl.constexpr, BY_DISTANCE: tl.constexpr,
                 PER_DOCUMENT: tl.constexpr):  # fmt: skip
    """Split a tile of queries into groups that each see rows of the table without a gap.

    In a gap are rows that perhaps no query sees, with any content. Documents after the tile's first
    one all begin in the tile, so a table that they share has no gap there.

    Returns:
        The group of each query, and how many there are.
    """
    if IS_PACKED and PER_DOCUMENT:
        group = number - tl.min(tl.where(valid, number, 2**30))
        n_groups = tl.max(tl.where(valid, group + 1, 0))
    elif IS_PACKED and not BY_DISTANCE:
        group = tl.minimum(number - tl.min(tl.where(valid, number, 2**30)), 1)
        n_groups = tl.max(tl.where(valid, group + 1, 0))
    else:
        group = 0 * valid.to(tl.int32)
        n_groups = 1
    return group, n_groups


@triton.jit
def queries_of_past(j, end, query_offset, T):
    """Query rows ``[lo, hi)`` at or after the token key at ``j``."""
    return tl.maximum(j - query_offset, 0), tl.minimum(end - query_offset, T)


@triton.jit
def queries_of_ahead(j, start, end, table_len, F, query_offset, T,
                     BY_DISTANCE: tl.constexpr):  # fmt: skip
    """Query rows ``[lo, hi)`` with the token key at ``j`` in their band."""
    lo = tl.maximum(j - F, start)
    is_reached = j < end
    if not BY_DISTANCE:
        is_reached &= j - start <= table_len
    hi = tl.where(is_reached, j, lo)
    return tl.maximum(lo - query_offset, 0), tl.minimum(hi - query_offset, T)


@triton.jit
def queries_of_row(row, start, end, F, query_offset, T, BY_DISTANCE: tl.constexpr):
    """Query rows ``[lo, hi)`` of a sequence that see a row of its table."""
    if BY_DISTANCE:
        lo = start + 0 * row
        hi = end + 0 * row
    else:
        lo = start + tl.maximum(row + 1 - F, 0)
        hi = tl.minimum(start + row + 1, end)
    return tl.maximum(lo - query_offset, 0), tl.minimum(hi - query_offset, T)


def document_table(cu_seqlens: Tensor, S: int) -> Tensor:
    """int32 ``[3, S]``: start, end and number of the document of each position."""
    n_documents = cu_seqlens.numel() - 1
    positions, numbers = (
        torch.arange(n, device=cu_seqlens.device, dtype=torch.int32) for n in (S, n_documents)
    )
    document = torch.searchsorted(cu_seqlens[1:], positions, right=True)
    bounds = torch.stack([cu_seqlens[:-1], cu_seqlens[1:], numbers])
    return bounds.index_select(1, document.clamp_(max=n_documents - 1))
