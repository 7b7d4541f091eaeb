"""What every operator refuses, and in which words; an operator's own errors are in its file."""

import re

import pytest
import torch
from operator_contract import COMPILED, int32, needs_triton
from operator_specs import SPECS, having

pytestmark = pytest.mark.operator
every_operator = pytest.mark.parametrize("spec", SPECS, ids=str)
compiled_backends = pytest.mark.parametrize("backend", COMPILED)


def zeros(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


# of an operator that has the argument
WRONG = {
    "query must be a tensor": (TypeError, dict(query=None)),
    "query must have 4 axes": (ValueError, dict(query=zeros(2, 4, 9))),
    "query must have dtype": (ValueError, dict(query=zeros(2, 4, 9, 16, dtype=torch.int64))),
    "key must be a tensor": (TypeError, dict(key=[1.0])),
    "key must have shape [B=2, Hkv, S, D=16], got [2, 2, 9, 8]": (
        ValueError,
        dict(key=zeros(2, 2, 9, 8)),
    ),
    "key must have a number of heads that divides those of query, H=4": (
        ValueError,
        dict(key=zeros(2, 3, 9, 16)),
    ),
    "key must have the dtype of query": (ValueError, dict(key=zeros(2, 2, 9, 16).half())),
    "key must be on the device of query": (ValueError, dict(key=zeros(2, 2, 9, 16, device="meta"))),
    "value must have shape [B=2, Hkv=2, S=9, Dv]": (ValueError, dict(value=zeros(2, 2, 8, 16))),
    "is_causal must be True or False, got int": (TypeError, dict(is_causal=1)),
    "query_offset must be at least 0": (ValueError, dict(query_offset=-1)),
    "scale must be positive and finite, got 0.0": (ValueError, dict(scale=0.0)),
    "scale must be a number or None": (TypeError, dict(scale="1")),
    "seq_start must have dtype torch.int32": (ValueError, dict(seq_start=zeros(2))),
    "seq_start must have shape [B=2]": (ValueError, dict(seq_start=int32(0, 0, 0))),
    "seq_end must have dtype torch.int32": (ValueError, dict(seq_end=torch.tensor([0, 1]))),
    "seq_end must be at least seq_start=3, got 1": (
        ValueError,
        dict(seq_start=int32(0, 3), seq_end=int32(9, 1)),
    ),
    "seq_end must be at least seq_start=0, got -1": (ValueError, dict(seq_end=int32(9, -1))),
    "query must have B=1 with cu_seqlens": (ValueError, dict(cu_seqlens=int32(0, 9))),
    "backend must be one of auto, triton, cpp, reference, got 'cuda'": (
        ValueError,
        dict(backend="cuda"),
    ),
    "backend must be one of auto, triton, cpp, reference, got NoneType": (
        TypeError,
        dict(backend=None),
    ),
}
TENSORS = {"query", "key", "value"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        pytest.param(spec, message, id=f"{spec}-{message}")
        for spec in SPECS
        for message, (_, change) in WRONG.items()
        if all(map(spec.takes, change)) and not (spec.own_axes and TENSORS & change.keys())
    ],
)
def test_names_the_wrong_argument(spec, message):
    error, change = WRONG[message]
    tensors, options = spec.make(spec.wrong)
    with pytest.raises(error, match=re.escape(message)):
        spec.operator(**{**tensors, **options, **change})


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 5, 3, 9], "cu_seqlens must rise"),
        ([1, 5, 9], "cu_seqlens must begin with 0 and end with S=9"),
        ([0, 5], "cu_seqlens must begin with 0 and end with S=9"),
        ([0], "cu_seqlens must have at least 2 entries"),
    ],
)
@pytest.mark.parametrize("spec", [s for s in SPECS if s.takes("cu_seqlens")], ids=str)
def test_names_wrong_document_bounds(spec, bounds, message):
    tensors, options = spec.make(spec.wrong_packed)
    with pytest.raises(ValueError, match=message):
        spec.run(tensors, {**options, "cu_seqlens": int32(*bounds)})
    with pytest.raises(ValueError, match="seq_end must be None with cu_seqlens"):
        spec.run(tensors, {**options, "cu_seqlens": int32(0, 9), "seq_end": int32(9)})


@compiled_backends
@every_operator
def test_a_named_backend_does_not_fall_back(spec, backend):
    tensors, options = spec.make(spec.wrong, backend, torch.float64)
    with pytest.raises(NotImplementedError, match="query must have dtype float16, bfloat16"):
        spec.run(tensors, options | {"backend": backend})
    assert spec.run(tensors, options | {"backend": "auto"}).out.dtype == torch.float64


@needs_triton
@pytest.mark.parametrize("name", ["query", "value"])
@pytest.mark.parametrize("spec", having("triton"), ids=str)
def test_names_the_argument_of_a_wide_head(spec, name):
    sizes = {"D": 257, "Dv": 16} if name == "query" else {"Dv": 257}
    tensors, options = spec.make(spec.wrong, "triton", **sizes)
    wanted = rf'^(chapter_)?{name} must have .*257; backend "reference"'
    with pytest.raises(NotImplementedError, match=wanted):
        spec.run(tensors, options)


# PyTorch warns of itself when forward mode is first used
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@compiled_backends
@every_operator
def test_transforms_that_kernels_do_not_follow_name_the_backend(spec, backend):
    tensors, options = spec.make(spec.wrong, backend)

    def out(query):
        return spec.run({**tensors, "query": query}, {**options, "backend": backend}).out

    query = tensors["query"]
    with pytest.raises(NotImplementedError, match='backend must be "reference" in forward-mode'):
        torch.func.jvp(out, (query,), (torch.ones_like(query),))  # it gave zeros
    with pytest.raises(NotImplementedError, match='backend must be "reference" in torch.func.grad'):
        torch.func.grad(lambda query: out(query).sum())(query)
