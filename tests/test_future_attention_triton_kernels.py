"""future_attention in Triton: what the test file of all backends does not reach."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from memattn.ops import future_attention, future_attention_loss
from memattn.testing import (
    assert_results_within_budget,
    make_future_inputs,
    run_with_gradients,
)
from memattn_kernels.future_attention import backward, future_attention_op
from memattn_kernels.future_attention import future_attention as triton_attention
from memattn_kernels.future_attention import future_attention_loss as triton_loss

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


def arguments(tensors: dict[str, torch.Tensor], future_dim: int) -> tuple:
    """Positional arguments of the kernels' own function."""
    table_len = tensors["future_key"].shape[-2]
    return (*tensors.values(), *(None,) * 4, table_len, False, future_dim, 0, 0.25)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("options", [{}, COSINE], ids=["plain", "loss"])
def test_writes_all_it_returns(options: dict):
    operator = future_attention_loss if options else future_attention
    tensors = make_future_inputs(**SMALL, Hf=1, T=21, separate_query=True, device=DEVICE)
    check(operator, tensors, future_dim=5, seq_end=bounds(18), **options)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("tables", [None, 0], ids=["shared", "per-sequence"])
@pytest.mark.parametrize("sizes", [dict(T=0, S=5), dict(T=5, S=0), dict(B=0, T=5)], ids=str)
def test_empty_inputs(sizes: dict[str, int], tables: int | None):
    sizes = SMALL | sizes
    tables = None if tables is None else sizes["B"]
    tensors = make_future_inputs(**sizes, rows=6, tables=tables, device=DEVICE)
    check(future_attention, tensors, future_dim=3)
    check(future_attention_loss, tensors, future_dim=3, **COSINE)


@pytest.mark.parametrize("tables", [None, 4], ids=["shared", "per-document"])
@pytest.mark.parametrize("future_index", ["position", "distance"])
def test_what_no_query_sees_may_be_nan(future_index: str, tables: int | None):
    sizes = {**SMALL, "H": 1, "T": 45, "rows": 50 if future_index == "position" else 3}
    tensors = make_future_inputs(**sizes, tables=tables, device=DEVICE)
    # the second tile of queries holds the tail of a document, a short one and the head of another
    documents = bounds(0, 36, 40, 40, 45)
    check(future_attention, tensors, future_dim=3, future_index=future_index, cu_seqlens=documents)
    expected = run_with_gradients(
        *(future_attention, tensors),
        dict(future_dim=3, future_index=future_index, cu_seqlens=documents, backend="triton"),
    )
    for name in ("future_key", "future_value"):
        grad = expected[f"d_{name}"]
        unseen = (grad == 0).all(-1, keepdim=True)
        assert unseen.any() or (future_index == "distance" and tables is None)
        tensors[name] = tensors[name].masked_fill(unseen, torch.nan)
    actual = run_with_gradients(
        *(future_attention, tensors),
        dict(future_dim=3, future_index=future_index, cu_seqlens=documents, backend="triton"),
    )
    assert all(torch.equal(actual[name], result) for name, result in expected.items())


def test_padding_may_be_nan():
    tensors = make_future_inputs(**SMALL, T=20, device=DEVICE)
    options = dict(future_dim=4, seq_start=bounds(3), seq_end=bounds(17), backend="triton")
    expected = run_with_gradients(future_attention_loss, tensors, options | COSINE)
    for name in ("query", "key", "value"):
        tensors[name][:, :, :3] = torch.nan
        tensors[name][:, :, 17:] = torch.nan
    actual = run_with_gradients(future_attention_loss, tensors, options | COSINE)
    assert all(torch.equal(actual[name], result) for name, result in expected.items())


