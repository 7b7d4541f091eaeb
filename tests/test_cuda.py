"""What only a CUDA device can show: long offsets, graph capture, whole models against the CPU.

The most telling come first, as a session on a rented card may end at any moment.
"""

from collections.abc import Callable

import pytest
import torch
from chapter_factories import make_chapter_inputs
from model_factories import make_model, make_tokens
from operator_contract import check
from torch import Tensor

from memattn import (
    TaskMask,
    chapter_attention,
    chapter_router,
    segmented_attention,
    task_masked_attention,
)
from memattn.bench.inputs import make_segmented_inputs
from memattn.evaluate.audit import audit
from memattn.testing import assert_within_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SYSTEMS = ("vanilla", "both", "future", "chapters", "tokens")


def make(system: str, dtype: torch.dtype):
    """A tiny model; of "tokens" every token selects chapters."""
    if system == "tokens":
        names = ("routing_strategy_train", "routing_strategy_inference")
        return make_model("chapters", dtype, **dict.fromkeys(names, "token"))
    return make_model(system, dtype)


def gradients(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> list[Tensor]:
    """The output and the gradients, with the output itself as the cotangent."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out = function(**leaves)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), out.detach())]


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_training_step_is_that_of_the_cpu(system: str):
    tokens = make_tokens(B=2, T=61)

    def step(dtype: torch.dtype, device: str, *, plain: bool = False) -> dict[str, Tensor]:
        model = make(system, dtype).to(device).train()
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
    expected = make(system, torch.float64).generate(tokens, **options)
    actual = make(system, torch.float32).cuda().generate(tokens.cuda(), **options)
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_model_in_bfloat16_is_exact(system: str):
    report = audit(make(system, torch.bfloat16).cuda(), seq_len=150)
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


@pytest.mark.parametrize("combine", ["joint", "independent"])
@pytest.mark.parametrize("form", ["token", "sequence"])
def test_chapters_and_queries_far_apart(form: str, combine: str):
    """Rows of queries 4 Mi elements apart, chapters 256 Mi: the last begin beyond 32 bits."""
    T, D, C, dtype = 530, 64, 12, torch.bfloat16
    tensors, slots = make_chapter_inputs(
        B=1, H=2, Hkv=1, T=T, D=D, C=C, M=70, K=3, N=T if form == "token" else None,
        dtype=dtype, device="cuda",
    )  # fmt: skip
    apart = dict(tensors)
    for name, stride, width in (("query", 2**22, 128), ("chapter_key", 2**28, 4480)):
        tensor = tensors[name]
        storage = torch.empty(max(T * 2**22, C * 2**28), dtype=dtype, device="cuda")
        shape = {"query": (0, D, stride, 1), "chapter_key": (stride, width, D, 1)}[name]
        apart[name] = storage.as_strided(tensor.shape, shape)
        apart[name].copy_(tensor)
    attend = lambda **x: chapter_attention(**x, **slots, combine=combine, backend="triton").out
    for got, wanted in zip(gradients(attend, apart), gradients(attend, tensors), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("combine", ["joint", "independent"])
def test_a_chapter_of_all_tokens_is_the_same_at_every_call(combine: str):
    """One chapter has a third of all rows, in parts that are added in their order."""
    tensors, slots = make_chapter_inputs(
        B=4, H=4, Hkv=2, T=3000, D=64, C=40, M=64, K=3, N=3000, dtype=torch.bfloat16, device="cuda"
    )
    slots["chapter_indices"][..., 0] = 0
    attend = lambda **x: chapter_attention(**x, **slots, combine=combine, backend="triton").out
    expected = gradients(attend, tensors)
    for _ in range(20):
        for got, wanted in zip(gradients(attend, tensors), expected, strict=True):
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


@pytest.mark.parametrize("form", ["token", "sequence"])
def test_routing_and_chapters_in_a_cuda_graph(form: str):
    """Nothing that the selection decides is read by the CPU."""
    B, T, E, C = 2, 300, 64, 24
    tensors, _ = make_chapter_inputs(
        B=B, H=2, Hkv=2, T=T, D=64, C=C, M=64, K=3, weights=False, dtype=torch.bfloat16,
        device="cuda",
    )  # fmt: skip
    rows = T if form == "token" else 1
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device="cuda").bfloat16()
    leaves = [*tensors.values(), draw(B, rows, E), draw(C, E)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    d_out = torch.randn_like(tensors["query"])

    def step() -> list[Tensor]:
        routed = chapter_router(*leaves[3:], top_k=3, backend="triton")
        chosen = [t if rows > 1 else t[:, 0] for t in (routed.indices, routed.weights)]
        out = chapter_attention(*leaves[:3], *chosen, backend="triton").out
        losses = [routed.load_balance_loss, routed.z_loss]
        return [
            out,
            *torch.autograd.grad([out, *losses], leaves, [d_out, *map(torch.ones_like, losses)]),
        ]

    expected = [tensor.detach().clone() for tensor in step()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    # other rows select other chapters
    with torch.no_grad():
        leaves[3].copy_(draw(B, rows, E))
    for tensor in results:
        tensor.detach().zero_()
    graph.replay()
    actual = [tensor.detach().clone() for tensor in results]
    assert not torch.equal(actual[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(actual, step(), strict=True))


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_head_dimension_of_segmented_attention(dtype: torch.dtype, D: int):
    tensors = make_segmented_inputs(
        T=700, D=D, P=5, M=9, segment_len=100, dtype=dtype, device="cuda"
    )
    options = {"segment_len": 100, "window_size": 150, "backend": "triton"}
    check(segmented_attention, tensors, options)
