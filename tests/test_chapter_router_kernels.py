"""The router of chapters: what is special in one compiled backend."""

import pytest
import torch
from operator_contract import (
    DEVICE,
    DTYPES,
    INSTRUCTION_SETS,
    assert_same,
    needs_cpp,
    needs_triton,
)
from router_factories import check, make_inputs, run

from memattn import chapter_router

pytestmark = pytest.mark.operator


@needs_triton
def test_chunks_of_rows(monkeypatch):
    """Logits do not depend on the chunk that a row is in, nor do sums but by rounding."""
    from memattn_kernels.chapter_router import launch

    tensors = make_inputs(B=1, N=43, E=20, C=35, device=DEVICE["triton"])
    valid = (torch.arange(43) % 4 > 0)[None].to(DEVICE["triton"])
    options = dict(top_k=3, valid=valid)
    whole = run(tensors, options, "triton")
    monkeypatch.setattr(launch, "CHUNK_LOGITS", 35 * 18)
    monkeypatch.setattr(launch, "MIN_ROWS", 5)
    parts = run(tensors, options, "triton")
    for name, result in parts.items():
        torch.testing.assert_close(result, whole[name], msg=name)
    for name in ("indices", "weights"):
        assert torch.equal(parts[name], whole[name])


@needs_triton
def test_more_chapters_than_a_program_holds():
    hidden = torch.zeros(1, 1, 1, device=DEVICE["triton"])
    with pytest.raises(NotImplementedError, match="weight must have at most 32768 chapters"):
        chapter_router(hidden, hidden[0].expand(32769, 1), top_k=1, backend="triton")


@needs_cpp
def test_threads_change_no_bit():
    tensors, before = make_inputs(N=333, E=40, C=150), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(run(tensors, dict(top_k=6), "cpp"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same(other, found[0])


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set(name, dtype):
    ops = torch.ops.memattn_cpp
    before = ops.cpu_capability()
    try:
        ops.set_cpu_capability(name)
    except RuntimeError:
        pytest.skip(f"this processor has no {name}")
    try:
        for sizes in (dict(B=1, N=3), dict(N=40, E=70, C=131)):
            draws = [(make_inputs(**sizes, dtype=dtype, seed=seed), {}) for seed in range(3)]
            check(draws, dict(top_k=5), "cpp")
    finally:
        ops.set_cpu_capability(before)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("E", [31, 64, 255, 256, 512, 1024])
def test_awkward_sizes(E, dtype):
    """Around the sizes of panels and tiles; weights that are read in place and packed."""
    lengths = (1, 15, 16, 17, 32, 33, 63, 64, 65, 129)
    draws = [(make_inputs(B=1, N=N, E=E, C=97 + N % 3, dtype=dtype, seed=N), {}) for N in lengths]
    check(draws, dict(top_k=9), "cpp")


@needs_cpp
def test_a_long_run_of_rising_logits():
    """Every chapter is better than all before: more candidates than a list of them holds."""
    hidden = torch.ones(1, 3, 1)
    rising = torch.arange(900.0)[:, None]
    for weight in (rising, rising.flip(0), rising // 300):
        found = chapter_router(hidden, weight, top_k=8, backend="cpp").indices[0, 0]
        assert torch.equal(
            found.long(), weight[:, 0].sort(descending=True, stable=True).indices[:8]
        )
