"""The neural memory, forward and backward, of any depth from 1 to 4.

The definition is memattn.reference.neural_memory. A program owns a head of a row from its first
chunk to its last; the backward computes a group of chunks again from a checkpoint of weights and
momentum, and walks it in reverse. All is summed in float32, in one order: no atomics.
"""

import torch
from torch import Tensor

from memattn_kernels._common import IS_INTERPRETED
from memattn_kernels._operator import register
from memattn_kernels.neural_memory.launch import (
    checkpoint_slots,
    launch_backward,
    launch_forward,
    memory_size,
    memory_sizes,
    n_rows,
)
from memattn_kernels.signatures import NeuralMemoryArgs


def _empty_results(args: NeuralMemoryArgs) -> tuple[Tensor, ...]:
    """Besides the results: weights and momentum at every r-th chunk."""
    (B, H, T, _), R, size = args.query.shape, n_rows(args), memory_size(args)
    sizes, has_momentum = memory_sizes(args), args.momentum is not None
    wide = lambda *shape, dtype=torch.float32: args.query.new_empty(shape, dtype=dtype)
    state = lambda *shape, **given: wide(*(shape if args.return_state else (0,)), **given)
    pending = (R, H, args.chunk_size - 1)
    slots = checkpoint_slots(args)[1]
    return (
        args.query.new_empty(B, H, T, sizes[-1]),
        wide(B, H, T),
        state(R, H, size),
        state(R, H, size) if has_momentum else wide(0),
        state(*pending, sum(sizes[:-1])),
        state(*pending, sum(sizes[1:])),
        state(*pending),
        state(*pending),
        state(R, dtype=torch.int32),
        state(R, dtype=torch.int64),
        wide(B, slots, H, size * (2 if has_momentum else 1)),
    )


_operator = register(
    "memattn_kernels::neural_memory",
    NeuralMemoryArgs,
    results="out surprise end_weights end_momentum end_pending_h end_pending_delta "
    "end_pending_decay end_pending_momentum end_count end_skipped checkpoints",
    cotangents="out? end_weights? end_momentum? end_pending_h? end_pending_delta? "
    "end_pending_decay? end_pending_momentum?",
    saved="checkpoints",
    empty_results=_empty_results,
    empty_gradient=lambda _, tensor: tensor.new_empty(tensor.shape),
    forward=launch_forward,
    backward=launch_backward,
)


def neural_memory(args: NeuralMemoryArgs) -> tuple[Tensor, ...]:
    """Return ``out``, ``surprise`` and the tensors of the state, of size 0 where there is none."""
    dtype = args.query.dtype
    if IS_INTERPRETED and dtype == torch.bfloat16:
        # the interpreter computes bfloat16 wrongly
        wide = {name: getattr(args, name).float() for name in ("query", "key", "value")}
        args = args._replace(**wide)
    out, *others = _operator(*args)[:-1]
    return out.to(dtype), *others
