"""The error rule of tests and benchmarks, and a helper that runs an operator with its gradients."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def error_and_budget(name: str, actual: Tensor, low: Tensor, high: Tensor) -> tuple[float, float]:
    """The largest error of ``actual``, and the largest error that is allowed.

    Args:
        name: What is compared, for messages.
        actual: The result under test.
        low: The same from plain PyTorch in the dtype of ``actual``.
        high: The same in float64. The budget is twice the largest error of ``low`` plus one
            rounding step of the output's dtype at the largest value.

    Raises:
        AssertionError: If shape or dtype differ, for NaN, or if infinities do not match.
    """
    assert actual.shape == high.shape, f"{name}: shape {actual.shape}, not {high.shape}"
    assert actual.dtype == low.dtype, f"{name}: dtype {actual.dtype}, not {low.dtype}"
    if high.numel() == 0:
        return 0.0, 0.0
    actual64, low64, high = (t.detach().to(high.device, torch.float64) for t in (actual, low, high))
    assert not actual64.isnan().any(), f"{name}: NaN"
    infinite = high.isinf()
    assert torch.equal(actual64[infinite], high[infinite]), f"{name}: infinities differ"
    actual64, low64, high = (t.masked_fill(infinite, 0.0) for t in (actual64, low64, high))
    step = torch.finfo(actual.dtype).eps * high.abs().max().item()
    budget = 2.0 * (low64 - high).abs().max().item() + step
    return (actual64 - high).abs().max().item(), budget


def assert_within_budget(name: str, actual: Tensor, low: Tensor, high: Tensor) -> None:
    """Assert that the error of ``actual`` is at most twice that of plain PyTorch in the same dtype.

    The arguments are those of ``error_and_budget``.
    """
    error, budget = error_and_budget(name, actual, low, high)
    assert error <= budget, f"{name}: error {error:.3e} over the budget {budget:.3e}"


def run_with_gradients(
    function: Callable[..., Any],
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Outputs of ``function(**tensors, **options)`` and gradients of its floating-point inputs.

    The cotangents are random but fixed by ``seed``, the same for every dtype and device. A row
    whose log-sum-exp is -inf gets a zero cotangent for it.

    Args:
        function: An operator that returns a NamedTuple of tensors.
        tensors: Inputs by name; floating ones get a gradient.
        options: Further arguments.
        dtype: Cast floating inputs to this dtype first.
        seed: Seed of the cotangents.

    Returns:
        Outputs by field name, gradients by ``d_<input>``.
    """
    leaves = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensor = tensor.detach().to(dtype or tensor.dtype).requires_grad_()
        leaves[name] = tensor
    outputs = function(**leaves, **options)._asdict()
    generator = torch.Generator().manual_seed(seed)
    cotangents = []
    for out in outputs.values():
        cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        # rounded once, so that every dtype gets the same values
        cotangent = cotangent.to(torch.bfloat16).to(out.device, out.dtype)
        cotangents.append(torch.where(out.detach().isfinite(), cotangent, 0.0))
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(
        list(outputs.values()), list(wanted.values()), cotangents, allow_unused=True
    )
    results = {name: out.detach() for name, out in outputs.items()}
    for name, leaf, grad in zip(wanted, wanted.values(), grads, strict=True):
        results[f"d_{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results


def assert_results_within_budget(
    actual: dict[str, Tensor],
    low: dict[str, Tensor],
    high: dict[str, Tensor],
    names: Iterable[str] | None = None,
) -> None:
    """``assert_within_budget`` for every result that ``run_with_gradients`` returned."""
    assert actual.keys() == low.keys() == high.keys()
    for name in names or high:
        assert_within_budget(name, actual[name], low[name], high[name])
