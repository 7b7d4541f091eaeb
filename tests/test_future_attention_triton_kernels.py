"""future_attention in Triton: what the test file of all backends does not reach."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from memattn.bench.inputs import make_future_inputs
from memattn.ops import future_attention, future_attention_loss
from memattn.testing import assert_results_within_budget, run_with_gradients
from memattn_kernels import _launch
from memattn_kernels.future_attention import future_attention as triton_attention
from memattn_kernels.signatures import FutureAttentionArgs

pytestmark = pytest.mark.operator
SMALL = {"B": 1, "H": 2, "Hkv": 1}
COSINE = {"loss_type": "cosine", "detach_target": False}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(operator: Callable, tensors: dict[str, torch.Tensor], **options):
    """Triton's results, within the error budget of the reference."""
    low, high = (
        run_with_gradients(operator, tensors, options | {"backend": "reference"}, dtype=dtype)
        for dtype in (None, torch.float64)
    )
    actual = run_with_gradients(operator, tensors, options | {"backend": "triton"})
    assert_results_within_budget(actual, low, high)
    return actual


def bounds(*values: int) -> torch.Tensor:
    """An index tensor."""
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def arguments(tensors: dict[str, torch.Tensor], **options) -> FutureAttentionArgs:
    """Arguments of the kernels' own function, by position."""
    usual = dict.fromkeys(FutureAttentionArgs._fields)
    usual |= dict(table_len=tensors["future_key"].shape[-2], by_distance=False, query_offset=0)
    return FutureAttentionArgs(**{**usual, "scale": 0.25, **tensors, **options})


@pytest.mark.parametrize("future_index", ["position", "distance"])
def test_gradient_of_a_shared_table_in_several_parts(
    monkeypatch: pytest.MonkeyPatch, future_index: str
):
    rows = 4 if future_index == "distance" else 20
    tensors = make_future_inputs(**SMALL | {"B": 3}, T=20, rows=rows, device=DEVICE)
    options = dict(future_dim=4, future_index=future_index, seq_start=bounds(0, 9, 2))
    results = []
    for n_programs in (1, 6, 512):
        monkeypatch.setattr(_launch, "N_PROGRAMS", n_programs)
        monkeypatch.setattr(_launch, "MIN_PART", 8)
        results.append(check(future_attention, tensors, **options))
    for parts in results[1:]:  # added in another order
        torch.testing.assert_close(parts["d_future_key"], results[0]["d_future_key"])
        torch.testing.assert_close(parts["d_future_value"], results[0]["d_future_value"])
        assert torch.equal(parts["d_key"], results[0]["d_key"])


@pytest.mark.parametrize("wanted", ["out", "loss", "lse"])
def test_cotangents_of_some_outputs_only(wanted: str):
    tensors = make_future_inputs(**SMALL, T=12, dtype=torch.float16, device=DEVICE)

    def one(**inputs: torch.Tensor):
        outputs = future_attention_loss(**inputs)
        return type(outputs)(
            **{k: v if k == wanted else v.detach() for k, v in outputs._asdict().items()}
        )

    # outputs without a gradient are left out
    def gradients(backend: str, dtype: torch.dtype):
        leaves = {k: t.to(dtype).requires_grad_() for k, t in tensors.items()}
        out = getattr(one(**leaves, future_dim=3, backend=backend, **COSINE), wanted)
        found = torch.autograd.grad(out.float().sum(), [*leaves.values()], allow_unused=True)
        return {
            f"d_{k}": torch.zeros_like(leaves[k]) if grad is None else grad
            for k, grad in zip(leaves, found, strict=True)
        }

    assert_results_within_budget(
        gradients("triton", torch.float16),
        gradients("reference", torch.float16),
        gradients("reference", torch.float64),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("loss", [COSINE, {"loss_type": "mse"}], ids=str)
def test_every_head_dimension(dtype: torch.dtype, D: int, loss: dict):
    tensors = make_future_inputs(T=700, D=D, separate_query=True, dtype=dtype, device=DEVICE)
    check(future_attention_loss, tensors, future_dim=150, seq_start=bounds(0, 130), **loss)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offsets_beyond_32_bits():
    # the last sequence begins after 2**31 elements
    tensors = make_future_inputs(B=1, H=4, Hkv=4, T=2048, D=128, dtype=torch.bfloat16)
    tensors = {name: tensor.cuda() for name, tensor in tensors.items()}
    options = {"future_dim": 128, "backend": "triton"}
    expected = future_attention(**tensors, **options)
    many = {
        name: tensor
        if "future" in name
        else torch.cat([torch.zeros_like(tensor).expand(2049, -1, -1, -1), tensor])
        for name, tensor in tensors.items()
    }
    for actual, wanted in zip(future_attention(**many, **options), expected, strict=True):
        assert torch.equal(actual[-1], wanted[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_packed_documents_in_a_cuda_graph():
    tensors = make_future_inputs(**SMALL, T=300, D=64, dtype=torch.bfloat16, device="cuda")
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    options = dict(loss_type="mse", detach_target=False, cu_seqlens=bounds(0, 100, 300))
    args = arguments(tensors, future_dim=64, **options)

    def step() -> list[torch.Tensor]:
        out, _, _, loss = triton_attention(args)
        return [out, *torch.autograd.grad(out.float().sum() + loss, leaves)]

    expected = [tensor.clone() for tensor in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for tensor in results:
        tensor.detach().zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
