"""The state of a neural memory between two pieces of a sequence."""

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memattn.checks import (
    check_int,
    check_shape,
    check_tensor,
    is_traced,
    must,
    plain_values,
)
from memattn.reference.neural_memory import coefficients, pack, unpack

TENSORS = (
    "packed_weights",
    "packed_momentum",
    "pending_h",
    "pending_delta",
    "pending_decay",
    "pending_momentum",
    "count",
    "skipped",
    "initial",
)


@dataclasses.dataclass(frozen=True, eq=False)
class NeuralMemoryState:
    """State of a neural memory for ``R`` sequences.

    Gradients of a chunk are taken at the weights before its first token, so the state has these
    weights and, for each token of the open chunk, the factors of its update. Shapes do not depend
    on how many tokens there are. Floating tensors are float32 (float64 for float64 inputs). Pending
    rows from ``count`` on are unused.

    Layers are kept packed, one after the other in one axis; ``weights`` and ``momentum`` are views
    ``[R, H, d_n, d_{n-1}]`` of them.
    """

    packed_weights: Tensor  # [R, H, P], before the first token of the open chunk
    packed_momentum: Tensor | None  # [R, H, P] likewise; None where the memory has no momentum
    pending_h: Tensor  # [R, H, chunk_size - 1, d_0 + ... + d_{N-1}]
    pending_delta: Tensor  # [R, H, chunk_size - 1, d_1 + ... + d_N], times lr and clamp
    pending_decay: Tensor  # [R, H, chunk_size - 1]
    pending_momentum: Tensor  # [R, H, chunk_size - 1]
    count: Tensor  # int32 [R], tokens of the open chunk
    skipped: Tensor  # int64 [R], updates that were not finite, over tokens and heads
    initial: Tensor  # [H, P], what a sequence starts from
    sizes: tuple[int, ...]  # d_0 ... d_N
    uniform: int | None = None  # the count of all rows, where it is known without reading it
    records: bool = False
    past: "NeuralMemoryState | None" = None  # before the last chunk ended; a count of -1 is none
    writer: "Writer | None" = None  # of the pending rows

    def __repr__(self) -> str:
        """Sizes only, without the numbers."""
        R, H, _ = self.packed_weights.shape
        momentum = self.packed_momentum is not None
        return (
            f"NeuralMemoryState(R={R}, H={H}, sizes={self.sizes}, chunk_size={self.chunk_size}, "
            f"momentum={momentum})"
        )

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The layers ``[R, H, d_n, d_{n-1}]`` before the open chunk."""
        return tuple(unpack(self.packed_weights, self.sizes))

    @property
    def momentum(self) -> tuple[Tensor, ...] | None:
        """The momentum of each layer before the open chunk."""
        packed = self.packed_momentum
        return None if packed is None else tuple(unpack(packed, self.sizes))

    @property
    def chunk_size(self) -> int:
        """Tokens in a chunk."""
        return self.pending_h.shape[2] + 1

    def current(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        """Weights and momentum after the last token, each layer ``[R, H, d_n, d_{n-1}]``."""
        b = self.chunk_size
        weights, momentum = self.weights, self.momentum
        if b == 1:
            return weights, momentum
        present = torch.arange(b - 1, device=self.count.device) < self.count[:, None]
        present = present[:, None].expand_as(self.pending_decay)

        def of_present(x: Tensor) -> Tensor:
            return torch.where(present, x, 0.0)

        def at_end(x: Tensor) -> Tensor:
            return x[..., -1, None, None]

        eta = of_present(self.pending_momentum)
        eta = torch.zeros_like(eta) if momentum is None else eta
        beta, sigma, mu, c, m = coefficients(of_present(self.pending_decay), eta, present)
        h = torch.where(present[..., None], self.pending_h, 0.0)
        delta = torch.where(present[..., None], self.pending_delta, 0.0)
        h, delta = (
            h.split_with_sizes(self.sizes[:-1], -1),
            delta.split_with_sizes(self.sizes[1:], -1),
        )
        new: list[Tensor] = []
        moved: list[Tensor] = []
        for n, layer in enumerate(weights):
            new.append(at_end(beta) * layer - (c[..., -1, :, None] * delta[n]).mT @ h[n])
            if momentum is not None:
                new[-1] = new[-1] + at_end(sigma) * momentum[n]
                moved.append(at_end(mu) * momentum[n] - (m[..., -1, :, None] * delta[n]).mT @ h[n])
        return tuple(new), None if momentum is None else tuple(moved)

    def detach(self) -> "NeuralMemoryState":
        """The state detached from the graph of autograd."""
        return self.mapped(lambda _, x: x.detach())

    def to(self, device: torch.device | str) -> "NeuralMemoryState":
        """The state on another device."""
        return self.mapped(lambda _, x: x.to(device))

    def select(self, rows: Tensor) -> "NeuralMemoryState":
        """The state of these rows, int64, in this order; a row may come several times."""
        check_tensor("rows", rows)
        return self.mapped(lambda name, x: x if name == "initial" else x.index_select(0, rows))

    def expand(self, R: int) -> "NeuralMemoryState":
        """The state of one row for ``R`` rows that begin alike, as views."""
        if self.count.shape[0] != 1:
            must("state", "have one row to be expanded", self.count.shape[0])
        return self.mapped(lambda name, x: x if name == "initial" else x.expand(R, *x.shape[1:]))

    @classmethod
    def merge(cls, states: "Sequence[NeuralMemoryState]") -> "NeuralMemoryState":
        """The rows of several states of one memory after each other; a past is not kept."""
        first = states[0]
        for state in states[1:]:
            if (state.sizes, state.chunk_size) != (first.sizes, first.chunk_size):
                must("states", "be of one memory", f"{first.sizes} and {state.sizes}")
        named = {name: [getattr(state, name) for state in states] for name in TENSORS}
        merged = {name: None if x[0] is None else torch.cat(x) for name, x in named.items()}
        merged["initial"] = first.initial
        return cls(**merged, sizes=first.sizes)  # pyright: ignore[reportArgumentType]

    def record_past(self) -> "NeuralMemoryState":
        """The same state, which from now on remembers what ``crop`` needs after its last chunk.

        Calls with a state that records go token by token for the last ``chunk_size`` tokens.
        """
        return dataclasses.replace(self, records=True)

    def forget_past(self) -> "NeuralMemoryState":
        """The same state without recording, for tokens that ``crop`` does not remove."""
        return dataclasses.replace(self, records=False, past=None)

    def crop(self, n: int | Tensor) -> "NeuralMemoryState":
        """Forget the newest ``n`` tokens of every row, or ``n`` (integers ``[R]``) of each.

        Raises:
            ValueError: If a row has fewer than ``n`` tokens in its open chunk and its past is not
                recorded; see ``record_past``.
        """
        count, past, uniform = self.count, self.past, self.uniform
        if isinstance(n, Tensor):
            n, uniform = n.to(count.dtype), None
        else:
            check_int("n", n, 0)
        behind = count < n
        if not behind.any():
            uniform = None if uniform is None else uniform - int(n)
            return dataclasses.replace(self, count=count - n, uniform=uniform)
        earlier = torch.full_like(count, -1) if past is None else past.count
        left = torch.where(behind, earlier + 1 + count - n, count - n)
        if past is None or (left < 0).any():
            most = int(torch.where(behind, earlier + 1 + count, count).min())
            most = f"be at most {most}, what is kept of the open chunk and the past"
            must("n", most, plain_values(n) if isinstance(n, Tensor) else n)
        cropped = _mix(behind, past, self)
        past = dataclasses.replace(past, count=torch.where(behind, -1, earlier))
        return dataclasses.replace(cropped, count=left, records=self.records, past=past)

    def remember(self, before: "NeuralMemoryState", ended: Tensor | None) -> "NeuralMemoryState":
        """This state, one token after ``before``, with its past if ``before`` records one.

        Args:
            before: The state before the token.
            ended: bool ``[R]``, rows whose chunk ended with it. None: all of them.
        """
        if not before.records:
            return self
        last = dataclasses.replace(before, past=None, records=False, writer=None)
        past = last
        if ended is not None:
            earlier = before.past
            if earlier is None:
                earlier = dataclasses.replace(last, count=torch.full_like(before.count, -1))
            past = _mix(ended, last, earlier)
        return dataclasses.replace(self, records=True, past=past)

    def writable(self) -> "tuple[list[Tensor], Writer]":
        """The four pending tensors, to write after the newest token, and their ``Writer``. They are
        copied unless the last write made this state, so that no state ever changes.
        """
        pending = [self.pending_h, self.pending_delta, self.pending_decay, self.pending_momentum]
        if self.writer is not None and self.writer.newest() is self:
            return pending, self.writer
        if self.uniform == 0:  # nothing is there to be copied
            return [x.new_empty(x.shape) for x in pending], Writer()
        return [x.clone(memory_format=torch.contiguous_format) for x in pending], Writer()

    def changed(self, fields: dict[str, Any]) -> "NeuralMemoryState":
        """As ``dataclasses.replace``, but faster."""
        after = object.__new__(NeuralMemoryState)
        vars(after).update(vars(self))
        vars(after).update(fields)
        return after

    def reset(self, mask: Tensor, weights: Sequence[Tensor] | None = None) -> "NeuralMemoryState":
        """Restart where ``mask`` (bool ``[R]``) is True.

        Args:
            mask: Which rows.
            weights: The layers ``[H, d_n, d_{n-1}]`` to start from; None means those of the call
                that made this state.
        """
        check_tensor("mask", mask)
        check_shape("mask", mask, R=self.count.shape[0])
        if mask.dtype != torch.bool:
            must("mask", "have dtype torch.bool", mask.dtype)
        initial = self.initial
        if weights is not None:
            initial = pack(list(weights)).to(initial)
            check_shape("weights, packed,", initial, H=self.initial.shape[0], P=initial.shape[1])

        begun = {name: getattr(self, name) for name in TENSORS}
        begun = {n: None if x is None else torch.zeros_like(x) for n, x in begun.items()}
        begun |= {"initial": initial, "packed_weights": initial.expand_as(self.packed_weights)}
        return self.reset_to(mask, dataclasses.replace(self, **begun))

    def reset_to(self, mask: Tensor, begin: "NeuralMemoryState") -> "NeuralMemoryState":
        """The rows of ``begin`` where ``mask`` (bool ``[R]``) is True; they have no past."""
        past = self.past
        if past is not None:
            past = dataclasses.replace(past, count=torch.where(mask, -1, past.count))
        mixed = dataclasses.replace(_mix(mask, begin, self), initial=begin.initial)
        return dataclasses.replace(mixed, records=self.records, past=past)

    def tensors(self) -> dict[str, Tensor]:
        """All that is needed to build the state again, as a flat dictionary to save."""
        found = {name: getattr(self, name) for name in TENSORS}
        found["sizes"] = torch.tensor(self.sizes)
        return {name: x.contiguous() for name, x in found.items() if x is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "NeuralMemoryState":
        """The state from the result of ``tensors``.

        Raises:
            ValueError: If a tensor is missing, or they do not fit each other.
        """
        for name in (*TENSORS, "sizes"):
            if name not in tensors and name != "packed_momentum":
                must("tensors", f"have {name}", sorted(tensors))
        return cls._checked(tensors, tuple(plain_values(tensors["sizes"])))

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "NeuralMemoryState":
        """This state with the tensors of another state of the same memory, from ``tensors``."""
        return self._checked({"initial": self.initial} | dict(tensors), self.sizes)

    @classmethod
    def _checked(cls, tensors: Mapping[str, Tensor], sizes: tuple[int, ...]) -> "NeuralMemoryState":
        named: dict[str, Any] = {name: tensors.get(name) for name in TENSORS}
        state = cls(**named, sizes=sizes)
        R, H = state.packed_weights.shape[:2]
        state.check(R, H, state.packed_weights.dtype)
        last = state.chunk_size - 1
        if is_traced(state.count):
            return state
        if ((state.count < 0) | (state.count > last)).any():
            must("count", f"be from 0 to chunk_size - 1 = {last}", plain_values(state.count))
        return state

    def check(self, R: int, H: int, wide: torch.dtype) -> None:
        """Raise unless the tensors fit each other and are of this size and dtype."""
        pairs = zip(self.sizes, self.sizes[1:], strict=False)
        P, rows = sum(a * b for a, b in pairs), self.pending_h.shape[2]
        shapes = {
            "packed_weights": (R, H, P),
            "packed_momentum": (R, H, P),
            "pending_h": (R, H, rows, sum(self.sizes[:-1])),
            "pending_delta": (R, H, rows, sum(self.sizes[1:])),
            "pending_decay": (R, H, rows),
            "pending_momentum": (R, H, rows),
            "count": (R,),
            "skipped": (R,),
            "initial": (H, P),
        }
        dtypes = {"count": torch.int32, "skipped": torch.int64}
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.shape != shape:
                must(f"state.{name}", f"have shape {list(shape)}", list(tensor.shape))
            if tensor.dtype != dtypes.get(name, wide):
                must(f"state.{name}", f"have dtype {dtypes.get(name, wide)}", tensor.dtype)
            if tensor.device != self.packed_weights.device:
                device = self.packed_weights.device
                must(f"state.{name}", f"be on the device of its weights, {device}", tensor.device)

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> "NeuralMemoryState":
        """The state with ``change(name, tensor)`` of every tensor, of the past too."""
        named = {name: getattr(self, name) for name in TENSORS}
        changed = {n: x if x is None else change(n, x) for n, x in named.items()}
        past = None if self.past is None else self.past.mapped(change)
        return dataclasses.replace(self, **changed, past=past, writer=None)


class Writer:
    """The state that the last write into some pending rows made, and the plan of that write."""

    def __init__(self, plan: Any = None) -> None:
        self.newest: Callable[[], NeuralMemoryState | None] = lambda: None
        self.plan = plan  # of the step that wrote

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and files have pending rows of their own."""
        return Writer, ()

    def wrote(self, state: NeuralMemoryState) -> None:
        """Remember the state that a write made."""
        self.newest = weakref.ref(state)


def _mix(rows: Tensor, a: NeuralMemoryState, b: NeuralMemoryState) -> NeuralMemoryState:
    """The state of ``a`` in rows where ``rows`` (bool ``[R]``) is True, else of ``b``."""

    def mixed(name: str) -> Tensor | None:
        x, y = getattr(a, name), getattr(b, name)
        if x is None or name == "initial":
            return y
        return torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x, y)

    named = {name: mixed(name) for name in TENSORS}
    return dataclasses.replace(b, **named, uniform=None, records=False, past=None, writer=None)
