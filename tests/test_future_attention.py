"""future_attention and its loss: every backend against the float64 reference."""

import pytest
import torch

from memattn import future_attention, future_attention_loss
from memattn.ops._dispatch import cpp_is_built, triton_is_installed
from memattn.testing import (
    assert_results_within_budget,
    make_future_inputs,
    run_with_gradients,
)

pytestmark = pytest.mark.operator
CUDA = torch.cuda.is_available()
needs_cpp = pytest.mark.skipif(not cpp_is_built(), reason="the C++ extension is not built")
needs_triton = pytest.mark.skipif(not triton_is_installed(), reason="Triton is not installed")
BACKENDS = [
    pytest.param("cpp", marks=needs_cpp),
    pytest.param("triton", marks=needs_triton),
]
DTYPES = {
    "cpp": [torch.float32, torch.float16, torch.bfloat16],
    "triton": [torch.float32, torch.float16] + [torch.bfloat16] * CUDA,
}
DEVICE = {"cpp": "cpu", "triton": "cuda" if CUDA else "cpu", "reference": "cpu"}
LOSSES = [
    dict(loss_type=loss_type, detach_target=detach)
    for loss_type in ("mse", "cosine")
    for detach in (True, False)
]

# name: (sizes of make_future_inputs, options of the operator, index tensors)
CASES = {
    "one": (dict(T=1, rows=3), dict(future_dim=2), {}),
    "two": (dict(T=2), dict(future_dim=1), {}),
    "whole": (dict(T=37), dict(future_dim=36), {}),
    "band": (dict(T=37), dict(future_dim=5), {}),
    "band-1": (dict(T=20, H=2, Hkv=2), dict(future_dim=1, scale=0.3), {}),
    "short": (dict(T=20, rows=36, Hf=2), dict(future_dim=9), {}),
    "multi-query": (dict(T=20, H=4, Hkv=1, Hf=1), dict(future_dim=7), {}),
    "odd-head-dim": (dict(T=15, D=13, Dv=7), dict(future_dim=4), {}),
    "wide-value": (
        dict(T=17, D=8, Dv=24, rows=30),
        dict(future_dim=30, future_index="distance"),
        {},
    ),
    "distance": (
        dict(T=23, rows=6, separate_query=True),
        dict(future_dim=6, future_index="distance"),
        {},
    ),
    "separate-query": (dict(T=23, separate_query=True), dict(future_dim=6), {}),
    "per-sequence": (dict(T=19, B=3, tables=3, Hf=2), dict(future_dim=6), {}),
    "decode": (dict(T=1, S=33, B=3, rows=40), dict(query_offset=32, future_dim=5), {}),
    "chunk": (dict(T=6, S=33, rows=40), dict(query_offset=20, future_dim=5), {}),
    "packed": (
        dict(B=1, T=37, rows=22),
        dict(future_dim=4),
        dict(cu_seqlens=[0, 1, 9, 9, 30, 37]),
    ),
    "packed-tables": (
        dict(B=1, T=37, rows=22, tables=5, Hf=2),
        dict(future_dim=4),
        dict(cu_seqlens=[0, 1, 9, 9, 30, 37]),
    ),
    "padded-left": (
        dict(B=3, T=21, Dv=8),
        dict(future_dim=4),
        dict(seq_start=[0, 5, 20]),
    ),
    "padded-right": (dict(B=3, T=21), dict(future_dim=6), dict(seq_end=[21, 7, 0])),
    "padded-tables": (
        dict(B=2, T=21, tables=2),
        dict(future_dim=6),
        dict(seq_start=[2, 0], seq_end=[21, 12]),
    ),
}


INTERPRETED = not CUDA  # Triton kernels take seconds for each case then


def make_case(name, backend, dtype=torch.float32):
    """Inputs and options of a named case."""
    sizes, options, bounds = CASES[name]
    if backend == "triton" and INTERPRETED:
        sizes = {"H": 2, "Hkv": 1, **sizes}
    tensors = make_future_inputs(**sizes, dtype=dtype, device=DEVICE[backend])
    bounds = {
        key: torch.tensor(value, dtype=torch.int32, device=DEVICE[backend])
        for key, value in bounds.items()
    }
    return tensors, {**options, **bounds}


def skip_what_the_interpreter_need_not_repeat(backend, dtype, name, loss=None):
    """Every index set in float32; half precision and the losses on cases that differ in kind."""
    if backend != "triton" or not INTERPRETED:
        return
    few = ("distance", "packed-tables", "padded-left", "chunk")
    if dtype != torch.float32:
        few = ("packed-tables",) if loss else ("band", "distance", "padded-tables")
    if (loss or dtype != torch.float32) and name not in few:
        pytest.skip("covered by other cases; seconds in the interpreter")


def check_against_reference(operator, backend, tensors, options):
    """Assert the error rule for outputs and all gradients."""
    actual = run_with_gradients(operator, tensors, {**options, "backend": backend})
    low = run_with_gradients(operator, tensors, {**options, "backend": "reference"})
    high = run_with_gradients(
        operator, tensors, {**options, "backend": "reference"}, dtype=torch.float64
    )
    assert_results_within_budget(actual, low, high)


by_backend_and_dtype = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(
            *p.values, dtype, marks=p.marks, id=f"{p.values[0]}-{dtype}".replace("torch.", "")
        )
        for p in BACKENDS
        for dtype in DTYPES[p.values[0]]
    ],
)


@pytest.mark.parametrize("name", CASES)
@by_backend_and_dtype
def test_matches_reference(backend, dtype, name):
    skip_what_the_interpreter_need_not_repeat(backend, dtype, name)
    tensors, options = make_case(name, backend, dtype)
    check_against_reference(future_attention, backend, tensors, options)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("name", CASES)
@by_backend_and_dtype
def test_loss_matches_reference(backend, dtype, name, loss):
    skip_what_the_interpreter_need_not_repeat(backend, dtype, name, loss)
    tensors, options = make_case(name, backend, dtype)
    check_against_reference(future_attention_loss, backend, tensors, {**options, **loss})
