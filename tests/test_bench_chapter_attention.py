"""Cases of chapter attention for the benchmark: work, definition, checks, peers and bars."""

from dataclasses import replace

import pytest
import torch

from memattn.bench import chapter_attention as bench
from memattn.bench.bars import BarInputs, PeakBar
from memattn.bench.chapter_attention import BankBytesBar, ChapterCase
from memattn.bench.result_check import ExpectedResults, WrongResultError, check_peer, check_subject
from memattn.ops import chapter_attention

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"T": 170, "B": 2, "H": 4, "Hkv": 2, "D": 8, "C": 6, "M": 5, "K": 2}


def small(kind="token", **sizes):
    return ChapterCase(**{"kind": kind, **SMALL, **sizes})


@pytest.mark.parametrize("kind", ChapterCase.kinds)
def test_pairs_are_those_of_the_definition(kind):
    # with weights of 1 and all scores 0, lse is the log of the number of keys
    case = small(kind)
    inputs = case.inputs()
    inputs["query"].zero_()
    inputs["chapter_weights"].fill_(1.0)
    bank = {name: x for name, x in (case.bank() | inputs).items() if name != "query"}
    lse = chapter_attention(
        inputs["query"], **bank, chapter_indices=case.indices(), routing_block=case.block
    ).lse
    assert case.work()["forward"].exps == round(lse.exp().sum().item())
    chapters = case.indices().flatten(0, 1).tolist()
    assert all(len(set(row)) == case.K for row in chapters)


@pytest.mark.parametrize("kind", ChapterCase.kinds)
def test_the_definition_of_some_rows_is_that_of_all(kind):
    case = small(kind)
    inputs = case.inputs()
    whole = case.definition(slice(0, 170))(inputs)
    torch.testing.assert_close(whole, case.subject("reference")(inputs))
    for rows in (slice(0, 32), slice(50, 82), slice(138, 170)):
        torch.testing.assert_close(case.definition(rows)(inputs), whole[:, :, rows])


@pytest.mark.parametrize("kind", ChapterCase.kinds)
def test_the_gate_passes_what_is_right(kind, monkeypatch):
    # a few rows at a time, the last time fewer
    monkeypatch.setattr(bench, "GATHERED_BYTES", 30_000)
    case = small(kind)
    check_subject(case, "auto", gradients=True)
    expected = ExpectedResults(case, gradients=True)
    peers = case.peers().values()
    compared = [peer for peer in peers if peer.yardstick is None and not peer.compiled]
    assert len(compared) == (1 if kind in ("int8", "independent") else 3)
    for peer in compared:
        check_peer(expected, peer.build(), gradients=True)


def test_the_gate_finds_another_chapter(monkeypatch):
    subject = ChapterCase.subject

    def wrong(self, backend):
        case = self if backend == "reference" else replace(self, seed=self.seed + 1)
        return subject(case, backend)

    monkeypatch.setattr(ChapterCase, "subject", wrong)
    with pytest.raises(WrongResultError, match="chapter_attention, token T=160"):
        check_subject(small(), "auto", gradients=True)


@pytest.mark.parametrize("kind", ["token", "int8", "independent"])
def test_yardsticks_run_and_have_their_own_work(kind):
    case = small(kind)
    yardsticks = {n: peer for n, peer in case.peers().items() if peer.yardstick is not None}
    assert yardsticks
    for name, peer in yardsticks.items():
        assert peer.build()(case.inputs()).shape == (2, 4, 170, 8)
        assert peer.yardstick is not None
        times = peer.yardstick["forward"].flops / case.work()["forward"].flops
        assert times == (3 if name.endswith("whole bank") else 1)  # C / K


def test_bars_ask_for_peers_that_there_are():
    for suite in ("cpu-bars", "gpu-bars"):
        bars = ChapterCase.bars(suite)
        assert {name for bar in bars for name in bar.directions} == {"forward", "backward"}
        for bar in bars:
            assert set(bar.peers) <= bar.case.peers().keys()


def test_bars_of_memory():
    base, case = small(), small(K=4)
    bar = PeakBar(case=case, base=base, direction="forward", target=1.1)
    assert bar.reached(BarInputs()) is None
    assert bar.reached(BarInputs(peaks={bar.memory: [100, 105]})) == 1.05
    assert bar.holds(1.05, bar.target)
    assert "K=4" in bar.name
    bar = BankBytesBar(case=small("int8"), base=base, direction="forward", target=0.3)
    assert bar.reached(BarInputs()) == (8 + 4) / (4 * 8)
