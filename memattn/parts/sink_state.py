"""Cached state of attention with sink tokens: the last tokens and the first tokens."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from memattn.parts.state import PartState, take_tokens

SINK = "sink_"  # prefix of a token tensor's name: its first tokens, stored as a row tensor


class SinkState(PartState):
    """The tokens within segment and window, and the first ``num_sink_tokens`` of each row.

    If the first tokens of the batch were dropped, returned tensors start with each row's first
    tokens, followed by the kept ones. Bounds count them: ``num_sink_tokens`` keys represent the
    start of a row whose first token was dropped. A crop needs no extra work: first tokens that it
    removes are overwritten by the next tokens.

    Args:
        kind: The part that it belongs to.
        segment_len: Segment length of the attention, or None.
        window_size: Window of the attention, or None.
        num_sink_tokens: First tokens of each row that all its tokens see.
    """

    __slots__ = ("_new", "_moved")

    def __init__(
        self,
        kind: str,
        segment_len: int | None = None,
        window_size: int | None = None,
        num_sink_tokens: int = 0,
    ) -> None:
        self.num_sink_tokens = num_sink_tokens
        super().__init__(kind, segment_len, window_size)

    def _clear(self) -> None:
        super()._clear()
        self._new: Tensor | None = None  # int64 [B, n], new columns that are first tokens
        self._moved: Tensor | None = None  # int64 [B, n], their index among first tokens

    def describe(self) -> dict[str, Any]:
        own = {"num_sink_tokens": self.num_sink_tokens} if self.num_sink_tokens else {}
        return {**super().describe(), **own}

    def place(self, seq_start: Tensor, position: int) -> None:
        n, always = self.num_sink_tokens, torch.compiler.is_exporting()
        self._new = self._moved = None
        if not n:
            self.lead = 0
            return
        has_dropped = bool(self.tokens) if always else position > self.kept
        self.lead = n if has_dropped else 0
        number = torch.arange(n, device=seq_start.device)
        begin = seq_start - position
        if always or (begin > -n).any():
            self._new = begin[:, None] + number
        if self.lead:
            dropped = (position - self.kept - seq_start).clamp(0, n)
            # the last first tokens adjoin the kept ones
            if always or ((dropped > 0) & (dropped < n)).any():
                self._moved = (number - (n - dropped)[:, None]).clamp(min=0)

    def append(self, name: str, states: Tensor) -> Tensor:
        if not self.num_sink_tokens:
            return super().append(name, states)
        first = self._first_tokens(name, states)
        if not self.lead:
            return super().append(name, states)
        past = self.tokens[name]
        self._check(name, past[..., :0, :], states[..., :0, :])
        if self._moved is not None:
            first = take_tokens(first, self._moved)
        whole = torch.cat([first, past, states], dim=-2)
        self.tokens[name] = whole[..., self.lead :, :]
        self._drop_unseen(name)
        return whole

    def _first_tokens(self, name: str, states: Tensor) -> Tensor:
        """The first tokens ``[B, ..., n, F]`` of each row, as far as they exist."""
        n, T = self.num_sink_tokens, states.shape[-2]
        first = self.rows.get(SINK + name)
        if first is None:
            first = states.new_zeros(*states.shape[:-2], n, states.shape[-1])
        if self._new is not None and T:
            is_new = (self._new >= 0) & (self._new < T)
            shape = (is_new.shape[0], *[1] * (states.dim() - 3), n, 1)
            taken = take_tokens(states, self._new.clamp(0, T - 1))
            first = torch.where(is_new.view(shape).to(states.device), taken, first)
        self.rows[SINK + name] = first
        return first

    def realign(self, seq_start: Tensor, position: int) -> None:
        n, kept = self.num_sink_tokens, self.kept
        number = torch.arange(kept) - (seq_start - (position - kept))[:, None]  # [B, kept]
        is_first = (number >= 0) & (number < n)
        if not n or not is_first.any():
            return
        for name, states in self.tokens.items():
            shape = (len(is_first), *[1] * (states.dim() - 3), kept, 1)
            taken = take_tokens(self.rows[SINK + name], number.clamp(0, n - 1))
            self.tokens[name] = torch.where(is_first.view(shape).to(states.device), taken, states)

    def _restored(self) -> Iterable[str]:
        return ()  # its rows are first tokens
