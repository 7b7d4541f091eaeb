"""Cases of the neural memory for the benchmark: work, checks, peers that compute the same, bars."""

from dataclasses import replace

import pytest
import torch

from memattn.bench.neural_memory import (
    LOOP,
    PER_SAMPLE,
    STATE_READ,
    TITANS,
    TITANS_DEFAULT,
    MemoryCase,
)
from memattn.bench.result_check import ExpectedResults, WrongResultError, check_peer, check_subject

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"T": 20, "H": 2, "D": 4, "chunk_size": 8}


def small(kind="token", **sizes):
    return MemoryCase(**{"kind": kind, **SMALL, **sizes})


@pytest.mark.parametrize("kind", MemoryCase.kinds)
def test_the_gate_passes_what_is_right(kind):
    case = small(kind)
    check_subject(case, "auto", gradients=case.has("backward"))
    inputs = case.inputs()
    whole = case.definition(slice(0, 20))(inputs)
    torch.testing.assert_close(case.definition(slice(5, 13))(inputs), whole[:, :, 5:13])
    assert case.has("forward") and case.has("backward") == (kind != "step")


def test_peers_compute_the_same():
    case = small(depth=3, expansion=2)
    expected = ExpectedResults(case, gradients=True)
    for name in (PER_SAMPLE, LOOP, "naive"):
        check_peer(expected, case.peers()[name].build(), gradients=True)
    other = replace(case, chunk_size=5).peers()[PER_SAMPLE].build()
    with pytest.raises(WrongResultError, match="error of out"):
        check_peer(expected, other, gradients=True)
    for name in (TITANS, TITANS_DEFAULT):  # another rule within a chunk
        assert case.peers()[name].yardstick == case.work()


def test_work_counts_the_products_of_the_chunked_form():
    """Of depth 1: keys, updates of W and S, reads of both, pairs of the chunk; and the rest."""
    case, D, b = small(depth=1, H=1, B=1, T=8), 4, 8
    flops = 2 * D * D + 4 * D * D + 4 * D * D + (b + 1) * 2 * D
    assert case.work()["forward"].flops == 8 * flops
    assert case.work()["backward"].flops == 8 * flops * 7 // 2
    deep = replace(case, depth=2)
    assert deep.widths == [4, 16, 4] and deep.weight_count == 128
    assert deep.work()["forward"].flops == 8 * (256 + 128 + 512 + 512 + 9 * 40)
    assert replace(deep, kind="chunk").work()["forward"].flops == 8 * (256 + 128 + 512 + 256)
    assert deep.work()["forward"].exps == 2 * 8 * 16


def test_bars_have_their_peers():
    for suite in ("cpu-bars", "gpu-bars"):
        for bar in MemoryCase.bars(suite):
            assert set(bar.peers) <= bar.case.peers().keys()
            assert all(bar.case.has(direction) for direction in bar.directions)
    steps = small("step")
    assert steps.peers()[STATE_READ].build()({}).shape == (20,)
