"""Measures of a neural memory: surprise, updates, relevance, retrieval, utilisation."""

import contextlib
import copy
import math
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memattn.checks import check_rank, must
from memattn.nn import NeuralMemory, NeuralMemoryLayerState
from memattn.nn._modules import modules_of
from memattn.parts.state import PartState
from memattn.parts.titans_layers import MemoryLayer
from memattn.parts.views import MASSES_BY_SOURCE


class RetrievalBucket(NamedTuple):
    """How well a memory at the end of a text retrieves tokens at a distance."""

    first: int  # least distance from the end in tokens, a power of two
    last: int
    quality: float  # 1 is perfect, 0 as before the text, below 0 worse; NaN if nothing was to learn


class LayerUse(NamedTuple):
    """Measures of one layer with a memory on a text; all tensors are float64, on the CPU."""

    surprise: Tensor  # [B, H, T], norm of each token's gradient
    chunk_tokens: list[int]  # tokens of the text in each chunk
    update: Tensor  # [B, H, chunks], norm of the change of the weights, in units of their norm
    relevance: Tensor  # [B, T], share of the memory in what the layer gives
    retrieval: list[RetrievalBucket]
    utilisation: Tensor  # [B, H, N], share of the directions of each memory layer that are used


class MemoryUse(NamedTuple):
    """Result of ``measure_memory``."""

    layers: list[str]  # names of the layers
    uses: list[LayerUse]


