"""Split the tokens of a call into pieces, each within one segment of every row."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from memattn.checks import is_static, must, plain_values
from memattn.parts.context import Angles, PartContext


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive tokens in one segment of each row.

    Attributes:
        rows: Number of first rows that the piece covers.
        begin: Index of its first token in the order of ``SegmentPieces.flat``.
        width: Tokens of each row, including missing ones, which come last.
        count: int32 ``[rows]``, existing tokens; None means all.
    """

    rows: int
    begin: int
    width: int
    count: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SegmentPieces:
    """A call ``[B, T]`` cut at segment ends, which may be at other tokens in each row.

    The first piece continues the open segment of each row; every later piece starts a segment. If
    all rows are cut at the same tokens, pieces are slices of the call. Otherwise tokens are
    gathered piece by piece, and each packed document becomes a row.

    Attributes:
        pieces: The pieces, at least one.
        phase: Index of the first token in its segment; int64 ``[R]`` if rows differ.
        index: int64 ``[G]``, index of each token in the call ``[B * T]``; None for slices.
        exists: bool ``[G]``, whether the token exists.
        back: int64 ``[B * T]``, index of each token of the call in the order of pieces.
        present: bool ``[B, T]``, tokens of the call that exist.
        positions: int64 ``[1, G]``.
    """

    pieces: Sequence[Piece]
    phase: int | Tensor
    index: Tensor | None = None
    exists: Tensor = field(default_factory=lambda: torch.empty(0))
    back: Tensor = field(default_factory=lambda: torch.empty(0))
    present: Tensor = field(default_factory=lambda: torch.empty(0))
    positions: Tensor = field(default_factory=lambda: torch.empty(0))

    def flat(self, x: Tensor) -> Tensor:
        """The tokens of ``[B, ..., T, F]`` in the order of pieces, ``[1, ..., G, F]``.

        Unchanged if pieces are slices.
        """
        if self.index is None:
            return x
        tokens = x.movedim(0, -3).flatten(-3, -2).index_select(-2, self.index)
        return torch.where(self.exists[:, None], tokens, 0.0)[None]

    def angles(self, context: PartContext, dtype: torch.dtype) -> Angles | None:
        """Cosines and sines for tokens in this order; None if positions are not rotary."""
        if self.index is None or context.rotary_embedding is None:
            return context.rotary
        return context.rotary_embedding(self.positions, dtype)

    def split(self, x: Tensor) -> list[Tensor]:
        """The pieces of ``[..., G, F]``, each ``[rows, ..., width, F]``."""
        # one split, not slices: the gradient of each slice would have the size of the whole
        if self.index is None:
            return list(x.split_with_sizes([piece.width for piece in self.pieces], -2))
        sizes = [piece.rows * piece.width for piece in self.pieces]
        parts = x[0].split_with_sizes(sizes, -2)
        return [
            torch.unflatten(part, -2, (piece.rows, piece.width)).movedim(-3, 0)
            for part, piece in zip(parts, self.pieces, strict=True)
        ]

    def split_or_none(self, x: Tensor | None) -> list[Tensor] | list[None]:
        """The pieces of ``x``; without it, None for each piece."""
        return [None] * len(self.pieces) if x is None else self.split(x)

    def split_angles(self, angles: Angles | None) -> list[Angles | None]:
        """The pieces of cosines and sines."""
        if angles is None:
            return [None] * len(self.pieces)
        return list(zip(*map(self.split, angles), strict=True))

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The reverse of ``split``."""
        if self.index is not None:
            pieces = [x.movedim(0, -3).flatten(-3, -2)[None] for x in pieces]
        return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), -2)

    def columns(self, x: Tensor) -> Tensor:
        """``[1, ..., G, F]`` in the order of the call, ``[B, ..., T, F]``; 0 for missing tokens."""
        if self.index is None:
            return x
        x = x[0].index_select(-2, self.back)
        x = torch.unflatten(x, -2, self.present.shape).movedim(-3, 0)
        shape = (self.present.shape[0], *[1] * (x.dim() - 3), self.present.shape[1], 1)
        return torch.where(self.present.view(shape), x, 0.0)


def segment_pieces(context: PartContext, shape: tuple[int, int], L: int) -> SegmentPieces:
    """Cut the call ``[B, T]`` of a context at the ends of segments of ``L`` tokens."""
    B, T = shape
    if torch.compiler.is_exporting() and not is_static(T):
        where = 'an exported program with the variant "mac" ("mac_parallel" takes any)'
        must("input_ids", f"have a fixed length in {where}", "a dynamic one", NotImplementedError)
    if context.cu_seqlens is not None:
        return _documents(context.cu_seqlens, T, L)
    state, phase = context.state, 0
    if state is not None and context.offset:
        phase = None if state.start is None else max(context.offset - state.start, 0) % L
    if phase is not None and context.present is None:
        widths = _widths(T, L, phase)
        begins = [sum(widths[:k]) for k in range(len(widths))]
        pieces = [Piece(rows=B, begin=b, width=w) for b, w in zip(begins, widths, strict=True)]
        return SegmentPieces(pieces=pieces, phase=phase)

    device = context.positions.device
    present, positions = context.present, context.positions.expand(B, T)
    if present is None:
        present = torch.ones(B, T, dtype=torch.bool, device=device)
    length, column = present.sum(1), torch.arange(T, device=device)
    first = length
    if T:  # a row without tokens stays at its position
        first = torch.where(present, column, T).amin(1)
        first = torch.where(length > 0, first, 0)
    place = positions.gather(1, first[:, None])[:, 0] if T else length
    if (
        phase is None
    ):  # it is part of the positions: pieces for rows that start anywhere in a segment
        phase = place % L
        widths = [min(T, L), *(_widths(T - 1, L, 0) if T > 1 else [])]
    else:
        widths = _widths(T, L, phase)
    rows = _Rows(first + T * torch.arange(B, device=device), length, place)
    return _gathered(rows, phase, [(B, width) for width in widths], present, L)


def _documents(cu_seqlens: Tensor, T: int, L: int) -> SegmentPieces:
    """Documents as rows, the longest first, so that each piece covers the first rows."""
    bounds: list[int] = plain_values(cu_seqlens)
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    order = sorted(range(len(lengths)), key=lambda d: -lengths[d])
    longest = lengths[order[0]]
    steps = [(len(lengths), min(longest, L))]
    for begun in range(L, longest, L):
        steps.append((sum(n > begun for n in lengths), min(longest - begun, L)))
    device = cu_seqlens.device
    start = torch.tensor([bounds[d] for d in order], device=device)
    length = torch.tensor([lengths[d] for d in order], device=device)
    present = torch.ones(1, T, dtype=torch.bool, device=device)
    return _gathered(_Rows(start, length, torch.zeros_like(start)), 0, steps, present, L)


class _Rows(NamedTuple):
    """Position of rows in the tokens of a call, int64 ``[R]`` each."""

    start: Tensor  # first token
    length: Tensor  # tokens
    place: Tensor  # index of its first token in its sequence


def _gathered(
    rows: _Rows, phase: int | Tensor, steps: list[tuple[int, int]], present: Tensor, L: int
) -> SegmentPieces:
    """Pieces with the given rows and tokens, left-aligned in every row."""
    device, n = present.device, present.numel()
    pieces: list[Piece] = []
    index: list[Tensor] = []
    exists: list[Tensor] = []
    positions: list[Tensor] = []
    begin, done = 0, torch.zeros_like(rows.length)
    for R, width in steps:
        start, length, place = (x[:R] for x in rows)
        done, room = done[:R], L - phase if begin == 0 else L
        count = (length - done).clamp(min=0)
        count = count.minimum(room) if isinstance(room, Tensor) else count.clamp(max=room)
        j = torch.arange(width, device=device)
        index.append(((start + done)[:, None] + j).flatten())
        exists.append((j < count[:, None]).flatten())
        positions.append(((place + done)[:, None] + j).flatten())
        pieces.append(Piece(rows=R, begin=begin, width=width, count=count.to(torch.int32)))
        begin, done = begin + R * width, done + count
    taken, there = torch.cat(index), torch.cat(exists)
    back = torch.zeros(n + 1, dtype=torch.int64, device=device)
    back = back.scatter(0, torch.where(there, taken, n), torch.arange(begin, device=device))[:n]
    return SegmentPieces(
        pieces=pieces,
        phase=phase,
        index=taken.clamp(0, max(n - 1, 0)),
        exists=there,
        back=back,
        present=present,
        positions=torch.cat(positions)[None],
    )


def _widths(T: int, L: int, phase: int) -> list[int]:
    """Lengths of the pieces of ``T`` tokens; the first token has index ``phase`` in its segment."""
    first = min(T, L - phase)
    whole, rest = (T - first) // L, (T - first) % L  # not divmod, which is not traced
    return [first, *[L] * whole, *[rest] * bool(rest)]
