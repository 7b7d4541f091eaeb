"""Cached state of chapter memory: the chapters of the open block, and inputs for later blocks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn.checks import must
from memattn.nn import ProjectedChapters
from memattn.parts.state import PartState

Slots = tuple[Tensor, Tensor, Tensor]  # total [B, S, E], indices [B, S, K], weights [B, S, K]
SLOTS = 2  # blocks whose chapters and sums are kept: the newest and the one before


class RoutingState(PartState):
    """The last inputs; for the last two blocks, their chapters and the sum of inputs before them.

    A crop of up to ``routing_block`` tokens is exact. A longer crop is refused, unless the past is
    recorded. Rows are aligned at the newest block.

    Args:
        kind: The part that it belongs to.
        segment_len: None.
        window_size: One more than the number of kept inputs; None if none are needed.
        routing_block: Tokens in a block; None if tokens are routed one by one, so that nothing is
            kept.
        routing_window: Tokens of the rolling window.
    """

    __slots__ = ("projected", "open_chapters")

    def __init__(
        self,
        kind: str,
        segment_len: int | None = None,
        window_size: int | None = None,
        routing_block: int | None = None,
        routing_window: int | None = None,
    ) -> None:
        self.routing_block = routing_block
        self.routing_window = routing_window
        super().__init__(kind, segment_len, window_size)

    @classmethod
    def for_blocks(cls, kind: str, routing_block: int, routing_window: int) -> "RoutingState":
        """The empty state for routing by blocks."""
        needed = max(routing_block, routing_window - 1)
        return cls(kind, None, needed + routing_block + 1, routing_block, routing_window)

    def _clear(self) -> None:
        super()._clear()
        # belongs to the bank, not to a sequence, and follows from the weights: not saved or counted
        self.projected: ProjectedChapters | None = None
        # the open chapters that were projected, with their keys, values and weights
        self.open_chapters: tuple[Any, list[tuple[ProjectedChapters, float]]] | None = None

    def describe(self) -> dict[str, Any]:
        own = dict(routing_block=self.routing_block, routing_window=self.routing_window)
        return {**super().describe(), **own}

    def slots(self) -> Slots:
        """Sums of inputs before the last blocks, and the chapters of these blocks."""
        return self.rows["total"], self.rows["indices"], self.rows["weights"]

    def keep_blocks(
        self,
        blocks: Slots,
        newest: Tensor,
        length: Tensor,
        continues: Tensor,
        began: Tensor,
    ) -> None:
        """Store the last blocks after a call.

        Args:
            blocks: Sums before the blocks of the call, and their chapters, ``[B, N, .]``.
            newest: int64 ``[B]``, the block that holds the last token.
            length: int64 ``[B]``, tokens of each row so far.
            continues: bool ``[B]``, whether the first block continues the newest one before this
                call.
            began: bool ``[B]``, whether the row had tokens before this call.
        """
        past = self.slots() if self.rows else None
        held = past[0].shape[1] if past else 0
        S = held + blocks[0].shape[1] if self.record_past else SLOTS
        column = newest[:, None] + torch.arange(-S + 1, 1, device=newest.device)  # [B, S]
        values = [_take(new, column) for new in blocks]
        known = newest + 1
        if past is not None:
            back = held + column - continues.long()[:, None]
            values = [
                torch.where((column >= 0)[..., None], new, _take(old, back))
                for new, old in zip(values, past, strict=True)
            ]
            earlier = self.rows["known"] - continues.long()
            known = known + torch.where(began, earlier, 0)
        self.rows = {
            "total": values[0],
            "indices": values[1],
            "weights": values[2],
            "known": torch.where(length > 0, known, 0).clamp(max=S),
            "length": length.clamp(min=0),
        }

    def reset(self, mask: Tensor) -> None:
        for name in ("known", "length"):
            if name in self.rows:
                value = self.rows[name]
                self.rows[name] = value.masked_fill(mask.to(value.device), 0)

    def apply(self, function: Callable[[Tensor], Tensor]) -> "RoutingState":
        other = super().apply(function)
        assert isinstance(other, RoutingState)
        other.projected, other.open_chapters = self.projected, self.open_chapters
        return other

    @classmethod
    def merge(cls, states: "list[PartState]") -> "RoutingState":
        widest = max((s.rows["total"].shape[1] for s in states if s.rows), default=0)
        widened: list[PartState] = []
        for state in states:
            other = state.apply(lambda tensor: tensor)
            for name in ("total", "indices", "weights"):
                if name in other.rows:
                    value = other.rows[name]
                    other.rows[name] = F.pad(value, (0, 0, widest - value.shape[1], 0))
            widened.append(other)
        merged = super().merge(widened)
        assert isinstance(merged, RoutingState) and isinstance(states[0], RoutingState)
        merged.projected = states[0].projected
        merged.open_chapters = states[0].open_chapters
        return merged

    def _cropped(self, removed: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lengths after a crop, the number of removed blocks, and which blocks are still known."""
        R, length = self.routing_block, self.rows["length"]
        assert R is not None
        after = (length - removed).clamp(min=0)
        last, newest = (torch.div(n - 1, R, rounding_mode="floor") for n in (length, after))
        away = last - newest
        return after, away, (self.rows["known"] - away).clamp(min=0)

    def check_crop(
        self, num_columns: int, position: int, lacks: bool, counts: Tensor | None = None
    ) -> None:
        if not self.rows or (not num_columns and counts is None):
            return
        removed = self._removed(num_columns, counts)
        R, W = self.routing_block, self.routing_window
        assert R is not None and W is not None
        after, _, known = self._cropped(removed)
        needed = after.clamp(max=max(R, W - 1))
        kept = (position - self.first_kept(position, len(after))).to(after.device)
        if ((after > 0) & (known < 1)).any() or (needed > kept - removed).any():
            why = f"be at least {-R}, the routing block of {self.kind}"
            must("tokens_to_remove", f"{why} (see activate_past_recording)", -num_columns)

    def crop(self, num_columns: int, counts: Tensor | None = None) -> None:
        if self.rows and (num_columns or counts is not None):
            after, away, known = self._cropped(self._removed(num_columns, counts))
            S = self.rows["total"].shape[1]
            slot = torch.arange(S, device=away.device) - away[:, None]
            for name in ("total", "indices", "weights"):
                self.rows[name] = _take(self.rows[name], slot)[:, -SLOTS:].clone()
            self.rows["known"], self.rows["length"] = known.clamp(max=SLOTS), after
        super().crop(num_columns, counts)

    def _removed(self, num_columns: int, counts: Tensor | None) -> int | Tensor:
        """Number of tokens that a crop removes from each row."""
        return num_columns if counts is None else counts.to(self.rows["length"].device)


def _take(x: Tensor, column: Tensor) -> Tensor:
    """``x [B, N, F]`` at columns ``[B, S]``; results outside the range are arbitrary."""
    column = column.clamp(0, x.shape[1] - 1)[..., None]
    return x.gather(1, column.expand(-1, -1, x.shape[2]))
