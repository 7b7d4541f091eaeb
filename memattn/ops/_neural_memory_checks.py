"""Checks of what only the neural memory takes: its weights, its state, its numbers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from memattn.checks import check_on_device_of_query, check_shape, check_tensor, check_type, must
from memattn.ops.neural_memory_state import NeuralMemoryState

DEEPEST = 4


def check_wide(name: str, tensor: Tensor, query: Tensor, wide: torch.dtype) -> None:
    """Raise unless a tensor has the dtype of sums and the device of the query."""
    if tensor.dtype != wide:
        must(name, f"have dtype {wide} with a query of {query.dtype}", tensor.dtype)
    check_on_device_of_query(name, tensor, query)


def check_positive(name: str, value: object) -> float:
    """The number, which must be above 0 and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        must(name, "be a number", type(value).__name__, TypeError)
    if not 0.0 < value < float("inf"):
        must(name, "be positive and finite", value)
    return float(value)


def check_weights(
    weights: Sequence[Tensor], query: Tensor, value: Tensor, wide: torch.dtype
) -> tuple[int, ...]:
    """``d_0 ... d_N`` of layers that fit each other, the query and the value."""
    if not isinstance(weights, tuple | list):
        must("weights", "be a tuple of layers", type(weights).__name__, TypeError)
    if not 1 <= len(weights) <= DEEPEST:
        must("weights", f"have from 1 to {DEEPEST} layers", len(weights))
    H, D, Dv = query.shape[1], query.shape[-1], value.shape[-1]
    sizes = [D]
    for n, layer in enumerate(weights):
        name = f"weights[{n}]"
        check_tensor(name, layer)
        last = {"Dv": Dv} if n == len(weights) - 1 else {f"d_{n + 1}": None}
        before = {"D": D} if n == 0 else {f"d_{n}": sizes[-1]}
        check_shape(name, layer, H=H, **last, **before)
        if layer.dtype not in (query.dtype, wide):
            must(name, f"have the dtype of query, {query.dtype}, or {wide}", layer.dtype)
        check_on_device_of_query(name, layer, query)
        sizes.append(layer.shape[1])
    return tuple(sizes)


def check_state(
    state: NeuralMemoryState,
    query: Tensor,
    momentum: Tensor | None,
    sizes: tuple[int, ...],
    chunk_size: int,
    wide: torch.dtype,
) -> None:
    """Raise unless the state is of this memory and this batch."""
    check_type("state", state, NeuralMemoryState, "be a NeuralMemoryState")
    B, H = query.shape[:2]
    if state.count.shape[0] != B:
        must("state", f"be of B={B} sequences", state.count.shape[0])
    if state.packed_weights.shape[1] != H:
        must("state", f"be of H={H} heads", state.packed_weights.shape[1])
    if state.sizes != sizes:
        must("state", f"be of a memory with the sizes {list(sizes)}", list(state.sizes))
    if state.chunk_size != chunk_size:
        must("state", f"be of chunks of chunk_size={chunk_size}", state.chunk_size)
    if (state.packed_momentum is None) != (momentum is None):
        has = "a momentum" if momentum is not None else "no momentum, as momentum is None"
        must("state", f"have {has}", "none" if momentum is not None else "one")
    check_wide("state", state.packed_weights, query, wide)
    state.check(B, H, wide)
