"""Inputs of the router of chapters, and its results with gradients."""

import math

import torch

from memattn import chapter_router
from memattn.testing import assert_within_budget

LOSSES = ("load_balance_loss", "auxiliary_loss", "z_loss")


def make_inputs(B=2, N=9, E=8, C=6, bias=True, dtype=torch.float32, device="cpu", seed=0, **more):
    """Inputs that are exact in bfloat16; the weights in ``weight_dtype`` if that is given."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()
    kept = more.get("weight_dtype", dtype)
    size = 2.0 ** -round(math.log2(max(E, 1)) / 2)  # logits of about 1
    tensors = {"hidden": (draw(B, N, E) * size).to(device, dtype), "weight": draw(C, E)}
    tensors["weight"] = tensors["weight"].to(device, kept)
    if bias:
        tensors["bias"] = draw(C).to(device, kept)
    return tensors


def run(tensors, options, backend, names=("weights", *LOSSES), dtype=None):
    """Results, and gradients of those named, with random cotangents that are always the same."""
    leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in tensors.items()}
    found = chapter_router(**leaves, **options, backend=backend)._asdict()
    generator = torch.Generator().manual_seed(0)
    cotangents = []
    for name in names:
        values = torch.randn(found[name].shape, generator=generator).bfloat16()
        cotangents.append(values.to(found[name]))
    outputs = [found[name] for name in names]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    results = {name: result.detach() for name, result in found.items()}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        results[f"d_{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results


def check(cases, options, backend, names=("weights", *LOSSES)):
    """Assert the error rule over several inputs: a few numbers may be exact by luck."""
    found = {}
    for tensors, more in cases:
        three = [
            run(tensors, {**options, **more}, *who)
            for who in (
                (backend, names),
                ("reference", names),
                ("reference", names, torch.float64),
            )
        ]
        assert torch.equal(three[0]["indices"], three[2]["indices"])
        assert three[0].pop("indices").dtype == torch.int32
        for name in three[0]:
            found.setdefault(name, []).append([results[name].flatten() for results in three])
    for name, draws in found.items():
        assert_within_budget(name, *(torch.cat(which) for which in zip(*draws, strict=True)))
