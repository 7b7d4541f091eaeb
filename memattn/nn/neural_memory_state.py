"""Cached state of a neural memory layer: the memory, and inputs of the convolutions."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn.checks import check_int, must
from memattn.ops import NeuralMemoryState

OWN = ("inputs", "read_inputs", "since")


@dataclasses.dataclass(frozen=True, eq=False)
class NeuralMemoryLayerState:
    """State of ``memattn.nn.NeuralMemory`` for ``R`` sequences.

    Inputs of the convolutions are projected queries, keys and values, the newest last, and 0 where
    there was no token.
    """

    memory: NeuralMemoryState
    inputs: Tensor | None  # [R, kept, 3 H D]; None without convolutions
    read_inputs: Tensor | None = None  # [R, kept, H D], of ``NeuralMemory.read``
    since: Tensor | None = None  # int64 [R], tokens since recording began; None if not recording

    def detach(self) -> "NeuralMemoryLayerState":
        """The state detached from the autograd graph."""
        return self.mapped(self.memory.detach(), lambda x: x.detach())

    def to(self, device: torch.device | str) -> "NeuralMemoryLayerState":
        """The state on another device."""
        return self.mapped(self.memory.to(device), lambda x: x.to(device))

    def select(self, rows: Tensor) -> "NeuralMemoryLayerState":
        """The state of these rows, int64, in this order; a row may come several times."""
        return self.mapped(self.memory.select(rows), lambda x: x.index_select(0, rows))

    def expand(self, R: int) -> "NeuralMemoryLayerState":
        """The state of one row for ``R`` rows that begin alike."""
        return self.mapped(self.memory.expand(R), lambda x: x.expand(R, *x.shape[1:]))

    @classmethod
    def merge(cls, states: "Sequence[NeuralMemoryLayerState]") -> "NeuralMemoryLayerState":
        """Concatenate the rows of several states of one layer."""
        named: dict[str, Tensor | None] = {}
        for name in OWN:
            parts = [getattr(state, name) for state in states]
            named[name] = None if any(x is None for x in parts) else torch.cat(parts)
        return cls(NeuralMemoryState.merge([state.memory for state in states]), **named)

    def reset(self, mask: Tensor, begin: "NeuralMemoryLayerState") -> "NeuralMemoryLayerState":
        """Restart rows where ``mask`` (bool ``[R]``) is True from ``begin`` (one row or R)."""
        R = mask.shape[0]
        begin = begin.expand(R) if begin.memory.count.shape[0] != R else begin

        def anew(x: Tensor | None, start: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            first = torch.zeros_like(x)
            if start is not None:
                first = F.pad(start, (0, 0, x.shape[1] - start.shape[1], 0))
            return torch.where(mask[:, None, None], first, x)

        return dataclasses.replace(
            self,
            memory=self.memory.reset_to(mask, begin.memory),
            inputs=anew(self.inputs, begin.inputs),
            read_inputs=anew(self.read_inputs, begin.read_inputs),
            since=None if self.since is None else torch.where(mask, 0, self.since),
        )

    def record_past(self) -> "NeuralMemoryLayerState":
        """The state, which from now on records what ``crop`` needs."""
        since = torch.zeros_like(self.memory.count, dtype=torch.int64)
        return dataclasses.replace(self, memory=self.memory.record_past(), since=since)

    def crop(self, n: int | Tensor) -> "NeuralMemoryLayerState":
        """Remove the newest ``n`` tokens of every row, or ``n`` (int64 ``[R]``) per row.

        Raises:
            ValueError: If these are more than the tokens since ``record_past``, or more than the
                memory can undo.
        """
        if not isinstance(n, Tensor):
            check_int("n", n, 0)
            n = torch.full_like(self.memory.skipped, n)
        if not n.any():
            return self
        memory = self.memory.crop(n)
        if self.inputs is None and self.since is None:
            return dataclasses.replace(self, memory=memory)
        since = torch.zeros_like(n) if self.since is None else self.since
        if (n > since).any():
            row = int((n > since).nonzero()[0, 0])
            must("n", f"be at most {int(since[row])}, the tokens since record_past", int(n[row]))

        def back(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            column = torch.arange(x.shape[1], device=x.device) - n[:, None]
            index = column.clamp(min=0)[..., None].expand_as(x)
            return torch.where((column >= 0)[..., None], x.gather(1, index), 0.0)

        return NeuralMemoryLayerState(memory, back(self.inputs), back(self.read_inputs), since - n)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state, as a flat dictionary to save."""
        found: dict[str, Tensor | None] = {
            f"memory.{name}": x for name, x in self.memory.tensors().items()
        }
        found |= {name: getattr(self, name) for name in ("inputs", "read_inputs")}
        return {name: x for name, x in found.items() if x is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "NeuralMemoryLayerState":
        """Rebuild the state from ``tensors``; recorded data are not saved."""
        memory = {n.removeprefix("memory."): x for n, x in tensors.items() if "." in n}
        own = {name: tensors.get(name) for name in ("inputs", "read_inputs")}
        return cls(NeuralMemoryState.from_tensors(memory), **own)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "NeuralMemoryLayerState":
        """The state of what ``tensors`` gave of another state of the same layer."""
        memory = {n.removeprefix("memory."): x for n, x in tensors.items() if "." in n}
        own = {name: tensors.get(name) for name in ("inputs", "read_inputs")}
        return NeuralMemoryLayerState(self.memory.with_tensors(memory), **own)

    def mapped(
        self, memory: NeuralMemoryState, change: Callable[[Tensor], Tensor]
    ) -> "NeuralMemoryLayerState":
        """The state with ``change`` of its own tensors."""
        own = {name: getattr(self, name) for name in OWN}
        changed = {name: x if x is None else change(x) for name, x in own.items()}
        return NeuralMemoryLayerState(memory, **changed)
