"""Decoding with the neural memory: one token in one call, and calls that remember the past."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memattn.ops.neural_memory_state import NeuralMemoryState
from memattn_kernels.signatures import NeuralMemoryArgs, NeuralMemoryStepArgs

SHARED = [name for name in NeuralMemoryStepArgs._fields if name in NeuralMemoryArgs._fields]
Step = Callable[[NeuralMemoryStepArgs], tuple[Tensor, ...]]


def is_step(args: NeuralMemoryArgs) -> bool:
    """Whether this is one token behind a state, in all rows, without gradients or a trace."""
    if args.count is None or args.query.shape[2] != 1 or args.row_start is not None:
        return False
    if torch.compiler.is_compiling() or isinstance(args.query, torch._subclasses.FakeTensor):
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(isinstance(x, Tensor) and x.requires_grad for x in args)


def run_step(
    args: NeuralMemoryArgs, state: NeuralMemoryState, initial: Tensor, step: Step
) -> tuple[Tensor, NeuralMemoryState, Tensor]:
    """Output, state and surprise of one token.

    The pending rows of the state that a step returns are written by the next one, which leaves
    what that state has in them. Weights are written where a chunk ends only.
    """
    last = state.chunk_size - 1
    ended = None
    if state.uniform is not None:
        fold = state.uniform == last
    else:
        ended = state.count == last
        fold = state.count.is_cuda or bool(ended.any())  # not worth waiting for the device
    pending, writer = state.writable()
    shared = {name: getattr(args, name) for name in SHARED}
    names = ("pending_h", "pending_delta", "pending_decay", "pending_momentum")
    buffers = dict(zip(names, pending, strict=True))
    out, surprise, weights, momentum, count, skipped = step(
        NeuralMemoryStepArgs(**{**shared, **buffers}, fold=fold)
    )
    changed: dict[str, Any] = {**buffers, "count": count, "skipped": skipped, "initial": initial}
    changed["writer"] = writer
    if state.uniform is not None:
        changed["uniform"] = (state.uniform + 1) % state.chunk_size
    if not fold:
        after = dataclasses.replace(state, **changed)
        writer.wrote(after)
        return out, after, surprise
    changed["packed_weights"] = weights
    if state.packed_momentum is not None:
        changed["packed_momentum"] = momentum
    # the next step begins new rows: those of the chunk that ended are another state's
    after = dataclasses.replace(state, **changed | {"writer": None})
    return out, after.remember(state, ended), surprise


def remembered(
    args: NeuralMemoryArgs, before: NeuralMemoryState, after: NeuralMemoryState
) -> NeuralMemoryState:
    """The state with its past, after a call of one token or none."""
    if args.query.shape[2] == 0:
        return dataclasses.replace(after, records=True, past=before.past)
    ended = before.count == before.chunk_size - 1
    if args.row_start is not None and args.row_end is not None:
        ended = ended & (args.row_start < args.row_end)
    return after.remember(before, ended)
