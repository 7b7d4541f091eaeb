"""Inputs of the neural memory, and its results with the gradients of all of them."""

from typing import Any

import torch
from torch import Tensor

from memattn import NeuralMemoryState, neural_memory
from memattn.testing import assert_within_budget

FLOATING = ("packed_weights", "packed_momentum", "pending_h", "pending_delta")
FLOATING += ("pending_decay", "pending_momentum")


def make_inputs(
    B=2,
    H=2,
    T=13,
    D=4,
    Dv=None,
    hidden=(6,),
    momentum=True,
    decay=True,
    dtype=torch.float64,
    device="cpu",
    seed=0,
) -> dict[str, Tensor]:
    """Tensors by name, the layers as ``weights_1`` ...; exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).bfloat16().to(device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    Dv = D if Dv is None else Dv
    tensors = {
        "query": draw(B, H, T, D).to(dtype),
        "key": (draw(B, H, T, D) / 2).to(dtype),
        "value": draw(B, H, T, Dv).to(dtype),
        "lr": draw(B, H, T).sigmoid().bfloat16().to(wide) / 4,
    }
    if momentum:
        tensors["momentum"] = (draw(B, H, T) + 1).sigmoid().bfloat16().to(wide)
    if decay:
        tensors["decay"] = (draw(B, H, T) - 2).sigmoid().bfloat16().to(wide)
    sizes = [D, *hidden, Dv]
    for n, (before, after) in enumerate(zip(sizes, sizes[1:], strict=False)):
        tensors[f"weights_{n + 1}"] = draw(H, after, before).to(wide) / 2
    return tensors


def small_steps(**sizes) -> dict[str, Tensor]:
    """Inputs whose rounding does not grow from token to token: learning converges."""
    return {n: t / 4 if n == "lr" else t for n, t in make_inputs(**sizes).items()}


def cut(tensors, first, last):
    """The inputs of some of the tokens."""
    return {n: t if n.startswith("weights_") else t[:, :, first:last] for n, t in tensors.items()}


def call(tensors: dict[str, Tensor], **options: Any):
    """The operator with its tensors by name; ``state_...`` are those of a state in ``options``."""
    named = {n: t for n, t in tensors.items() if not n.startswith(("weights_", "state_"))}
    layers = tuple(t for n, t in tensors.items() if n.startswith("weights_"))
    given = {n.removeprefix("state_"): t for n, t in tensors.items() if n.startswith("state_")}
    if given:
        options["state"] = NeuralMemoryState(**{**vars(options["state"]), **given})
    named = {"momentum": None, "decay": None, **named}
    return neural_memory(**named, weights=layers, **options)


def floating(state: NeuralMemoryState) -> dict[str, Tensor]:
    """The tensors of a state that have gradients."""
    found = {name: getattr(state, name) for name in FLOATING}
    return {name: x for name, x in found.items() if x is not None}


def run(
    tensors: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Results and gradients by name, for random cotangents that are always the same.

    With ``dtype`` float64 all inputs are, and the state with them.
    """
    options = dict(options)
    if dtype is not None:
        tensors = {n: t.to(dtype) for n, t in tensors.items()}
        if options.get("state") is not None:
            state = options["state"]
            kept = {**floating(state), "initial": state.initial}
            changed = {n: t.to(dtype) for n, t in kept.items()}
            options["state"] = NeuralMemoryState(**{**vars(state), **changed})
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
    if options.get("state") is not None:
        state = {f"state_{n}": t for n, t in floating(options["state"]).items()}
        leaves |= {n: t.detach().requires_grad_() for n, t in state.items()}
    found = call(leaves, **options)
    results = {"out": found.out}
    if found.state is not None:
        results |= floating(found.state)
    generator = torch.Generator().manual_seed(1)
    cotangents = []
    for result in results.values():
        values = torch.randn(result.shape, generator=generator).bfloat16()
        values = values / max(1.0, (result.numel() / found.out.numel()) ** 0.5)
        cotangents.append(values.to(result.device, result.dtype))
    kept = [r.requires_grad for r in results.values()]
    grads = torch.autograd.grad(
        [r for r, k in zip(results.values(), kept, strict=True) if k],
        list(leaves.values()),
        [c for c, k in zip(cotangents, kept, strict=True) if k],
        allow_unused=True,
    )
    results = {name: result.detach() for name, result in results.items()}
    results["surprise"] = found.surprise
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        results[f"d_{name}"] = torch.zeros_like(leaf) if grad is None else grad
    if found.state is not None:
        results |= {"count": found.state.count, "skipped": found.state.skipped}
    return results


def check(
    backend: str, sizes: dict[str, Any], options: dict[str, Any], before: int, seeds: int = 2
) -> None:
    """Assert the error rule over many sequences: rounding grows in some more than in others.

    Values, the state and every gradient, of calls whose state holds ``before`` tokens already.
    """
    found: dict[str, list[list[Tensor]]] = {}
    for seed in range(seeds):
        inputs, given = small_steps(**sizes, seed=seed), dict(options)
        if before:
            past = small_steps(**{**sizes, "T": before}, seed=seed)
            alike = {n: o for n, o in options.items() if not n.startswith("seq_")}
            weights = {n: t for n, t in inputs.items() if n.startswith("weights_")}
            given["state"] = call({**past, **weights}, **alike, backend="reference").state
        three = [
            run(inputs, {**given, "backend": which}, wide)
            for which, wide in ((backend, None), ("reference", None), ("reference", torch.float64))
        ]
        for name in set(three[0]) & {"count", "skipped"}:
            assert torch.equal(*(results.pop(name) for results in three[:2]))
        for name in three[0]:
            found.setdefault(name, []).append([results[name].flatten() for results in three])
    for name, draws in found.items():
        assert_within_budget(name, *(torch.cat(which) for which in zip(*draws, strict=True)))
