"""Decoding with the neural memory: calls of one token, and states that record their past."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memattn.checks import is_traced
from memattn.ops.neural_memory_state import NeuralMemoryState, Writer
from memattn_kernels.signatures import NeuralMemoryArgs, NeuralMemoryStepArgs

PENDING = ("pending_h", "pending_delta", "pending_decay", "pending_momentum")
FIELDS = NeuralMemoryStepArgs._fields
CONSTANTS = FIELDS[FIELDS.index("skipped") + 1 : FIELDS.index("fold")]
Step = Callable[[NeuralMemoryStepArgs], tuple[Tensor, ...]]


def is_step(args: NeuralMemoryArgs) -> bool:
    """Whether this is one token after a state, in all rows, without gradients or a trace."""
    if args.count is None or args.query.shape[2] != 1 or args.row_start is not None:
        return False
    if is_traced(args.query):
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(isinstance(x, Tensor) and x.requires_grad for x in args)


class StepPlan(NamedTuple):
    """The arguments of a checked call of one token, reused by the next call with its state."""

    signature: tuple[Any, ...]
    constants: tuple[Any, ...]  # what follows ``skipped`` in the arguments of a step, but ``fold``
    step: Step


def signature_of(
    tokens: Sequence[Any], weights: Sequence[Any], options: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Everything that the checks of a call depend on but its state; arguments may have any type."""
    named: list[Any] = [
        (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else type(x)
        for x in (*tokens, *weights)
    ]
    return (*named, len(weights), *options)


def plan_of(args: NeuralMemoryArgs, signature: tuple[Any, ...], step: Step) -> StepPlan:
    """The plan of a call that was checked."""
    constants = tuple(getattr(args, name) for name in CONSTANTS)
    return StepPlan(signature, constants, step)


def next_step(
    state: NeuralMemoryState | None,
    tokens: Sequence[Any],
    weights: Sequence[Any],
    options: tuple[Any, ...],
) -> tuple[Tensor, NeuralMemoryState, Tensor] | None:
    """Output, state and surprise of a call with the signature of the one that made the state. None
    if that call was not a step or the signature differs; the call must then be checked.
    """
    if state is None or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    writer = getattr(state, "writer", None)
    if writer is None or writer.plan is None or writer.newest() is not state:
        return None
    if not isinstance(weights, list | tuple) or torch.is_autocast_enabled(state.count.device.type):
        return None
    if writer.plan.signature != signature_of(tokens, weights, options):
        return None
    return run_step(tokens, state, state.initial, writer.plan)


def run_step(
    tokens: Sequence[Tensor | None], state: NeuralMemoryState, initial: Tensor, plan: StepPlan
) -> tuple[Tensor, NeuralMemoryState, Tensor]:
    """Output, state and surprise of one token.

    The next step writes into the pending rows of the returned state, after the rows that this state
    uses. Weights are written only when a chunk ends.
    """
    last, uniform, ended = state.chunk_size - 1, state.uniform, None
    if uniform is not None:
        fold = uniform == last
    else:
        ended = state.count == last
        fold = state.count.is_cuda or bool(ended.any())  # not worth waiting for the device
    pending, writer = state.writable()
    given = (*tokens, state.packed_weights, state.packed_momentum, *pending, state.count)
    given = (*given, state.skipped, *plan.constants, fold)
    out, surprise, weights, momentum, count, skipped = plan.step(NeuralMemoryStepArgs._make(given))
    changed: dict[str, Any] = dict(zip(PENDING, pending, strict=True))
    changed |= {"count": count, "skipped": skipped, "initial": initial, "writer": writer}
    if uniform is not None:
        changed["uniform"] = (uniform + 1) % state.chunk_size
    writer.plan = plan
    if not fold:
        after = state.changed(changed)
        writer.wrote(after)
        return out, after, surprise
    changed["packed_weights"] = weights
    if state.packed_momentum is not None:
        changed["packed_momentum"] = momentum
    # the next step begins new rows: those of the chunk that ended are another state's
    if uniform is not None:
        changed |= {name: torch.empty_like(changed[name]) for name in PENDING}
    else:
        changed |= {name: changed[name].clone() for name in PENDING}
    changed["writer"] = writer = Writer(plan)
    after = state.changed(changed).remember(state, ended)
    writer.wrote(after)
    return out, after, surprise


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
