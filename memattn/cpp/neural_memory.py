"""The neural memory of the C++ extension."""

import torch
from torch import Tensor

from memattn.cpp._register import register_cpp
from memattn_kernels._operator import schema_of
from memattn_kernels.signatures import NeuralMemoryArgs, NeuralMemoryStepArgs


def _group(args: NeuralMemoryArgs, size: int) -> int:
    """Chunks between two checkpoints, which take no more memory than keys, values and queries."""
    D, Dv = args.query.shape[-1], args.value.shape[-1]
    return -(-2 * size // (args.chunk_size * (2 * D + Dv)))


def _empty_results(args: NeuralMemoryArgs) -> tuple[Tensor, ...]:
    """Uninitialised results, and weights and momentum at every r-th chunk."""
    B, H, T, D = args.query.shape
    widths = [D, *(args.width_1, args.width_2, args.width_3)[: args.depth - 1]]
    widths += [args.value.shape[-1]]
    size = sum(m * n for m, n in zip(widths[1:], widths, strict=False))
    rows = next((x.shape[0] for x in (args.row_start, args.count) if x is not None), B)
    wide = lambda *shape: args.query.new_empty(shape, dtype=torch.float32)
    state = lambda *shape: wide(*shape) if args.return_state else wide(0)
    span = _group(args, size) * args.chunk_size
    slots = (T - 1) // span + (args.count is not None) if T else 0
    pending = (rows, H, args.chunk_size - 1)
    return (
        args.query.new_empty(B, H, T, widths[-1]),
        wide(B, H, T),
        state(rows, H, size),
        wide(0) if args.momentum is None else state(rows, H, size),
        state(*pending, sum(widths[:-1])),
        state(*pending, sum(widths[1:])),
        state(*pending),
        state(*pending),
        state(rows).int(),
        state(rows).long(),
        wide(B * slots * H * size * (1 if args.momentum is None else 2)),
    )


_operator = register_cpp(
    "neural_memory",
    NeuralMemoryArgs,
    results="out surprise end_weights end_momentum end_pending_h end_pending_delta "
    "end_pending_decay end_pending_momentum end_count end_skipped checkpoints",
    cotangents="out? end_weights? end_momentum? end_pending_h? end_pending_delta? "
    "end_pending_decay? end_pending_momentum?",
    saved="checkpoints",
    empty_results=_empty_results,
)


def neural_memory(args: NeuralMemoryArgs) -> tuple[Tensor, ...]:
    """Return ``out``, ``surprise`` and the tensors of the state, of size 0 if there is none."""
    return _operator(*args)[:-1]


def _define_step() -> None:
    """Define the operator of one token; its schema names the tensors that it changes."""
    schema = schema_of(NeuralMemoryStepArgs)
    written = dict(a="pending_h", b="pending_delta", c="pending_decay", d="pending_momentum")
    for alias, name in written.items():
        schema = schema.replace(f"Tensor {name}", f"Tensor({alias}!) {name}")
    returned = ", ".join(["Tensor"] * 6)
    torch.library.define("memattn_cpp::neural_memory_step", f"({schema}) -> ({returned})")


_define_step()
_step = torch.ops.memattn_cpp.neural_memory_step.default


def neural_memory_step(args: NeuralMemoryStepArgs) -> tuple[Tensor, ...]:
    """Write the pending tensors; return ``out``, ``surprise`` and changed tensors of the state."""
    return _step(*args)
