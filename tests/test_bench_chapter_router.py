"""Cases of the router of chapters for the benchmark: the composition beside it, memory, bars."""

import pytest
import torch

from memattn.bench.bars import BarInputs, PeerPeakBar
from memattn.bench.chapter_router import COMPOSITION, RouterCase
from memattn.bench.engine import OURS, Measurement
from memattn.bench.result_check import ExpectedResults, check_peer, check_subject

pytestmark = pytest.mark.usefixtures("one_thread")

CASE = RouterCase(kind="router", T=40, B=2, E=8, C=20, K=3)


def test_the_composition_computes_the_same():
    check_subject(CASE, "auto", gradients=True)
    expected = ExpectedResults(CASE, gradients=True)
    check_peer(expected, CASE.peers()[COMPOSITION].build(), gradients=True)


def test_every_result_has_a_cotangent_of_its_own():
    leaves = {name: x.requires_grad_() for name, x in CASE.inputs().items()}
    out = CASE.subject("auto")(leaves)
    assert out.shape == (2, 1, 40, 3 + 3)
    for column in range(out.shape[-1]):
        (d_hidden,) = torch.autograd.grad(
            out[..., column].sum(), leaves["hidden"], retain_graph=True
        )
        assert d_hidden.any()


def test_bars_of_speed_and_of_memory():
    bars = RouterCase.bars("cpu-bars")
    for bar in bars:
        assert set(bar.peers) <= bar.case.peers().keys()
    bar = PeerPeakBar(case=CASE, direction="forward+backward", target=0.25, against=COMPOSITION)
    assert sum(isinstance(other, PeerPeakBar) for other in bars) == 2
    assert bar.reached(BarInputs()) is None
    found = BarInputs(
        rows={
            key: Measurement(*key, peak_bytes=n)
            for key, n in zip(
                sorted(bar.peaks, key=lambda key: key[2] != OURS), (10, 50), strict=True
            )
        }
    )
    assert bar.reached(found) == 0.2
    assert bar.holds(0.2, bar.target)
