"""Cases of segmented attention, and the backends that compute them, for its tests."""

import pytest
import torch

from memattn import segmented_attention
from memattn.ops._dispatch import cpp_is_built, triton_is_installed
from memattn.testing import (
    assert_results_within_budget,
    make_segmented_inputs,
    run_with_gradients,
)

CUDA = torch.cuda.is_available()
needs_cpp = pytest.mark.skipif(not cpp_is_built(), reason="the C++ extension is not built")
needs_triton = pytest.mark.skipif(not triton_is_installed(), reason="Triton is not installed")
BACKENDS = [
    pytest.param("cpp", marks=needs_cpp),
    pytest.param("triton", marks=needs_triton),
]
# without CUDA the Triton backend computes bfloat16 in float32, between two casts
DTYPES = {
    "cpp": [torch.float32, torch.float16, torch.bfloat16],
    "triton": [torch.float32, torch.float16, torch.bfloat16],
}
DEVICE = {"cpp": "cpu", "triton": "cuda" if CUDA else "cpu", "reference": "cpu"}

# name: (sizes of make_segmented_inputs, options of the operator)
CASES = {
    "one": (dict(T=1), dict()),
    "dense": (dict(T=37, S=23), dict(is_causal=False)),
    "causal": (dict(T=37), dict()),
    "multi-head": (dict(T=20, H=2, Hkv=2), dict(scale=0.3)),
    "multi-query": (dict(T=20, H=4, Hkv=1), dict()),
    "window": (dict(T=37), dict(window_size=5)),
    "window-1": (dict(T=17), dict(window_size=1)),
    "window-both": (dict(T=37), dict(window_size=5, is_causal=False)),
    "segment": (dict(T=37), dict(segment_len=8)),
    "segment-both": (dict(T=33), dict(segment_len=16, is_causal=False)),
    "union": (dict(T=37), dict(segment_len=8, window_size=11)),
    "union-both": (dict(T=37), dict(segment_len=8, window_size=6, is_causal=False)),
    "persistent": (dict(T=37, P=3), dict(window_size=5)),
    "memory": (dict(T=37, M=4, segment_len=8), dict(segment_len=8)),
    "memory-causal": (
        dict(T=37, M=8, segment_len=8),
        dict(segment_len=8, memory_is_causal=True),
    ),
    "all-sources": (
        dict(T=37, P=3, M=8, segment_len=8, Dv=24),
        dict(segment_len=8, window_size=3, memory_is_causal=True),
    ),
    "head-dim-40": (dict(T=17, D=40), dict()),
    "wide-value": (dict(T=17, D=8, Dv=24), dict()),
    "odd-head-dim": (dict(T=15, D=13, Dv=7), dict()),
    "decode": (dict(T=1, S=33, B=3), dict(query_offset=32)),
    "decode-window": (dict(T=3, S=33), dict(query_offset=30, window_size=7)),
    "past-the-keys": (dict(T=9, S=5), dict(query_offset=2, window_size=3)),
}
# options with index tensors
BOUNDED = {
    "packed": (
        dict(B=1, T=37, P=2),
        dict(window_size=6),
        dict(cu_seqlens=[0, 1, 9, 9, 30, 37]),
    ),
    "packed-memory": (
        dict(B=1, T=37, M=8, segment_len=8, n_segments=6),
        dict(segment_len=8, memory_is_causal=True),
        dict(cu_seqlens=[0, 1, 9, 9, 30, 37]),
    ),
    "padded-left": (
        dict(B=3, T=21, P=2, M=3, segment_len=8),
        dict(segment_len=8, window_size=4),
        dict(seq_start=[0, 5, 20]),
    ),
    "padded-right": (
        dict(B=3, T=21, P=2),
        dict(segment_len=8, is_causal=False),
        dict(seq_end=[21, 7, 0]),
    ),
    "trimmed": (
        dict(B=2, T=4, S=21, P=1),
        dict(segment_len=8, window_size=4, query_offset=17),
        dict(seq_start=[-3, 2], seq_end=[21, 20]),
    ),
}


def make_case(name, backend, dtype=torch.float32):
    """Inputs and options of a named case."""
    sizes, options, bounds = CASES[name] + ({},) if name in CASES else BOUNDED[name]
    tensors = make_segmented_inputs(**sizes, dtype=dtype, device=DEVICE[backend])
    bounds = {
        key: torch.tensor(value, dtype=torch.int32, device=DEVICE[backend])
        for key, value in bounds.items()
    }
    return tensors, {**options, **bounds}


def check_against_reference(backend, tensors, options):
    """Assert the error rule for outputs and all gradients."""
    actual = run_with_gradients(segmented_attention, tensors, {**options, "backend": backend})
    low = run_with_gradients(segmented_attention, tensors, {**options, "backend": "reference"})
    high = run_with_gradients(
        segmented_attention, tensors, {**options, "backend": "reference"}, dtype=torch.float64
    )
    assert_results_within_budget(actual, low, high)