@pytest.mark.parametrize("future_index", ["position", "distance"])
def test_gradient_of_a_shared_table_in_several_parts(
    monkeypatch: pytest.MonkeyPatch, future_index: str
):
    rows = 4 if future_index == "distance" else 20
    tensors = make_future_inputs(**SMALL | {"B": 3}, T=20, rows=rows, device=DEVICE)
    options = dict(future_dim=4, future_index=future_index, seq_start=bounds(0, 9, 2))
    results = []
    for n_programs in (1, 6, 512):
        monkeypatch.setattr(backward, "N_PROGRAMS", n_programs)
        monkeypatch.setattr(backward, "MIN_CHUNK", 8)
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


def test_any_strides_give_the_same_bits():
    tensors = make_future_inputs(**SMALL | {"B": 2}, T=18, tables=1, Hf=1, device=DEVICE)
    tensors = {k: t.expand(2, -1, -1, -1) if "future" in k else t for k, t in tensors.items()}
    options = {"future_dim": 5, "backend": "triton", **COSINE}
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    expected = run_with_gradients(future_attention_loss, plain, options)

    def strided(**leaves: torch.Tensor):
        # tokens before heads, rows with gaps, elements that are not adjacent
        leaves["query"] = leaves["query"].transpose(1, 2).contiguous().transpose(1, 2)
        leaves["key"] = torch.nn.functional.pad(leaves["key"], (3, 5))[..., 3:-5]
        leaves["future_value"] = leaves["future_value"].mT.contiguous().mT
        return future_attention_loss(**leaves, **options)

    for name, result in run_with_gradients(strided, tensors, {}).items():
        assert torch.equal(result, expected[name]), name


def test_bfloat16_in_the_interpreter():
    tensors = make_future_inputs(**SMALL, T=12, dtype=torch.bfloat16, device=DEVICE)
    assert check(future_attention, tensors, future_dim=3)["out_future"].dtype == torch.bfloat16
    assert check(future_attention_loss, tensors, future_dim=3)["loss"].dtype == torch.float32


@pytest.mark.parametrize("loss", [(None, True), ("mse", True), ("cosine", False)], ids=str)
def test_opcheck(loss: tuple):
    tensors = make_future_inputs(**SMALL, T=6, device=DEVICE)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    torch.library.opcheck(future_attention_op, (*arguments(leaves, 2), *loss))


@pytest.mark.parametrize(
    ("function", "loss"),
    [(triton_attention, ()), (triton_loss, ("mse", False))],
    ids=["plain", "loss"],
)
def test_compiles_once_for_all_lengths(function: Callable, loss: tuple):
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T in (9, 14):
            args = arguments(make_future_inputs(**SMALL, T=T, device=DEVICE), 4) + loss
            for actual, expected in zip(compiled(*args), function(*args), strict=True):
                assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["query", "value"])
@pytest.mark.parametrize("operator", [future_attention, future_attention_loss])
def test_names_the_argument_of_a_wide_head(operator: Callable, name: str):
    sizes = {"D": 257, "Dv": 16} if name == "query" else {"Dv": 257}
    tensors = make_future_inputs(**SMALL, T=3, **sizes, device=DEVICE)
    with pytest.raises(NotImplementedError, match=rf'^{name} must have .*257; backend "reference"'):
        operator(**tensors, future_dim=1, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("loss", [COSINE, {"loss_type": "mse"}], ids=str)
def test_gradients_repeat_bit_for_bit(dtype: torch.dtype, loss: dict):
    tensors = make_future_inputs(T=1500, D=64, dtype=dtype, device=DEVICE)
    options = {"future_dim": 100, "backend": "triton", **loss}
    first = run_with_gradients(future_attention_loss, tensors, options)
    for _ in range(100):
        again = run_with_gradients(future_attention_loss, tensors, options)
        assert all(torch.equal(again[name], result) for name, result in first.items())


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
    args = list(arguments(tensors, 64))
    leaves = [tensor.requires_grad_() for tensor in args[:5]]
    args[6] = bounds(0, 100, 300)

    def step() -> list[torch.Tensor]:
        out, loss, _ = triton_loss(*args, "mse", False)
        return [out, *torch.autograd.grad(out.float().sum() + loss, leaves)]

    expected = [tensor.clone() for tensor in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for tensor in results:
        tensor.detach().zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
