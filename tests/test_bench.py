"""Benchmarks: work counted right, nothing wrong is timed, nothing is printed unmeasured."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_factories import (
    QUICK,
    longer_window,
    not_a_number,
    plant,
    small,
    wrong_gradient,
    wrong_tail,
)

from memattn.bench import report, result_check, roofline, timing
from memattn.bench.engine import OURS, measure_between_roofs, measure_case
from memattn.bench.inputs import make_segmented_inputs
from memattn.bench.memory import MemoryJob, cpu_peaks
from memattn.bench.result_check import ExpectedResults, WrongResultError, check_peer, check_subject
from memattn.bench.roof_samples import RoofSamples
from memattn.bench.roofline import Roofs, Work, attention_work, measure_roofs, work_of
from memattn.bench.segmented_attention import SegmentedCase, segmented_pairs
from memattn.bench.timing import Timing, interleave, speedup
from memattn.ops import segmented_attention

pytestmark = pytest.mark.usefixtures("one_thread")


def count_pairs(T: int, *, S: int | None = None, P: int = 0, M: int = 0, **options) -> int:
    """Allowed pairs by the definition: with all scores 0, lse is the log of their number."""
    inputs = make_segmented_inputs(
        B=1,
        H=1,
        Hkv=1,
        T=T,
        S=S,
        D=2,
        P=P,
        M=M,
        segment_len=options.get("segment_len"),
        dtype=torch.float64,
    )
    inputs["query"] = torch.zeros_like(inputs["query"])
    lse = segmented_attention(**inputs, **options, backend="reference").lse
    return round(lse.exp().sum().item())


# work


@pytest.mark.parametrize("T", [1, 37])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"segment_len": 5},
        {"window_size": 4},
        {"window_size": 100},
        {"segment_len": 8, "window_size": 3},
        {"segment_len": 3, "window_size": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("query_offset", [0, 11])
def test_pairs_are_those_of_the_definition(T, options, is_causal, query_offset):
    options = options | {"is_causal": is_causal, "query_offset": query_offset}
    for S in (query_offset + T, query_offset + T + 6):
        assert segmented_pairs(T, S=S, **options) == count_pairs(T, S=S, **options)


@pytest.mark.parametrize("memory_is_causal", [False, True])
def test_pairs_with_persistent_and_memory_keys(memory_is_causal):
    options = {"segment_len": 8, "window_size": 5, "memory_is_causal": memory_is_causal}
    pairs = segmented_pairs(37, num_persistent=3, num_memory=8, **options)
    assert pairs == count_pairs(37, P=3, M=8, **options)


@pytest.mark.parametrize("kind", SegmentedCase.kinds)
def test_pairs_of_a_case_are_those_of_the_definition_and_of_the_mask_of_the_peers(kind):
    case = small(kind, T=50)
    inputs = case.inputs()
    inputs["query"] = torch.zeros_like(inputs["query"])
    lse = segmented_attention(**inputs, **case.options(), backend="reference").lse
    assert case.pairs() == round(lse[:, 0].double().exp().sum().item())
    i, j = torch.arange(50)[:, None], torch.arange(case.num_keys())[None, :]
    mask = case.mask_mod()(i, i, i, j).expand(50, -1)
    assert mask.sum().item() * case.tokens() // 50 == case.pairs()


def test_packed_documents_fill_the_row():
    lengths = small("packed", T=50).lengths()
    assert len(lengths) == 3
    assert sum(lengths) == 50
    assert min(lengths) > 0


def test_work_by_hand():
    # 2 rows of 3 keys, all allowed, D=4, Dv=8, half precision
    work = attention_work(pairs=6, rows=2, keys=3, head_dim=4, value_dim=8, element_size=2)
    assert work["forward"] == Work(flops=2 * 6 * 12, exps=6, bytes=2 * 5 * 12 + 8)
    assert work["backward"] == Work(flops=2 * 6 * 28, exps=6, bytes=4 * 5 * 12 + 16)
    assert work_of(work, "forward+backward") == Work(flops=480, exps=12, bytes=128 + 256)


def test_work_of_a_case_counts_heads_batch_and_every_source_of_keys():
    case = small("mac", T=50)
    work = case.work()["forward"]
    assert work.flops == 4 * 4 * case.pairs() * 16
    keys = 2 * (2 * 50 + 2 * 4 * 5 + 3)  # Hkv (B T + B n_segments M + P)
    assert work.bytes == 4 * (2 * 4 * 50 + keys) * 32 + 4 * 2 * 4 * 50


def test_roof_is_the_slowest_of_three():
    roofs = Roofs(matmul_flops=10.0, exps=5.0, copy_bytes=2.0)
    assert roofs.seconds(Work(100, 10, 10)) == 10
    assert roofs.seconds(Work(10, 100, 10)) == 20
    assert roofs.seconds(Work(10, 10, 100)) == 50
    assert roofs.seconds_without_overlap(Work(100, 10, 10)) == 12


def test_rates_of_the_roofs_come_from_the_clock(monkeypatch):
    now = iter(range(10**6))  # every reading is a second after the last
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    roofs = measure_roofs("cpu", torch.float32, seconds=0.0)
    assert roofs == Roofs(matmul_flops=2 * 1024**3, exps=1 << 20, copy_bytes=2 * 4 << 25)


@pytest.mark.parametrize(("has_products", "n"), [(True, 2048), (False, 1024)])
def test_roof_of_bfloat16_is_of_its_products_where_there_are_any(has_products, n, monkeypatch):
    now = iter(range(10**6))  # by this clock the larger of two products is the faster
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    monkeypatch.setattr(roofline, "multiplies_bfloat16", lambda: has_products)
    taken = []
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: taken.append((len(a), a.dtype)))
    roofs = measure_roofs("cpu", torch.bfloat16, seconds=0.0)
    assert roofs.matmul_flops == 2 * n**3
    dtype = torch.bfloat16 if has_products else torch.float32
    assert set(taken) == {(size, dtype) for size in {1024, n}}


def test_roofs_are_the_best_of_turns_around_the_cases():
    """The machine is disturbed from the second case on, and at the end."""
    products = iter([100.0, 96.0, 30.0, 90.0, 40.0])
    copies = iter([5.0, 8.0, 8.0, 2.0, 8.0])
    asked = []

    def measure(device, dtype, *, seconds):
        asked.append((device, dtype, seconds))
        return Roofs(matmul_flops=next(products), exps=1e9, copy_bytes=next(copies))

    samples, rows, key = RoofSamples(0.5, measure), [], ("cpu", torch.float32)
    for kind in ("causal", "window", "segment", "dense"):
        rows += measure_between_roofs(
            small(kind),
            samples,
            backend="reference",
            directions=["forward"],
            peers=[],
            budget=QUICK,
        )
    assert asked == [(*key, 0.5)] * 5  # one before the first, one after each
    assert samples.best() == {key: Roofs(100.0, 1e9, 8.0)}
    compute, memory = Work(flops=1000, exps=0, bytes=1), Work(flops=1, exps=0, bytes=1000)
    beside = [samples.share_of_best(key, row.roof_sample, compute) for row in rows]
    assert beside == [0.96, 0.3, 0.3, 0.4]
    assert samples.share_of_best(key, rows[-1].roof_sample, memory) == 0.25  # its own rate rules

    records = [{"machine_share": share} for share in beside]
    line = report.disturbed_line(records)
    assert line is not None and "around 3 of 4 rows" in line and "lowest was 30 %" in line
    assert report.disturbed_line(records[:1]) is None
    assert "best of 5 samples" in report.roof_line(samples.records()[0])
    assert "product 1e-07 GFLOP/s (30 %)" in report.roof_line(samples.records()[0])
    shares = [record["roof_share"] for record in report.row_records(rows, samples)]
    work = work_of(rows[0].case.work(), "forward")
    assert shares[0] == Roofs(100.0, 1e9, 8.0).seconds(work) / rows[0].timing.median


# timing


def test_functions_take_turns():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = interleave(functions, device="cpu", seconds=0.0, min_rounds=4)
    order_of_rounds = re.sub(r"(.)\1+", r"\1", "".join(order))
    assert order_of_rounds == "abc" * (len(order_of_rounds) // 3)
    assert [len(timing.samples) for timing in timings.values()] == [4, 4, 4]


def test_more_rounds_fill_the_time():
    timings = interleave({"": lambda: torch.ones(1)}, device="cpu", seconds=0.1, min_rounds=2)
    assert len(timings[""].samples) > 2


def test_spread_and_speedup_round_by_round():
    ours, theirs = Timing((1.0, 2.0, 3.0, 4.0, 5.0)), Timing((2.0, 4.0, 6.0, 8.0, 10.0))
    assert (ours.fastest, ours.median) == (1.0, 3.0)
    assert (ours.q20, ours.q80) == pytest.approx((1.8, 4.2))
    # the machine slowed down fivefold; the ratio did not
    assert speedup(ours, theirs).samples == (2.0,) * 5


# checks of results


@pytest.mark.parametrize("wrong", [longer_window, wrong_gradient, wrong_tail, not_a_number])
def test_a_wrong_operator_is_found(monkeypatch, wrong):
    case = small("window", T=200)
    check_subject(case, "reference", gradients=True)
    plant(monkeypatch, wrong)
    with pytest.raises(WrongResultError, match=r"segmented_attention, window B=2 T=\d+ W=9 D=16: "):
        check_subject(case, "reference", gradients=True)


def test_a_wrong_gradient_is_not_looked_for_in_a_forward(monkeypatch):
    plant(monkeypatch, wrong_gradient)
    check_subject(small("window"), "reference", gradients=False)


@pytest.mark.parametrize("T", [1, 5, 160, 161, 200, 5000])
def test_sampled_rows_hold_the_first_and_the_last_and_do_not_overlap(T):
    rows = [row for part in result_check.sampled_rows(T, 3) for row in range(T)[part]]
    assert rows[0] == 0
    assert rows[-1] == T - 1
    assert len(set(rows)) == len(rows) == (T if T <= result_check.SMALL_T else len(rows))


@pytest.mark.parametrize("kind", SegmentedCase.kinds)
def test_peers_compute_the_same(kind):
    case = small(kind)
    expected = ExpectedResults(case, gradients=True)
    names = []
    for name, peer in case.peers().items():
        if not peer.compiled:
            check_peer(expected, peer.build(), gradients=True)
            names.append(name)
    assert {"sdpa flash", "sdpa math", "naive"} <= set(names)
    assert ("sdpa flash, folded" in names) == (kind in ("segment", "blocks"))


@pytest.mark.slow
def test_flex_computes_the_same_forward_and_says_why_it_has_no_backward():
    rows = measure_case(
        small("union", D=64, T=64),
        backend="reference",
        directions=["forward", "backward"],
        peers=["flex"],
        budget=replace(QUICK, compiled=True),
    )
    forward, backward = (row for row in rows if row.competitor == "flex")
    assert forward.timing is not None
    assert backward.timing is None
    assert backward.reason is not None
    assert "does not support backward on CPU" in backward.reason


def test_a_wrong_peer_is_not_timed(monkeypatch):
    case = small("window")
    peers = case.peers()
    peers["sdpa math"] = replace(peers["sdpa math"], build=peers["naive"].build)
    peers["sdpa flash"] = replace(peers["sdpa flash"], build=lambda: lambda x: 1.01 * x["query"])
    monkeypatch.setattr(SegmentedCase, "peers", lambda self: peers)
    rows = measure_case(case, backend="reference", directions=["forward"], budget=QUICK)
    by_name = {row.competitor: row for row in rows}
    assert by_name["sdpa flash"].timing is None
    assert "error of out is" in by_name["sdpa flash"].reason
    assert by_name["flex"].reason == "not run: takes long to compile"
    assert by_name["sdpa math"].speedup is not None
    assert rows[0].competitor == OURS


def test_what_would_store_too_much_is_not_run():
    case, budget = small("window"), replace(QUICK, max_score_bytes=1000)
    rows = measure_case(case, backend="reference", directions=["forward"], budget=budget)
    assert [row.competitor for row in rows] == [OURS]
    assert re.fullmatch(r"not run: would store .* GiB of scores or masks", rows[0].reason)


# memory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_is_that_of_the_call():
    # scores of 8 heads: 32 MiB; the output: 2 MiB
    case = SegmentedCase(kind="causal", T=1024)
    jobs = [MemoryJob(case, "forward", peer="sdpa flash"), MemoryJob(case, "forward", peer="naive")]
    flash, naive = cpu_peaks([*jobs, jobs[0]])[:2]
    assert 2 << 20 <= flash < 8 << 20
    assert 32 << 20 <= naive < 256 << 20
