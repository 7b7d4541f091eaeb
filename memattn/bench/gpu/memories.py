"""Neural memory cases of the stage "correct"."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memattn import ops

CHUNK, SHORT_CHUNK = 64, 16
# sizes of the inputs (inner layers in units of D), and options as a function of T
Options = Callable[[int], dict[str, Any]]
PLAIN: dict[str, Any] = {"B": 2, "H": 2, "hidden": (2,)}
MEMORY: dict[str, tuple[dict[str, Any], Options]] = {
    # the second call starts from a state with an incomplete chunk
    "state": (PLAIN, lambda T: {"cut": T // 3, "max_norm": 0.5, "skip_nonfinite": True}),
    "plain": (PLAIN, lambda T: {}),
    "one layer": (PLAIN | {"hidden": ()}, lambda T: {"seq_start": [0, T // 5]}),
    "three layers": (PLAIN | {"hidden": (2, 1)}, lambda T: {"activation": "silu"}),
    "four layers": (
        PLAIN | {"hidden": (1, 2, 1), "decay": False},
        lambda T: {"residual": True, "loss": "huber", "huber_delta": 0.3},
    ),
    "no momentum": (PLAIN | {"momentum": False}, lambda T: {"max_norm": 0.5, "clamp": "soft"}),
    "by chunk": (PLAIN, lambda T: {"read": "chunk", "seq_end": [T, T - T // 5]}),
    "documents": (PLAIN | {"B": 1}, lambda T: {"cu_seqlens": [0, T // 4, T // 4, T - 1, T]}),
}


class Learned(NamedTuple):
    """The differentiable results of the memory."""

    out: Tensor
    packed_weights: Tensor
    pending_h: Tensor
    pending_delta: Tensor


class LearnedWithMomentum(NamedTuple):
    """The differentiable results of a memory with momentum."""

    out: Tensor
    packed_weights: Tensor
    pending_h: Tensor
    pending_delta: Tensor
    packed_momentum: Tensor


def shrink_for_interpreter(sizes: dict[str, Any]) -> dict[str, Any]:
    """Sizes for the interpreter: one sequence and one head."""
    return sizes | {"B": 1, "H": 1}


def learn(*, cut: int = 0, **given: Any) -> Learned | LearnedWithMomentum:
    """``neural_memory`` in two calls, split after ``cut`` tokens (one call if 0).

    Casts gates and weights back to at least float32.
    """
    wide = torch.promote_types(given["query"].dtype, torch.float32)
    tokens = {name: given.pop(name) for name in ("query", "key", "value")}
    gates = {name: given.pop(name, None) for name in ("lr", "momentum", "decay")}
    tokens |= {name: x if x is None else x.to(wide) for name, x in gates.items()}
    names = [name for name in given if name.startswith("weights_")]
    given["weights"] = tuple(given.pop(name).to(wide) for name in names)
    outs, state = [], None
    for part in (slice(0, cut), slice(cut, None)) if cut else (slice(None),):
        some = {name: x if x is None else x[:, :, part] for name, x in tokens.items()}
        found = ops.neural_memory(**some, **given, state=state)
        outs.append(found.out)
        state = found.state
    assert state is not None
    results = {name: getattr(state, name) for name in Learned._fields[1:]}
    results["out"] = torch.cat(outs, 2)
    if state.packed_momentum is None:
        return Learned(**results)
    return LearnedWithMomentum(**results, packed_momentum=state.packed_momentum)


def build(
    sizes: dict[str, Any], options: dict[str, Any], *, T: int, D: int, draw: Callable[..., Tensor]
) -> tuple[Callable[..., Any], dict[str, Tensor], dict[str, Any]]:
    """``learn``, its inputs by name (scaled so that learning converges) and its options.

    ``draw(*shape)`` gives normal numbers.
    """
    B, H = sizes["B"], sizes["H"]
    unit = 2.0 ** -round(D.bit_length() / 2)
    tensors = {
        "query": draw(B, H, T, D) * unit,
        "key": draw(B, H, T, D) * unit,
        "value": draw(B, H, T, D),
        "lr": draw(B, H, T).sigmoid() / 32,
    }
    if sizes.get("momentum", True):
        tensors["momentum"] = (draw(B, H, T) + 1).sigmoid()
    if sizes.get("decay", True):
        tensors["decay"] = (draw(B, H, T) - 3).sigmoid()
    widths = [D, *(n * D for n in sizes["hidden"]), D]
    for n, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        tensors[f"weights_{n + 1}"] = draw(H, after, before) * unit
    options["chunk_size"] = CHUNK if T > CHUNK else SHORT_CHUNK
    return learn, tensors, options
