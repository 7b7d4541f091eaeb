"""Reorder the columns of masks with holes, so that each row's tokens are contiguous, and back."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenOrder:
    """An order of the columns of a call in which each row's tokens are contiguous.

    Attributes:
        index: int64 ``[B, T]``, the original column at each new position.
        place: int64 ``[B, T]``, the new position of each original column.
        present: bool ``[B, T]``, which columns hold a token.
    """

    index: Tensor
    place: Tensor
    present: Tensor

    @classmethod
    def of(cls, present: Tensor, begun: Tensor | None = None) -> "TokenOrder":
        """The order for columns that hold a token where ``present`` (bool ``[B, T]``) is True.

        Columns before a row's first token stay in place; later columns without a token move after
        its tokens. In a row that has ``begun`` (bool ``[B]``), nothing stays before the first
        token. A contiguous row is unchanged.
        """
        leading = ~present.cumsum(1).bool()
        if begun is not None:
            leading = leading & ~begun[:, None]
        return cls._sorted((leading & ~present, present, ~leading & ~present), present)

    @classmethod
    def at_end(cls, present: Tensor) -> "TokenOrder":
        """The order in which each row's tokens come last, from bool ``[B, T]``."""
        return cls._sorted((~present, present), present)

    @classmethod
    def _sorted(cls, kinds: tuple[Tensor, ...], present: Tensor) -> "TokenOrder":
        """Columns of the first kind first; each is of one, bool ``[B, T]``."""
        column = torch.arange(present.shape[1], device=present.device).expand_as(present)
        place, before = torch.zeros_like(column), column[:, :1] * 0
        for kind in kinds:  # ONNX has no stable sort
            place = torch.where(kind, before + kind.long().cumsum(1) - 1, place)
            before = before + kind.long().sum(1, keepdim=True)
        return cls(torch.zeros_like(column).scatter(1, place, column), place, present)

    def put(self, x: Tensor) -> Tensor:
        """``[B or 1, T, ...]`` in this order, ``[B, T, ...]``."""
        return _take(x, self.index)

    def put_keys(self, x: Tensor) -> Tensor:
        """``put`` for ``[B or 1, H, T, D]``."""
        return take_columns(x, self.index)

    def put_input(self, name: str, x: Tensor) -> Tensor:
        """An extra input in this order; inputs without one entry per token are unchanged."""
        return self.put(x) if x.dim() >= 2 and x.shape[:2] == self.index.shape else x

    def columns(self, x: Tensor) -> Tensor:
        """The reverse of ``put``; 0 where a row with holes has no token."""
        x, column = _take(x, self.place), torch.arange(x.shape[1], device=x.device)
        kept = self.present | (self.index == column).all(1, keepdim=True)
        return torch.where(kept.view(*kept.shape, *[1] * (x.dim() - 2)), x, 0)

    def next_labels(self, labels: Tensor, ignored: int = -100) -> Tensor:
        """Label that each column predicts, ``[B, T]``, from labels of the columns.

        In a row with holes it is the label of the row's next token, and ``ignored`` without one or
        in a column without a token; in other rows it is that of the next column.
        """
        end = torch.full_like(labels[:, :1], ignored)
        there = self.put(self.present)
        ahead = torch.where(there, self.put(labels), ignored)
        ahead = torch.where(there, torch.cat([ahead[:, 1:], end], 1), ignored)
        column = torch.arange(labels.shape[1], device=labels.device)
        has_holes = (self.index != column).any(1, keepdim=True)
        return torch.where(has_holes, _take(ahead, self.place), torch.cat([labels[:, 1:], end], 1))

    def to(self, device: torch.device) -> "TokenOrder":
        """The same on another device."""
        return TokenOrder(*(x.to(device) for x in (self.index, self.place, self.present)))


def repeat_last(x: Tensor, present: Tensor) -> Tensor:
    """``x [B, T, E]`` in which each column without a token repeats the token before it.

    So the last column is each row's last token. Columns before the first token are 0.
    """
    count = present.long().cumsum(1)
    newest = present.shape[1] - count[:, -1:] + count - 1  # of those at the end
    column = TokenOrder.at_end(present).index.gather(1, newest.clamp(min=0))
    return torch.where((count > 0)[..., None], _take(x, column), 0)


def take_columns(x: Tensor, index: Tensor) -> Tensor:
    """``[B or 1, H, T, D]`` at the columns ``[B, N]``, ``[B, H, N, D]``."""
    return _take(x.transpose(1, 2), index).transpose(1, 2)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """``[B or 1, T, ...]`` at the columns ``[B, T]``."""
    shape = (*index.shape, *x.shape[2:])
    x = x.expand(index.shape[0], *x.shape[1:])
    return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(shape))
