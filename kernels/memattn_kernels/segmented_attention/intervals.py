"""Index sets: which keys a query sees, and which queries see a key, as intervals.

A position ``i`` lies in a sequence ``[start, end)``; segments and windows count from ``start``.
Segment and window both hold ``i`` itself, so their union is one interval as well. The first
N_SINKS tokens of a sequence are a second one, which ends before the other begins.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def tokens_of_query(i, start, end, S, L, W, n_sinks, IS_CAUSAL: tl.constexpr):
    """Token keys ``[lo, hi)`` that the query at ``i`` sees, sinks among them if these adjoin."""
    key_end = tl.minimum(end, S)
    if L is None and W is None:
        lo = start + 0 * i
        hi = key_end + 0 * i
    else:
        lo = i
        hi = i + 1
        if L is not None:
            lo = i - (i - start) % L
            hi = lo + L
        if W is not None:
            lo = tl.minimum(lo, i - W + 1)
            hi = tl.maximum(hi, i + W)
        if n_sinks is not None:
            first = tl.maximum(start, 0)
            adjoins = lo <= first + n_sinks
            lo = tl.where(adjoins, first, lo)
            hi = tl.where(adjoins, tl.maximum(hi, first + n_sinks), hi)
    if IS_CAUSAL:
        hi = i + 1
    return tl.maximum(tl.maximum(lo, start), 0), tl.minimum(hi, key_end)


@triton.jit
def queries_of_token(j, start, end, L, W, n_sinks, IS_CAUSAL: tl.constexpr):
    """Positions ``[lo, hi)`` of the queries that see the token key at ``j``."""
    if L is None and W is None:
        lo = start + 0 * j
        hi = end + 0 * j
    else:
        lo = j
        hi = j + 1
        if L is not None:
            lo = j - (j - start) % L
            hi = lo + L
        if W is not None:
            lo = tl.minimum(lo, j - W + 1)
            hi = tl.maximum(hi, j + W)
        if n_sinks is not None:
            is_sink = j < tl.maximum(start, 0) + n_sinks
            lo = tl.where(is_sink, start, lo)
            hi = tl.where(is_sink, end, hi)
    if IS_CAUSAL:
        lo = j
    return tl.maximum(lo, start), tl.minimum(hi, end)


@triton.jit
def sinks_of_query(lo, start, end, S, n_sinks):
    """Token keys ``[first, last)`` that a query sees beside its ``tokens_of_query`` from ``lo``."""
    first = tl.maximum(start, 0) + 0 * lo
    last = tl.minimum(first + n_sinks, tl.minimum(end, S))
    return first, tl.where(lo > first, last, first)


@triton.jit
def memory_of_query(i, start, first_segment, n_rows, L, M, MEMORY_IS_CAUSAL: tl.constexpr):
    """Rows ``[lo, hi)`` of the flattened memory ``[n_segments * M]`` that the query sees."""
    lo = (first_segment + (i - start) // L) * M
    hi = lo + M
    if MEMORY_IS_CAUSAL:
        hi = lo + (i - start) % L + 1
    return lo, tl.minimum(hi, n_rows)


def document_table(cu_seqlens: Tensor, S: int, segment_len: int | None) -> Tensor:
    """int32 ``[3, S]``: start, end and first segment of the document of each position."""
    positions = torch.arange(S, device=cu_seqlens.device, dtype=torch.int32)
    document = torch.searchsorted(cu_seqlens[1:], positions, right=True)
    document = document.clamp_(max=cu_seqlens.numel() - 2)
    first_segment = first_segments(cu_seqlens, segment_len)
    bounds = torch.stack([cu_seqlens[:-1], cu_seqlens[1:], first_segment[:-1]])
    return bounds.index_select(1, document)


def first_segments(cu_seqlens: Tensor, segment_len: int | None) -> Tensor:
    """int32 ``[n+1]``: number of segments before each document, and of all."""
    if segment_len is None:
        return torch.zeros_like(cu_seqlens)
    counts = (cu_seqlens.diff() + (segment_len - 1)) // segment_len
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def segment_table(cu_seqlens: Tensor, n_segments: int, segment_len: int) -> Tensor:
    """int32 ``[2, n_segments]``: first position and end of each segment of packed documents."""
    first = first_segments(cu_seqlens, segment_len)
    segments = torch.arange(n_segments, device=cu_seqlens.device, dtype=torch.int32)
    document = torch.searchsorted(first[1:], segments, right=True)
    document = document.clamp_(max=cu_seqlens.numel() - 2)
    start = cu_seqlens[document] + (segments - first[document]) * segment_len
    # a segment that no document has starts at or after its end, so it is empty
    return torch.stack([start, torch.minimum(start + segment_len, cu_seqlens[document + 1])])
