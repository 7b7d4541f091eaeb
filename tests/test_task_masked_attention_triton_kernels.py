"""task_masked_attention in Triton: what the test file of all backends does not reach."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from task_mask_factories import make_mask

from memattn import TaskMask, task_masked_attention
from memattn.bench.inputs import make_segmented_inputs
from memattn.testing import assert_results_within_budget, run_with_gradients
from memattn_kernels.task_masked_attention.tiles import listed_steps, masked_step, step_tile

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def check(tensors: dict[str, torch.Tensor], **options) -> dict[str, torch.Tensor]:
    """Triton's results, within the error budget of the reference."""
    low, high = (
        run_with_gradients(
            task_masked_attention, tensors, options | {"backend": "reference"}, dtype=dtype
        )
        for dtype in (None, torch.float64)
    )
    actual = run_with_gradients(task_masked_attention, tensors, options | {"backend": "triton"})
    assert_results_within_budget(actual, low, high)
    return actual


@triton.jit
def _walk_kernel(tiles_ptr, counts_ptr, masked_ptr, whole_ptr, n_listed, first, whole_first,
                 whole_last, last, BLOCK: tl.constexpr, IS_CUT_BEFORE: tl.constexpr):  # fmt: skip
    """Store the first columns of the steps of row 1, those with a mask doubled, + 1 if partial."""
    tiles_ptr, before, begin, whole, full_last, partial, n_masked = listed_steps(
        tiles_ptr, counts_ptr, 1, n_listed, first, whole_first, whole_last, last,
        BLOCK, IS_CUT_BEFORE,
    )  # fmt: skip
    for index in range(n_masked):
        step, is_partial = masked_step(index, before, begin, whole, full_last, partial)
        _, n = step_tile(tiles_ptr, step, BLOCK)
        tl.store(masked_ptr + index, 2 * n + is_partial.to(tl.int32))
    for index in range(whole - begin):
        _, n = step_tile(tiles_ptr, begin + index, BLOCK)
        tl.store(whole_ptr + index, n)


@pytest.mark.parametrize(
    "bounds",  # first, whole_first, whole_last, last
    [(0, 0, 5000, 5050), (0, 0, 0, 9999), (0, 0, 0, 0), (130, 190, 4000, 4000), (700, 760, 60, 60)],
)
def test_walks_the_steps_in_reach(bounds: tuple[int, ...]):
    """Every step once, with a mask just where one is needed; lists longer than one load."""
    BLOCK, n_listed = 64, 45
    first, whole_first, whole_last, last = bounds
    order = torch.randperm(n_listed, generator=torch.Generator().manual_seed(0)).tolist()
    full, partial = sorted(order[:35]), sorted(order[35:40])
    tiles = torch.tensor([list(range(n_listed)), full + partial + order[40:]], dtype=torch.int32)
    counts = torch.tensor([[0, 0], [len(full), len(partial)]], dtype=torch.int32)
    masked, whole = torch.full((2, 200), -1, dtype=torch.int32, device=DEVICE)
    _walk_kernel[(1,)](
        tiles.to(DEVICE), counts.to(DEVICE), masked, whole, n_listed, *bounds,
        BLOCK=BLOCK, IS_CUT_BEFORE=first > 0,
    )  # fmt: skip

    def steps(kind: list[int]) -> list[int]:
        columns = [tile * 128 + part for tile in kind for part in (0, BLOCK)]
        return [n for n in columns if n + BLOCK > first and n < last]

    expected = [n for n in steps(full) if n >= whole_first and n + BLOCK <= whole_last]
    cut = [2 * n for n in steps(full) if n not in expected]
    assert whole[whole >= 0].tolist() == expected
    assert masked[masked >= 0].tolist() == cut + [2 * n + 1 for n in steps(partial)]


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("is_causal", [False, True])
def test_nan_in_keys_of_hidden_pairs_stays_away(is_causal: bool, start: int):
    """Pairs that the mask allows, but bounds or causality hide, in tiles that other keys share."""
    T = 75
    pairs = torch.rand(T, T, generator=torch.Generator().manual_seed(0)) < 0.5
    hidden = torch.tensor([20, 50, 66])
    pairs[:, hidden] = False
    pairs[70:, 20] = True  # queries past the end
    pairs[70:, 50] = True
    if is_causal:
        pairs[2:50, 50] = True
        pairs[:66, 66] = True
    tensors = make_segmented_inputs(B=1, H=1, Hkv=1, T=T, device=DEVICE)
    poisoned = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in ("key", "value"):
        tensors[name][:, :, start + hidden] = 0.0
        poisoned[name][:, :, start + hidden] = torch.nan
    options: dict = dict(
        task_mask=TaskMask.from_dense(pairs[None]).to(DEVICE),
        task_id=0,
        is_causal=is_causal,
        seq_start=torch.tensor([start], dtype=torch.int32, device=DEVICE),
        seq_end=torch.tensor([start + 70], dtype=torch.int32, device=DEVICE),
        backend="triton",
    )
    expected = run_with_gradients(task_masked_attention, tensors, options)
    results = run_with_gradients(task_masked_attention, poisoned, options)
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


def large_case(form: str, dtype: torch.dtype, D: int = 64) -> tuple[dict, dict]:
    """Long enough for many tiles of the shipped configurations."""
    tensors = make_segmented_inputs(B=3, H=4, Hkv=2, T=1500, D=D, dtype=dtype, device=DEVICE)
    mask = make_mask(form=form, n=2, T=1500, S=1500, nodes=20).to(DEVICE)
    return tensors, dict(task_mask=mask, task_id=torch.tensor([1, 0, 1], device=DEVICE))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("form", ["blocks", "graph"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_shipped_tiles_match_the_reference(form: str, D: int, dtype: torch.dtype, is_causal: bool):
    tensors, options = large_case(form, dtype, D)
    check(tensors, **options, is_causal=is_causal)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_in_a_cuda_graph():
    tensors, options = large_case("graph", torch.bfloat16)
    options["task_id"] = options["task_id"].int()
    expected = task_masked_attention(**tensors, **options).out
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = task_masked_attention(**tensors, **options).out
    options["task_id"].copy_(1 - options["task_id"])  # another task for each
    graph.replay()
    assert not torch.equal(out, expected)
    options["task_id"].copy_(1 - options["task_id"])
    graph.replay()
    assert torch.equal(out, expected)
