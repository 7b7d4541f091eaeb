"""Which tokens of a sequence each process holds, and which of its neighbours' keys it needs.

Nothing here communicates, so that the prediction for many processes and the exchange use the same
code.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from memattn.checks import check_int, must


@dataclass(frozen=True)
class SequenceShards:
    """Consecutive tokens of one sequence over the processes of a group.

    Every process holds ``ceil(total_len / num_shards)`` tokens but the last, which holds the rest.

    Attributes:
        total_len: Tokens of the whole sequence.
        num_shards: Processes.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If one is below 1, or a process would hold no token.
    """

    total_len: int
    num_shards: int

    def __post_init__(self) -> None:
        check_int("num_shards", self.num_shards, 1)
        check_int("total_len", self.total_len, 1)
        if self.shard_len * (self.num_shards - 1) >= self.total_len:
            what = f"give each of {self.num_shards} processes a token"
            must("total_len", f"{what} (shards of {self.shard_len})", self.total_len)

    @property
    def shard_len(self) -> int:
        """Tokens of every process but the last."""
        return -(-self.total_len // self.num_shards)

    def bounds(self, rank: int) -> tuple[int, int]:
        """The first token of a process, and the one after its last."""
        start = rank * self.shard_len
        return start, min(start + self.shard_len, self.total_len)


class Piece(NamedTuple):
    """Tokens ``start`` to ``end`` of the whole sequence, from one process for another."""

    source: int
    target: int
    start: int
    end: int


@dataclass(frozen=True)
class Edges:
    """The tokens that each process needs from those before it, because its first queries see them.

    Attributes:
        shards: Who holds which token.
        segment_len: Tokens in a segment, or None.
        window_size: Keys in the window, the query's own included, or None.
        documents: Bounds ``0 ... total_len`` of packed documents; none is one document.
    """

    shards: SequenceShards
    segment_len: int | None
    window_size: int | None
    documents: tuple[int, ...] = ()

    def document_start(self, token: int) -> int:
        """Where the document of a token begins."""
        if not self.documents:
            return 0
        return self.documents[bisect_right(self.documents, token) - 1]

    def first_key(self, rank: int) -> int:
        """The first token that the queries of a process see.

        It begins the window of the first query or that query's segment, whichever is earlier. Later
        queries see no earlier token.
        """
        start, _ = self.shards.bounds(rank)
        begin = self.document_start(start)
        first = start
        if self.window_size is not None:
            first = start - self.window_size + 1
        if self.segment_len is not None:
            first = min(first, start - (start - begin) % self.segment_len)
        return max(first, begin)

    def edge_len(self, rank: int) -> int:
        """Keys that a process gets from those before it."""
        return self.shards.bounds(rank)[0] - self.first_key(rank)

    def received(self, rank: int) -> Iterator[Piece]:
        """The pieces that a process gets from one or several others, in the order of tokens."""
        first, (start, _) = self.first_key(rank), self.shards.bounds(rank)
        while first < start:
            source = first // self.shards.shard_len
            end = min(self.shards.bounds(source)[1], start)
            yield Piece(source, rank, first, end)
            first = end

    def sent(self, rank: int) -> Iterator[Piece]:
        """The pieces that a process sends, in the order of the receivers."""
        _, end = self.shards.bounds(rank)
        for target in range(rank + 1, self.shards.num_shards):
            pieces = [piece for piece in self.received(target) if piece.source == rank]
            yield from pieces
            if not pieces and self.shards.bounds(target)[0] - end >= self.reach:
                return  # those after see even less of this one

    @property
    def reach(self) -> int:
        """Tokens before its own that a query may see at most."""
        return max(self.window_size or 1, self.segment_len or 1) - 1


class EdgeBytes(NamedTuple):
    """Bytes of keys and values that one process exchanges in a forward pass.

    The backward pass sends as many bytes of gradients in the opposite direction.
    """

    sent: int
    received: int


def edge_bytes(
    total_len: int,
    num_shards: int,
    rank: int,
    *,
    segment_len: int | None = None,
    window_size: int | None = None,
    documents: Sequence[int] = (),
    batch: int = 1,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    element_size: int,
) -> EdgeBytes:
    """Predict what ``sequence_parallel_segmented_attention`` exchanges, without communicating.

    Args:
        total_len: Tokens of the whole sequence.
        num_shards: Processes of the group.
        rank: The process asked about.
        segment_len: Tokens in a segment.
        window_size: Keys in the window, the query's own included.
        documents: Bounds ``0 ... total_len`` of packed documents.
        batch: Sequences, ``B``.
        num_kv_heads: Key and value heads, ``Hkv``.
        head_dim: Features of a key, ``D``.
        value_dim: Features of a value, ``Dv``; None means ``head_dim``.
        element_size: Bytes of one element.

    Returns:
        Bytes of one call's forward pass; the backward pass sends ``received`` and receives
        ``sent``.

    Raises:
        ValueError: If ``rank`` is not one of the group, or a size is below 1.
    """
    shards = SequenceShards(total_len, num_shards)
    check_int("rank", rank, 0)
    if rank >= num_shards:
        must("rank", f"be below num_shards={num_shards}", rank)
    edges = Edges(shards, segment_len, window_size, tuple(documents))
    features = head_dim + (head_dim if value_dim is None else value_dim)
    token = batch * num_kv_heads * features * element_size
    sent, received = (
        token * sum(piece.end - piece.start for piece in pieces)
        for pieces in (edges.sent(rank), edges.received(rank))
    )
    return EdgeBytes(sent, received)
