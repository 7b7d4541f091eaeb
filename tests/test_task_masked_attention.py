"""task_masked_attention: every backend against the float64 reference."""

import pytest
import torch
from task_mask_factories import CASES, make_case

from memattn import task_masked_attention
from memattn.ops._dispatch import cpp_is_built, triton_is_installed
from memattn.testing import assert_results_within_budget, run_with_gradients

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
# Triton kernels take seconds for each case in the interpreter: half precision on a few
HALF_CASES = ("small", "graph-heads", "cross-graph")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(
            *p.values, dtype, marks=p.marks, id=f"{p.values[0]}-{dtype}".replace("torch.", "")
        )
        for p in BACKENDS
        for dtype in DTYPES[p.values[0]]
    ],
)
def test_matches_reference(backend, dtype, name):
    if backend == "triton" and not CUDA and dtype != torch.float32 and name not in HALF_CASES:
        pytest.skip("covered by other cases; seconds in the interpreter")
    tensors, options = make_case(name, dtype=dtype, device=DEVICE[backend])
    actual = run_with_gradients(task_masked_attention, tensors, {**options, "backend": backend})
    options = {**options, "backend": "reference"}
    low = run_with_gradients(task_masked_attention, tensors, options)
    high = run_with_gradients(task_masked_attention, tensors, options, dtype=torch.float64)
    assert_results_within_budget(actual, low, high)
