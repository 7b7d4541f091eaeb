"""Sources of future keys: parameters by position, by distance, or computed from tokens.

A source is a module with ``future_index`` (the operator's option of that name) and three methods:
``num_rows``, the number of rows that a call needs; ``latent``, the projection of a token for later
rows, which the cache keeps; and ``forward``, the rows.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.checks import check_int, must
from memattn.nn.rotary import apply_rotary


class FutureRows(NamedTuple):
    """Future keys and values in the form of ``memattn.future_attention``."""

    key: Tensor  # [H, R, D], or [n, H, R, D] with rows for each sequence or document
    value: Tensor  # like key


class FutureTable(nn.Module):
    """Parameters at absolute positions: row ``c`` is for position ``c + 1``.

    Args:
        num_heads: Heads, ``H``.
        head_dim: Features of a head, ``D``.
        future_dim: Positions that a query sees ahead.
        num_positions: Positions of the longest sequence, ``N_ctx``; there are ``N_ctx - 1`` rows.

    Raises:
        ValueError: If a size is below 1, or ``future_dim`` is above ``num_positions - 1``.
    """

    future_index = "position"

    def __init__(self, num_heads: int, head_dim: int, future_dim: int, num_positions: int) -> None:
        super().__init__()
        check_int("num_positions", num_positions, 2)
        check_int("future_dim", future_dim, 1)
        if future_dim > num_positions - 1:
            must("future_dim", f"be at most num_positions - 1 = {num_positions - 1}", future_dim)
        self.future_dim = future_dim
        self.num_positions = num_positions
        self.key = nn.Parameter(torch.empty(num_heads, num_positions - 1, head_dim))
        self.value = nn.Parameter(torch.empty(num_heads, num_positions - 1, head_dim))
        nn.init.normal_(self.key, std=0.02)
        nn.init.normal_(self.value, std=0.02)

    def num_rows(self, length: int) -> int:
        """Number of rows that sequences of at most ``length`` tokens can see.

        All rows while a program is exported, as the number must not depend on the length.
        """
        if torch.compiler.is_exporting():
            return self.num_positions - 1
        return min(self.num_positions - 1, max(length - 1, 0) + self.future_dim)

    def latent(self, hidden_states: Tensor) -> Tensor | None:
        """Projections ``[B, 1, T, rank]`` of tokens ``[B, T, E]`` for later rows: here None."""
        return None

    def forward(
        self,
        num_rows: int,
        *,
        first_row: int = 0,
        rotary: tuple[Tensor, Tensor] | None = None,
        latent: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seq_start: Tensor | None = None,
    ) -> FutureRows:
        """The first ``num_rows`` rows.

        Args:
            num_rows: Result of the method ``num_rows``.
            first_row: First row that a query sees; earlier rows may be zeros.
            rotary: Cosines and sines ``[1, 1, R, D/2]`` of positions 1, 2, ...; at least
                ``num_rows`` of them. None means no rotation.
            latent: ``[B, 1, S, rank]``, of all tokens up to the last query.
            cu_seqlens: int32 ``[n+1]`` or None, bounds of packed documents.
            seq_start: int32 ``[B]`` or None, the first column of each sequence.
        """
        if rotary is None:
            return FutureRows(self.key[:, :num_rows], self.value[:, :num_rows])
        key = _rotate(self.key[:, first_row:num_rows], rotary, first_row)
        return FutureRows(_behind_zeros(key, first_row), self.value[:, :num_rows])

    def extra_repr(self) -> str:
        H, R, D = self.key.shape
        return f"num_heads={H}, num_rows={R}, head_dim={D}, future_dim={self.future_dim}"


class FutureRelative(FutureTable):
    """Parameters by distance: row ``c`` is for the position ``c + 1`` after the query.

    There is no limit on the length of a sequence. Rows are rotated by their distance and multiplied
    with the unrotated query, which gives the rotation between the two positions.

    Args:
        num_heads: Heads, ``H``.
        head_dim: Features of a head, ``D``.
        future_dim: Positions that a query sees ahead, and rows.
    """

    future_index = "distance"

    def __init__(self, num_heads: int, head_dim: int, future_dim: int) -> None:
        check_int("future_dim", future_dim, 1)
        super().__init__(num_heads, head_dim, future_dim, future_dim + 1)


class FutureComputed(FutureTable):
    """Parameters at absolute positions plus a low-rank projection of an earlier token.

    The row for position ``p`` uses the token at ``p - future_dim``. The first query that sees the
    row is at that token, so no later token is used. Rows for positions below ``future_dim`` have no
    such token and are only parameters.

    Args:
        hidden_size: Features of the hidden states, ``E``.
        num_heads: Heads, ``H``.
        head_dim: Features of a head, ``D``.
        future_dim: Positions that a query sees ahead.
        num_positions: Positions of the longest sequence.
        rank: Features that a token is projected to.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        future_dim: int,
        num_positions: int,
        rank: int,
    ) -> None:
        super().__init__(num_heads, head_dim, future_dim, num_positions)
        check_int("rank", rank, 1)
        self.down_proj = nn.Linear(hidden_size, rank, bias=False)
        self.key_proj = nn.Linear(rank, num_heads * head_dim, bias=False)
        self.value_proj = nn.Linear(rank, num_heads * head_dim, bias=False)
        nn.init.normal_(self.key_proj.weight, std=0.02)
        nn.init.normal_(self.value_proj.weight, std=0.02)

    def latent(self, hidden_states: Tensor) -> Tensor:
        """The projected tokens, ``[B, 1, T, rank]``."""
        return self.down_proj(hidden_states)[:, None]

    def forward(
        self,
        num_rows: int,
        *,
        first_row: int = 0,
        rotary: tuple[Tensor, Tensor] | None = None,
        latent: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seq_start: Tensor | None = None,
    ) -> FutureRows:
        """Rows ``[B, H, R, D]`` for each sequence, or ``[n, H, R, D]`` for each document."""
        assert latent is not None
        rows = slice(first_row, num_rows)
        source = self._source(latent, rows, cu_seqlens, seq_start)  # [n, R, rank]
        key, value = (
            table[:, rows] + rearrange(proj(source), "b t (h d) -> b h t d", h=len(table))
            for table, proj in ((self.key, self.key_proj), (self.value, self.value_proj))
        )
        key = _rotate(key, rotary, first_row)
        return FutureRows(_behind_zeros(key, first_row), _behind_zeros(value, first_row))

    def _source(
        self,
        latent: Tensor,
        rows: slice,
        cu_seqlens: Tensor | None,
        seq_start: Tensor | None,
    ) -> Tensor:
        """The latent for each row, ``[n, R, rank]``; 0 for rows without a token.

        A row whose token does not exist yet gets an arbitrary one: no query sees it.
        """
        sequence = torch.arange(latent.shape[0], device=latent.device)[:, None]
        start = torch.zeros_like(sequence)
        if seq_start is not None:
            start = seq_start.long()[:, None]
        if cu_seqlens is not None:
            start = cu_seqlens.long()[:-1, None]
        position = torch.arange(rows.start + 1, rows.stop + 1, device=latent.device)
        position = position - self.future_dim  # of the token that a row uses
        column = (start + position).clamp(0, latent.shape[2] - 1)  # [n, R]
        return latent[sequence, 0, column].masked_fill((position < 0)[:, None], 0.0)


def _rotate(key: Tensor, rotary: tuple[Tensor, Tensor] | None, first_row: int) -> Tensor:
    """Rotate the rows ``[..., R, D]`` from ``first_row`` on by their own positions."""
    if rotary is None:
        return key
    last_row = first_row + key.shape[-2]
    cos, sin = (t[0, :, first_row:last_row] for t in rotary)  # [1, R, D/2]
    if rotary[0].shape[2] < last_row:
        got = rotary[0].shape[2]
        must("future_rotary", f"have a row for each of {last_row} positions", got)
    return apply_rotary(key, cos, sin)


def _behind_zeros(rows: Tensor, first_row: int) -> Tensor:
    """The rows ``[..., R, D]`` with zeros before them, at their indices in the whole table."""
    return F.pad(rows, (0, 0, first_row, 0)) if first_row else rows
