"""The C++ filter over tokens of the neural memory, beside torch's operations."""

from typing import Any

import pytest
import torch
from torch import Tensor

from memattn.nn import NeuralMemory
from memattn.nn.causal_convolution import filtered_vectors
from memattn.ops._dispatch import has_cpp_kernel
from memattn.testing import assert_within_budget

pytestmark = pytest.mark.skipif(
    not has_cpp_kernel("token_filter"), reason="the C++ extension is not built"
)
# rows, tokens, vectors, their features, tokens that the filter sees
SHAPES = {
    "blocks": (2, 131, 6, 8, 4),  # more than two blocks of tokens
    "odd": (1, 70, 3, 5, 3),  # no vector of the processor is full
    "no filter": (3, 5, 3, 16, 1),
    "one token": (2, 1, 9, 64, 4),
    "no rows": (0, 4, 2, 4, 2),
}


def run(inputs: Tensor, weight: Tensor | None, **options: Any) -> dict[str, Tensor]:
    """Vectors, and the gradients of their sum with random weights."""
    leaves = [x.clone().requires_grad_() for x in (inputs, weight) if x is not None]
    out = filtered_vectors(leaves[0], None if weight is None else leaves[1], **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((out * weights.to(out.dtype)).sum(), leaves)
    return {"out": out.detach(), "d_inputs": gradients[0], "d_weight": gradients[-1]}


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("share", [0.0, 1 / 3, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_vectors_and_gradients_are_those_of_torch(shape, share, packed):
    B, T, n, D, size = SHAPES[shape]
    torch.manual_seed(0)
    inputs, weight = torch.randn(B, T + size - 1, n * D), torch.randn(n * D, size)
    positions = torch.cat([torch.arange(T // 3), torch.arange(T - T // 3)]) if packed else None
    options: dict[str, Any] = dict(T=T, positions=positions, num_unit=round(share * n), head_dim=D)
    taps = None if size == 1 else weight
    actual = run(inputs, taps, backend="auto", **options)
    low = run(inputs, taps, backend="reference", **options)
    high = run(inputs.double(), None if taps is None else taps.double(), backend="auto", **options)
    for name in actual:
        assert_within_budget(name, actual[name], low[name], high[name])


def test_zero_vectors_stay_zero():
    inputs = torch.zeros(1, 4, 8, requires_grad=True)
    options: dict[str, Any] = dict(T=4, positions=None, num_unit=2, head_dim=4, backend="auto")
    out = filtered_vectors(inputs, None, **options)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(1, 4, 2, 4))
    assert inputs.grad is not None and inputs.grad.isfinite().all()


def test_gradients_with_other_strides_are_read_as_they_are():
    inputs = torch.randn(2, 6, 8, requires_grad=True)
    options: dict[str, Any] = dict(T=6, positions=None, num_unit=1, head_dim=4)
    weights = torch.randn(4, 2, 6, 2).permute(3, 2, 1, 0)
    found = []
    for backend in ("auto", "reference"):
        out = filtered_vectors(inputs, None, backend=backend, **options)
        found += torch.autograd.grad(out, inputs, weights)
    torch.testing.assert_close(*found)


def test_a_layer_takes_the_operator_and_is_differentiable_once(monkeypatch):
    taken = []
    operator: Any = torch.ops.memattn_cpp.token_filter
    monkeypatch.setattr(
        "memattn.cpp.token_filter._operator", lambda *a: taken.append(1) or operator(*a)
    )
    memory = NeuralMemory(16, 2, chunk_size=4)
    x = torch.randn(1, 5, 16, requires_grad=True)
    out = memory(x).out
    assert taken == [1]
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(length=4), "inputs must have 1 tokens before those that are filtered"),
        (dict(unit_features=3), "unit_features must be a multiple of head_dim"),
        (dict(positions=torch.zeros(2, dtype=torch.int64)), "positions must have shape"),
        (dict(positions=torch.zeros(3)), "positions must be contiguous int64"),
        (dict(weight=torch.zeros(2, 7)), "weight must have shape"),
        (dict(inputs=torch.zeros(1, 4, 8).double()), "inputs must be a contiguous float32"),
    ],
)
def test_raw_callers_are_told_what_is_wrong(options, message):
    from memattn.cpp.token_filter import TokenFilterArgs, token_filter

    args: dict[str, Any] = dict(
        inputs=torch.zeros(1, 4, 8),
        weight=torch.zeros(2, 8),
        positions=None,
        length=3,
        unit_features=4,
        head_dim=2,
    )
    with pytest.raises(RuntimeError, match=message):
        token_filter(TokenFilterArgs(**args | options))
