"""Cases of future attention for the benchmark: work, definition, checks and bars."""

from dataclasses import replace

import pytest
import torch

from memattn.bench.bars import BarInputs, CostBar
from memattn.bench.engine import Measurement
from memattn.bench.future_attention import OUR_PAST, FutureCase
from memattn.bench.result_check import ExpectedResults, WrongResultError, check_peer, check_subject
from memattn.bench.run import run
from memattn.bench.timing import Timing
from memattn.ops import future_attention


def small(kind="future", **sizes):
    return FutureCase(**{"kind": kind, "T": 40, "B": 2, "H": 2, "D": 8, "future_dim": 5, **sizes})


@pytest.mark.parametrize(("T", "future_dim"), [(1, 3), (9, 1), (9, 8), (40, 5)])
def test_pairs_are_those_of_the_definition(T, future_dim):
    case = small(T=T, future_dim=future_dim)
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    row = torch.arange(case.rows)[None, :]
    past, band = (j <= i).sum(), ((row >= i) & (row < i + future_dim)).sum()
    assert case.pairs() == (4 * past, 4 * band)


@pytest.mark.parametrize("kind", FutureCase.kinds)
def test_the_definition_of_some_rows_is_that_of_all(kind):
    case = small(kind, T=300)
    inputs = case.inputs()
    whole = case.definition(slice(0, 300))(inputs)
    for rows in (slice(0, 32), slice(100, 132), slice(268, 300)):
        torch.testing.assert_close(case.definition(rows)(inputs), whole[:, :, rows])


@pytest.mark.parametrize("kind", FutureCase.kinds)
def test_the_gate_passes_what_is_right(kind):
    case = small(kind, T=200)
    check_subject(case, "auto", gradients=True)
    check_peer(
        ExpectedResults(case, gradients=False), case.peers()["naive"].build(), gradients=True
    )


@pytest.mark.parametrize("kind", FutureCase.kinds)
def test_the_gate_finds_a_shorter_band(kind, monkeypatch):
    subject = FutureCase.subject

    def wrong(self, backend):
        case = self if backend == "reference" else replace(self, future_dim=self.future_dim - 1)
        return subject(case, backend)

    monkeypatch.setattr(FutureCase, "subject", wrong)
    with pytest.raises(WrongResultError, match=f"{kind} T=40"):
        check_subject(small(kind), "auto", gradients=True)


def test_yardsticks_see_the_past_only():
    case = small(T=20)
    inputs = case.inputs()
    far = inputs | {"future_key": torch.full_like(inputs["future_key"], -1e4)}
    far["query"] = inputs["query"].abs()
    expected = future_attention(**far, future_dim=5).out
    for name, peer in case.peers().items():
        if peer.yardstick is not None:
            torch.testing.assert_close(peer.build()(far), expected, msg=name)
            assert peer.yardstick["forward"].flops < case.work()["forward"].flops


def test_cost_is_per_pair_of_the_yardstick():
    case = small("mse")
    bar = CostBar(
        case=case,
        direction="forward",
        target=1.3,
        against=OUR_PAST,
        priced=replace(case, kind="future"),
    )
    assert bar.reached(BarInputs()) is None
    found = BarInputs()
    row = Measurement(case, "forward", OUR_PAST, Timing((1.0,)), speedup=Timing((0.5,)))
    found.rows[case, "forward", OUR_PAST] = row
    past, band = case.pairs()
    # ours takes twice the time for (past + band) / past of the work
    assert bar.reached(found) == pytest.approx(2.0 * past / (past + band))
    assert bar.holds(1.3, 1.3)
    assert not bar.holds(1.31, 1.3)


def test_bars_ask_for_what_is_required():
    bars = {(type(bar).__name__, bar.case.kind): bar.target for bar in FutureCase.bars("cpu-bars")}
    assert bars["CostBar", "future"] == 1.15
    assert bars["CostBar", "mse"] == bars["CostBar", "cosine"] == 1.3
    assert bars["SpeedBar", "future"] == bars["SpeedBar", "mse"] == 5.0
    assert bars["LinearMemoryBar", "mse"] <= 1.1
    assert all(bar.case.device == "cuda" for bar in FutureCase.bars("gpu-bars"))


def test_runs_beside_its_peers():
    record = run(
        kinds=["mse"],
        seq_lens=[24],
        shape={"future_dim": 4, "H": 2, "D": 8},
        directions=["forward+backward"],
        device="cpu",
        quick=True,
    )
    rows = {row["competitor"]: row for row in record["rows"]}
    assert {"memattn", OUR_PAST, "sdpa flash, past only", "naive"} <= rows.keys()
    assert all(row["seconds"] for row in rows.values())
