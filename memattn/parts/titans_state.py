"""Cached state of a Titans layer: keys of its attention, and the memory's state."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn.checks import must
from memattn.nn import NeuralMemory, NeuralMemoryLayerState
from memattn.ops import NeuralMemoryState
from memattn.parts.state import PartState

UNSAVED = ("memory.initial", "memory.sizes")  # belong to the layer, not to a sequence
PRESENT = "present"  # bool [B, columns], columns that held a token since recording began
START = "segment_start"  # [B, H, P], weights before the segment of the newest token
EARLIER = "segment_before"  # [B, H, P], weights before the previous segment
PLACE = "segment_place"  # int64 [B], index of the newest token in its segment


class TitansState(PartState):
    """Keys of the attention as token tensors, the state of the neural memory as row tensors.

    If the past is recorded, a crop is exact for at least one chunk back. Otherwise it is refused.

    Args:
        kind: The part that it belongs to.
        segment_len: Segment of the attention, or None.
        window_size: Window of the attention, or None.
        variant: The variant of the layer.
        options: Active residuals and tokens by name. States of models with and without them have
            the same shapes, so the names are compared.
    """

    __slots__ = ("_memory",)  # its tensors are in ``rows``, too

    def __init__(
        self,
        kind: str,
        segment_len: int | None = None,
        window_size: int | None = None,
        variant: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.variant = variant
        self.options = dict(options or {})
        super().__init__(kind, segment_len, window_size)

    def _clear(self) -> None:
        super()._clear()
        self._memory: NeuralMemoryLayerState | None = None

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "variant": self.variant, "options": self.options or None}

    def tensors(self) -> Iterator[Tensor]:
        yield from super().tensors()
        past = None if self._memory is None else self._memory.memory.past
        if past is not None:
            yield from past.tensors().values()

    def read_memory(self, layer: NeuralMemory, B: int) -> NeuralMemoryLayerState:
        """The memory's state before this call, of ``B`` rows."""
        begin, state = None, self._memory
        if not self.rows or self._restarting is not None or state is None:
            begin = layer.start().expand(B)
        if state is None and begin is not None:
            state = begin
            if self.rows:  # loaded from a file, merged, or in a program
                state = begin.with_tensors(self.rows)
        assert state is not None
        _check_memory(state, layer)
        if self._restarting is not None and begin is not None:
            mask = self._restarting.to(state.memory.count.device)
            state = state.reset(mask, begin)
        if self.record_past and state.since is None:
            state = state.record_past()
        return state

    @property
    def memory(self) -> NeuralMemoryState | None:
        """The neural memory's state after the last token; None before the first call."""
        return None if self._memory is None else self._memory.memory

    def recall(self, layer: NeuralMemory) -> None:
        """Rebuild the memory's state from tensors that came from a file or from merged rows."""
        if self._memory is None and self.rows:
            self._keep(self.read_memory(layer, len(next(iter(self.rows.values())))))

    def write_memory(self, state: NeuralMemoryLayerState, present: Tensor) -> None:
        """Store the memory's state after a call with tokens ``present`` (bool ``[B, T]``)."""
        self._keep(state)
        if self.record_past:
            earlier = [self.history[PRESENT]] if PRESENT in self.history else []
            self.history[PRESENT] = torch.cat([*earlier, present], 1)

    def _keep(self, state: NeuralMemoryLayerState) -> None:
        self._memory = state
        start = {START: self.rows[START]} if START in self.rows else {}
        self.rows = {name: x for name, x in state.tensors().items() if name not in UNSAVED} | start

    def keep_segments(self, start: Tensor, earlier: Tensor, place: Tensor) -> None:
        """Store the weights ``[B, H, P]`` before the newest token's segment and the one before.

        ``place`` int64 ``[B]`` is the newest token's index in its segment.
        """
        self.rows[START] = start
        if self.record_past:
            self.history |= {EARLIER: earlier, PLACE: place}

    def apply(self, function: Callable[[Tensor], Tensor]) -> "TitansState":
        other = super().apply(function)
        assert isinstance(other, TitansState)
        state = self._memory
        if state is not None:
            memory = state.memory
            changed = memory.mapped(
                lambda name, x: x.detach() if name == "initial" else function(x)
            )
            device = changed.packed_weights.device
            changed = dataclasses.replace(changed, initial=changed.initial.to(device))
            other._keep(state.mapped(changed, function))
        return other

    @classmethod
    def merge(cls, states: "list[PartState]") -> "TitansState":
        widest: dict[str, int] = {}
        names = ("inputs", "read_inputs")
        for state in states:
            for name in names:
                if name in state.rows:
                    widest[name] = max(widest.get(name, 0), state.rows[name].shape[1])
        widened: list[PartState] = []
        for state in states:
            other = state.apply(lambda tensor: tensor)
            for name in widest:
                x = other.rows[name]
                other.rows[name] = F.pad(x, (0, 0, widest[name] - x.shape[1], 0))
            widened.append(other)
        merged = super().merge(widened)
        assert isinstance(merged, TitansState)
        return merged

    def move(self, by: Tensor) -> None:
        apart = {name: x for name, x in self.history.items() if name != PRESENT}
        seen = self.history.pop(PRESENT, None)
        self.history = {}
        super().move(by)
        self.history = apart
        if seen is not None:
            # columns that tokens were moved from hold no token
            width, by = seen.shape[1], by.to(seen.device)[:, None]
            column = torch.arange(width, device=seen.device) - by
            inside = (column >= 0) & (column < width)
            moved = seen.gather(1, column.clamp(0, max(width - 1, 0)))
            self.history[PRESENT] = moved & inside

    def _cropped(
        self, num_columns: int, counts: Tensor | None = None
    ) -> NeuralMemoryLayerState | None:
        """The memory's state after a crop."""
        seen = self.history.get(PRESENT)
        recorded = 0 if seen is None else seen.shape[1]
        removed = num_columns if counts is None else int(counts.max())
        if not removed:
            return self._memory
        if seen is None or self._memory is None or removed > recorded:
            why = f"be at least {-recorded}, what {self.kind} has recorded"
            must("tokens_to_remove", f"{why} (see activate_past_recording)", -removed)
        if counts is None:
            counts = seen[:, recorded - num_columns :].sum(1)
        return self._memory.crop(counts.to(seen.device))

    def check_crop(
        self, num_columns: int, position: int, lacks: bool, counts: Tensor | None = None
    ) -> None:
        if self.tokens and lacks:
            why = "leave what later tokens see (see activate_past_recording)"
            must("tokens_to_remove", why, -num_columns)
        if self.rows and (num_columns or counts is not None):
            try:
                self._cropped(num_columns, counts)
            except ValueError as error:
                if "tokens_to_remove" in str(error):
                    raise
                must("tokens_to_remove", f"fit what the memory keeps ({error})", -num_columns)

    def crop(self, num_columns: int, counts: Tensor | None = None) -> None:
        if self.rows and (num_columns or counts is not None):
            state = self._cropped(num_columns, counts)
            if state is not None:
                self._keep(state)
            if PRESENT in self.history:
                self._crop_history(num_columns, counts)
        rest = self.kept - num_columns
        for name, states in self.tokens.items():
            self.tokens[name] = states[..., :rest, :]
        self.trim()

    def _crop_history(self, num_columns: int, counts: Tensor | None) -> None:
        seen = self.history[PRESENT]
        left = seen.shape[1] - num_columns
        self.history[PRESENT] = seen[:, : max(left, 0)]
        counts = seen[:, left:].sum(1) if counts is None else counts.to(seen.device)
        if PLACE in self.history and self.segment_len is not None:
            place = self.history[PLACE] - counts
            back = (place < 0)[:, None, None]  # in the previous segment
            self.rows[START] = torch.where(back, self.history[EARLIER], self.rows[START])
            self.history[PLACE] = place % self.segment_len


def _check_memory(state: NeuralMemoryLayerState, layer: NeuralMemory) -> None:
    """Raise ValueError unless the state belongs to such a layer."""
    memory, weights = state.memory, layer.memory_weights
    sizes = (weights[0].shape[-1], *(x.shape[-2] for x in weights))
    own = (memory.packed_weights.shape[1], memory.sizes, memory.chunk_size)
    wanted = (layer.num_heads, sizes, layer.chunk_size)
    if own != wanted:
        say = "{} heads of sizes {} and chunks of {}".format
        must("past_key_values", f"have a memory with {say(*wanted)}", say(*own))