class MemoryWatch:
    """What ``watch_memory`` records of one layer.

    Attributes:
        name: Name of the layer in the model.
        layer: The layer.
        chunk_tokens: Tokens of the text in each chunk since the last ``drain``.
        update: ``[B, H]`` of each chunk; the last one may still be open.
        surprise: ``[B, H, n]`` of each call.
        relevance: ``[B, n]`` of each call.
        pairs: Keys and values of each call, if they are kept.
        start: Weights before the first token.
        end: Weights after the last token.
    """

    def __init__(self, name: str, layer: MemoryLayer, keep_pairs: bool) -> None:
        self.name, self.layer, self.keep_pairs = name, layer, keep_pairs
        self.paused = False
        self.start: tuple[Tensor, ...] | None = None
        self.end: tuple[Tensor, ...] = ()
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.drain()

    def drain(self) -> None:
        """Clear the collected measures, but keep the weights."""
        self.chunk_tokens: list[int] = []
        self.update: list[Tensor] = []
        self.surprise: list[Tensor] = []
        self.relevance: list[Tensor] = []
        self.continues = False  # whether the first chunk was open before
        self._norms: tuple[Tensor | None, Tensor | None] = (None, None)

    def see_memory(self, memory: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Write the tokens of a call chunk by chunk, to measure each chunk before the call runs."""
        if self.paused:
            return
        options = dict(options)
        hidden_states, kv_states = args[0], options.pop("kv_states", None)
        given: NeuralMemoryLayerState | None = options.pop("state", None)
        if any(bound is not None for bound in options.values()):
            must("input_ids", "be without padding and not packed", ", ".join(options))
        state = memory.start().expand(len(hidden_states)) if given is None else given
        if self.start is None:
            self.start = _double(state.memory.current()[0])
        T, at = hidden_states.shape[1], 0
        while at < T:
            count = int(state.memory.count[0])
            stop = min(T, at + memory.chunk_size - count)
            piece = hidden_states[:, at:stop]
            kv_piece = piece if kv_states is None else kv_states[:, at:stop]
            if self.keep_pairs:
                pair = memory.pairs(piece, kv_states=kv_piece, state=state)
                self.pairs.append((pair[0].double().cpu(), pair[1].double().cpu()))
            before = _double(state.memory.weights)  # at the start of the chunk
            found = memory.forward(piece, kv_states=kv_piece, state=state)
            state = found.state
            self.end = _double(state.memory.current()[0])
            moved = update_magnitude(before, self.end)
            self.surprise.append(found.surprise.double().cpu())
            if count and self.update:
                self.update[-1] = moved
                self.chunk_tokens[-1] += stop - at
            else:
                self.continues = self.continues or count > 0
                self.update.append(moved)
                self.chunk_tokens.append(stop - at)
            at = stop

    def see_memory_out(self, memory: Any, args: Any, output: Any) -> None:
        """Record the norms of the memory's outputs."""
        if not self.paused:
            self._norms = (output.out.detach().double().norm(dim=-1).cpu(), self._norms[1])

    def see_attention(self, attention: Any, args: Any, output: Any) -> None:
        """Record the norms of the attention's outputs."""
        if not self.paused and isinstance(output, Tensor):
            self._norms = (self._norms[0], output.detach().double().square().sum(-1).sqrt().cpu())

    def see_layer(self, layer: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Attention mass on the memory's outputs, for layers that attend to them."""
        if type(layer) not in MASSES_BY_SOURCE or self.paused:
            return
        hidden_states, context = args[0], args[1]
        aside = copy.copy(context)
        if context.state is not None:
            aside.state = _copy(context.state)
            if context.offset % layer.attention.segment_len:  # earlier keys are not in these masses
                self.relevance.append(torch.full(hidden_states.shape[:2], math.nan).double())
                return
        self.paused = True
        try:
            masses = MASSES_BY_SOURCE[type(layer)](layer, hidden_states, aside, **options)
        finally:
            self.paused = False
        self.relevance.append(masses["memory"].double().mean(1).cpu())

    def see_layer_out(self, layer: Any, args: Any, output: Any) -> None:
        """The memory's share of the norms of both outputs, for the other layers."""
        if type(layer) in MASSES_BY_SOURCE or self.paused:
            return
        memory, attention = self._norms
        assert memory is not None
        both = memory if attention is None else memory + attention
        self.relevance.append(memory / torch.where(both > 0, both, 1.0))


def memory_layers(model: nn.Module) -> dict[str, MemoryLayer]:
    """The layers with a neural memory, by name.

    Raises:
        TypeError: If the model has none.
    """
    layers = modules_of(model, MemoryLayer)
    if not layers:
        must("model", "have layers with a neural memory", type(model).__name__, TypeError)
    return layers


@contextlib.contextmanager
def watch_memory(
    model: nn.Module, *, keep_pairs: bool = False
) -> Generator[list[MemoryWatch], None, None]:
    """Context that measures every neural memory of a model; its outputs do not change.

    Each memory writes every token twice: for the model, and chunk by chunk for the measures.
    Padding and packed documents are not allowed.

    Args:
        model: The model.
        keep_pairs: Whether to keep keys and values of all tokens.

    Raises:
        TypeError: If the model has no neural memory.
    """
    watches: list[MemoryWatch] = []
    hooks: list[RemovableHandle] = []
    for name, layer in memory_layers(model).items():
        watch = MemoryWatch(name, layer, keep_pairs)
        watches.append(watch)
        memory: NeuralMemory = layer.memory
        hooks += [
            layer.register_forward_pre_hook(watch.see_layer, with_kwargs=True),
            layer.register_forward_hook(watch.see_layer_out),
            memory.register_forward_pre_hook(watch.see_memory, with_kwargs=True),
            memory.register_forward_hook(watch.see_memory_out),
        ]
        if isinstance(attention := getattr(layer, "attention", None), nn.Module):
            hooks.append(attention.register_forward_hook(watch.see_attention))
    try:
        yield watches
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def measure_memory(model: nn.Module, input_ids: Tensor) -> MemoryUse:
    """Measure the neural memories of a model while it reads a text.

    - *surprise* of a token: the norm of the gradient of its inner loss;
    - *update* of a chunk: the norm of the weight change, divided by the norm of the weights;
    - *relevance* of a token: for layers that attend to memory outputs, the attention mass on them;
    else the norm of the memory's output, divided by the sum of this and the attention's norm;
    - *retrieval* by distance to the end of the text: 1 minus the memory's squared error on the
    tokens' keys and values at the end, divided by the same error before the text;
    - *utilisation* of a memory layer: the effective rank of its weight change (the exponential of
    the entropy of the shares of its squared singular values), divided by the full rank.

    Args:
        model: A model with a neural memory, called with ``input_ids`` and ``use_cache=False``. It
            is in evaluation mode during the call.
        input_ids: ``[B, T]``, without padding.

    Raises:
        TypeError: If the model has no neural memory.
    """
    check_rank("input_ids", input_ids, "B T")
    memory_layers(model)
    if input_ids.shape[1] == 0:
        must("input_ids", "have at least one token", "none")
    was_training = model.training
    try:
        with watch_memory(model, keep_pairs=True) as watches:
            model.eval()(input_ids, use_cache=False)
    finally:
        model.train(was_training)
    return MemoryUse([watch.name for watch in watches], [_use(watch) for watch in watches])


def _use(watch: MemoryWatch) -> LayerUse:
    """The measures of a layer that has read a whole text."""
    assert watch.start is not None
    keys, values = zip(*watch.pairs, strict=True)
    key, value = torch.cat(keys, 2), torch.cat(values, 2)
    return LayerUse(
        surprise=torch.cat(watch.surprise, 2),
        chunk_tokens=watch.chunk_tokens,
        update=torch.stack(watch.update, 2),
        relevance=torch.cat(watch.relevance, 1),
        retrieval=_retrieval(watch, key, value),
        utilisation=utilisation(watch.start, watch.end),
    )


def _retrieval(watch: MemoryWatch, key: Tensor, value: Tensor) -> list[RetrievalBucket]:
    """Retrieval quality of the tokens, by their distance to the end of the text."""
    assert watch.start is not None
    at_end, at_start = (
        (watch.layer.memory.recall(weights, key) - value).square().sum((0, 1, 3))
        for weights in (watch.end, watch.start)
    )
    T = key.shape[2]
    buckets: list[RetrievalBucket] = []
    for first in (2**i for i in range(T.bit_length())):
        last = min(2 * first - 1, T)
        tokens = slice(T - last, T - first + 1)
        known = float(at_start[tokens].sum())
        quality = 1.0 - float(at_end[tokens].sum()) / known if known else math.nan
        buckets.append(RetrievalBucket(first, last, quality))
    return buckets


def update_magnitude(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """Norm ``[B, H]`` of the change of layers ``[B, H, d_n, d_{n-1}]``, relative to their norm."""

    def norm(layers: Sequence[Tensor]) -> Tensor:
        return torch.stack([x.square().sum((-1, -2)) for x in layers]).sum(0).sqrt()

    size = norm(before)
    change = [y - x for x, y in zip(before, after, strict=True)]
    return norm(change) / torch.where(size > 0, size, 1.0)


def _singular_values(x: Tensor) -> Tensor:
    # torch does not type its linear algebra
    return torch.linalg.svdvals(x)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def utilisation(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """Effective rank ``[B, H, N]`` of the change of each layer, relative to its smaller side."""
    found: list[Tensor] = []
    for x, y in zip(before, after, strict=True):
        square = _singular_values(y - x).square()
        total = square.sum(-1, keepdim=True)
        share = square / torch.where(total > 0, total, 1.0)
        entropy = -torch.xlogy(share, share).sum(-1)
        found.append(torch.where(total[..., 0] > 0, entropy.exp() / square.shape[-1], 0.0))
    return torch.stack(found, -1)


def _copy(state: PartState) -> PartState:
    """A state with the same tensors; calls with it do not change this one."""
    other = copy.copy(state)
    for name in ("tokens", "rows", "history", "_before"):
        setattr(other, name, dict(getattr(state, name)))
    return other


def _double(layers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(layer.detach().double().cpu() for layer in layers)
