"""Which queries share a row of routing decisions: an interval for each row."""

import torch
from torch import Tensor

from memattn.checks import must, values_to_check


def routing_rows(
    query: Tensor,
    n_rows: int,
    *,
    whole: bool,
    routing_block: int | None,
    query_offset: int,
    cu_seqlens: Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
) -> tuple[Tensor, Tensor, int]:
    """Bounds of every routing row in queries, int32 ``[B, N]`` each, and its largest length.

    Args:
        query: ``[B, H, T, D]``.
        n_rows: Rows of the indices.
        whole: Whether one row is for the whole sequence.
        routing_block: Tokens in a block, or None for a row for each query.
        query_offset: Position of the first query.
        cu_seqlens: int32 ``[n + 1]``, bounds of packed documents, or None.
        seq_start: int32 ``[B]``, first position of each sequence, or None.
        seq_end: int32 ``[B]``, position after its last, or None.

    Raises:
        ValueError: If there are too few or too many rows for the tokens.
    """
    B, _, T, _ = query.shape
    device = query.device

    def as_column(bound: Tensor | None, default: int) -> Tensor:
        if bound is None:
            return torch.full((B, 1), default, dtype=torch.long, device=device)
        return bound.long()[:, None]

    first = as_column(seq_start, 0)
    last = as_column(seq_end, query_offset + T).clamp(max=query_offset + T)
    row = torch.arange(n_rows, device=device).expand(B, n_rows)
    if whole:
        begin, end, length = first.expand(B, 1), last.expand(B, 1), T
    elif routing_block is None:
        begin, end, length = row + query_offset, row + query_offset + 1, 1
    elif cu_seqlens is not None:
        begin, end = _document_blocks(cu_seqlens, row, routing_block, query_offset)
        length = min(routing_block, T)
        _check_documents(cu_seqlens, n_rows, routing_block, query_offset, T)
    else:
        # the first row is that of the block with the first query
        block = (query_offset - first).clamp(min=0) // routing_block + row
        begin = first + block * routing_block
        end, length = begin + routing_block, min(routing_block, T)
        _check_sequences(seq_start, seq_end, B, n_rows, routing_block, query_offset, T)
    lowest = first.clamp(min=query_offset)
    begin, end = (
        (bound.maximum(lowest).minimum(last.maximum(lowest)) - query_offset).clamp(0, T)
        for bound in (begin, end)
    )
    return begin.int().contiguous(), end.int().contiguous(), length


def _document_blocks(
    cu_seqlens: Tensor, row: Tensor, routing_block: int, query_offset: int
) -> tuple[Tensor, Tensor]:
    """Bounds ``[1, N]`` of the blocks of all documents in order, from that of the first query."""
    cu = cu_seqlens.long()
    first = cu.new_zeros(cu.numel())
    first[1:] = ((cu.diff() + routing_block - 1) // routing_block).cumsum(0)

    def document_of(bounds: Tensor, x: Tensor) -> Tensor:
        found = torch.searchsorted(bounds[1:].contiguous(), x, right=True)
        return found.clamp(max=cu.numel() - 2)

    at = torch.full_like(row[:, :1], query_offset)
    now = document_of(cu, at)
    row = row + first[now] + (at - cu[now]) // routing_block
    document = document_of(first, row)
    begin = cu[document] + (row - first[document]) * routing_block
    return begin, (begin + routing_block).minimum(cu[document + 1])


def _check_documents(
    cu_seqlens: Tensor, n_rows: int, routing_block: int, query_offset: int, T: int
) -> None:
    bounds = values_to_check(cu_seqlens, n_rows, routing_block, query_offset, T)
    if bounds is None or not T:
        return
    documents = zip(bounds, bounds[1:], strict=False)
    starts = [start for begin, end in documents for start in range(begin, end, routing_block)]
    _check_number(n_rows, sum(1 for s in starts if s > query_offset) + 1)


def _check_sequences(
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    B: int,
    n_rows: int,
    routing_block: int,
    query_offset: int,
    T: int,
) -> None:
    what = (n_rows, routing_block, query_offset, T)
    starts = None if seq_start is None else values_to_check(seq_start, *what)
    ends = None if seq_end is None else values_to_check(seq_end, *what)
    unread = (seq_start is not None and starts is None) or (seq_end is not None and ends is None)
    if unread or not B:
        return
    rows = 1 if starts is None and ends is None else B  # all alike; B may be traced
    starts = [0] * rows if starts is None else starts
    ends = [query_offset + T] * rows if ends is None else ends
    wanted = 0
    for start, end in zip(starts, ends, strict=True):
        begin, end = max(query_offset - start, 0), min(end, query_offset + T) - start
        if end > begin:
            blocks = (end + routing_block - 1) // routing_block - begin // routing_block
            wanted = max(wanted, blocks)
    if seq_start is None and seq_end is None:
        _check_number(n_rows, wanted)
    elif n_rows < wanted:
        must("chapter_indices", f"have at least N={wanted} rows for these blocks", n_rows)


def _check_number(n_rows: int, wanted: int) -> None:
    if n_rows != wanted:
        must("chapter_indices", f"have N={wanted} rows, one for each block", n_rows)
