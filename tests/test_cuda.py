"""What only a CUDA device can show: long offsets, graph capture, whole models against the CPU.

The most telling come first, as a session on a rented card may end at any moment.
"""

from collections.abc import Callable

import pytest
import torch
from model_factories import make_model, make_tokens
from operator_contract import check
from torch import Tensor

from memattn import TaskMask, segmented_attention, task_masked_attention
from memattn.bench.inputs import make_segmented_inputs
from memattn.evaluate.audit import audit
from memattn.testing import assert_within_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SYSTEMS = ("vanilla", "both", "future")


def gradients(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> list[Tensor]:
    """The output and the gradients, with the output itself as the cotangent."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out = function(**leaves)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), out.detach())]


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_training_step_is_that_of_the_cpu(system: str):
    tokens = make_tokens(B=2, T=61)

    def step(dtype: torch.dtype, device: str, *, plain: bool = False) -> dict[str, Tensor]:
        model = make_model(system, dtype).to(device).train()
        for module in model.modules() if plain else ():
            if hasattr(module, "backend"):
                module.backend = "reference"
        loss = model(tokens.to(device), labels=tokens.to(device), use_cache=False).loss
        loss.backward()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        optimizer.step()
        results = {"loss": loss.detach()}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                results |= {f"d_{name}": parameter.grad, name: parameter.detach()}
        return results

    actual, low, high = (
        step(torch.float32, "cuda"),
        # the same projections, so that only the operators differ
        step(torch.float32, "cuda", plain=True),
        step(torch.float64, "cpu"),
    )
    assert actual.keys() == high.keys()
    for name, expected in high.items():
        assert_within_budget(name, actual[name], low[name], expected)


@pytest.mark.parametrize("system", SYSTEMS)
def test_generation_is_that_of_the_cpu(system: str):
    tokens = make_tokens(B=2, T=19)
    options = dict(max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = make_model(system, torch.float64).generate(tokens, **options)
    actual = make_model(system, torch.float32).cuda().generate(tokens.cuda(), **options)
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_model_in_bfloat16_is_exact(system: str):
    report = audit(make_model(system, torch.bfloat16).cuda(), seq_len=150)
    assert report.passed, str(report)


def test_rows_far_apart():
    """Strides of 4 Mi elements: offsets of the last rows are beyond 32 bits."""
    T, D, stride, dtype = 530, 64, 2**22, torch.bfloat16
    tensors = make_segmented_inputs(B=1, H=1, Hkv=1, T=T, D=D, dtype=dtype, device="cuda")
    apart = {}
    for name, tensor in tensors.items():
        storage = torch.empty(T * stride, dtype=dtype, device="cuda")
        apart[name] = storage.as_strided(tensor.shape, (0, 0, stride, 1))
        apart[name].copy_(tensor)
    expected = gradients(lambda **x: segmented_attention(**x, window_size=200).out, tensors)
    actual = gradients(lambda **x: segmented_attention(**x, window_size=200).out, apart)
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)


def test_gradients_beyond_32_bits():
    """The last of many sequences begins after 2**31 elements."""
    T, D, many = 2048, 64, 4097
    tensors = make_segmented_inputs(B=1, H=4, Hkv=4, T=T, D=D, dtype=torch.bfloat16, device="cuda")
    node = torch.arange(T) // 100
    edges = torch.rand(1, 21, 21, generator=torch.Generator().manual_seed(0)) < 0.3
    mask = TaskMask.from_graph(edges, node, node).to("cuda")
    functions: list[Callable[..., Tensor]] = [
        lambda **x: segmented_attention(**x, window_size=256).out,
        lambda **x: task_masked_attention(**x, task_mask=mask, task_id=0).out,
    ]
    zeros = {name: torch.zeros_like(t).expand(many - 1, -1, -1, -1) for name, t in tensors.items()}
    stacked = {name: torch.cat([zeros[name], tensor]) for name, tensor in tensors.items()}
    for function in functions:
        expected = gradients(function, tensors)
        actual = gradients(function, stacked)
        for got, wanted in zip(actual, expected, strict=True):
            assert torch.equal(got[-1], wanted[0])
        del actual
        torch.cuda.empty_cache()


def test_forward_and_backward_in_a_cuda_graph():
    tensors = make_segmented_inputs(T=300, D=64, dtype=torch.bfloat16, device="cuda")
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    d_out = torch.randn_like(leaves["query"])

    def step() -> list[Tensor]:
        out = segmented_attention(**leaves, window_size=70).out
        return [out, *torch.autograd.grad(out, list(leaves.values()), d_out)]

    expected = [tensor.detach().clone() for tensor in step()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for tensor in results:
        tensor.detach().zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_head_dimension_of_segmented_attention(dtype: torch.dtype, D: int):
    tensors = make_segmented_inputs(
        T=700, D=D, P=5, M=9, segment_len=100, dtype=dtype, device="cuda"
    )
    options = {"segment_len": 100, "window_size": 150, "backend": "triton"}
    check(segmented_attention, tensors, options)
