"""Benchmarks: work counted right, nothing wrong is timed, nothing is printed unmeasured."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memattn.bench import __main__, gate, report, run
from memattn.bench.bars import (
    BackwardBar,
    FlatTimeBar,
    Found,
    LinearMemoryBar,
    RateBar,
    RoofBar,
    SpeedBar,
)
from memattn.bench.case import operators
from memattn.bench.engine import OURS, Effort, Row, measure_case
from memattn.bench.gate import Oracle, WrongResultError, check_peer, check_subject
from memattn.bench.memory import MemoryJob, cpu_peaks
from memattn.bench.roofline import Roofs, Work, attention_work, measure_roofs, work_of
from memattn.bench.segmented_attention import SegmentedCase, segmented_pairs
from memattn.bench.timing import Timing, interleave, speedup
from memattn.ops import segmented_attention
from memattn.ops._dispatch import triton_is_interpreted
from memattn.testing import make_segmented_inputs

ROOT = Path(__file__).parents[1]
QUICK = Effort(seconds=0.0, min_rounds=3, compiled=False)
SMALL = {"B": 2, "H": 4, "Hkv": 2, "D": 16, "window_size": 9, "segment_len": 16, "P": 3, "M": 5}


@pytest.fixture(autouse=True)
def one_thread():
    """These sizes are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(kind: str, T: int = 48, **sizes) -> SegmentedCase:
    return SegmentedCase(kind=kind, T=T, **(SMALL | {"documents": 3} | sizes))


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


def test_roofs_are_measured():
    roofs = measure_roofs("cpu", torch.float32, seconds=0.0)
    # even the slowest machine multiplies faster than it copies, and this bounds the units
    assert 1e8 < roofs.matmul_flops < 1e15
    assert 1e7 < roofs.copy_bytes < 1e14
    assert 1e5 < roofs.exps < 1e13


# timing


def test_functions_take_turns():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = interleave(functions, device="cpu", seconds=0.0, min_rounds=4)
    turns = re.sub(r"(.)\1+", r"\1", "".join(order))
    assert turns == "abc" * (len(turns) // 3)
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


# the gate


def plant(monkeypatch, wrong):
    """Put something wrong in the place of our operator."""
    right = SegmentedCase.subject

    def subject(self, backend):
        return lambda inputs: wrong(self, inputs, right(self, backend)(inputs))

    monkeypatch.setattr(SegmentedCase, "subject", subject)


def longer_window(case, inputs, out):
    if case.kind != "window":
        return out
    options = case.options() | {"window_size": case.window_size + 1}
    return segmented_attention(**inputs, **options, backend="reference").out


def wrong_gradient(case, inputs, out):
    return out + 0.1 * (inputs["value"] - inputs["value"].detach()).sum()


def wrong_tail(case, inputs, out):
    last = torch.zeros(out.shape[2]).index_fill(0, torch.tensor(out.shape[2] - 1), 1.0)
    return out * (1 + last[:, None] * (case.T > gate.SMALL_T))


def not_a_number(case, inputs, out):
    return out + torch.nan


@pytest.mark.parametrize("wrong", [longer_window, wrong_gradient, wrong_tail, not_a_number])
def test_a_wrong_operator_is_found(monkeypatch, wrong):
    case = small("window", T=200)
    check_subject(case, "reference", gradients=True)
    plant(monkeypatch, wrong)
    with pytest.raises(WrongResultError, match=r"segmented_attention, window T=\d+ W=9 D=16: "):
        check_subject(case, "reference", gradients=True)


def test_a_wrong_gradient_is_not_looked_for_in_a_forward(monkeypatch):
    plant(monkeypatch, wrong_gradient)
    check_subject(small("window"), "reference", gradients=False)


def test_nothing_of_a_wrong_operator_is_printed_or_written(monkeypatch, capsys, tmp_path):
    plant(monkeypatch, longer_window)
    arguments = ["--quick", "--kinds", "causal", "window", "--seq_lens", "24", "--device", "cpu"]
    arguments += ["--shape", "H=2", "D=8", "window_size=4", "--backend", "reference"]
    assert __main__.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "wrong result, nothing is printed: segmented_attention, window T=24" in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("T", [1, 5, 160, 161, 200, 5000])
def test_sampled_rows_hold_the_first_and_the_last_and_do_not_overlap(T):
    rows = [row for part in gate.sampled_rows(T, 3) for row in range(T)[part]]
    assert rows[0] == 0
    assert rows[-1] == T - 1
    assert len(set(rows)) == len(rows) == (T if T <= gate.SMALL_T else len(rows))


@pytest.mark.parametrize("kind", SegmentedCase.kinds)
def test_peers_compute_the_same(kind):
    case = small(kind)
    oracle = Oracle(case, gradients=True)
    names = []
    for name, peer in case.peers().items():
        if not peer.compiled:
            check_peer(oracle, peer.build(), gradients=True)
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
        effort=replace(QUICK, compiled=True),
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
    rows = measure_case(case, backend="reference", directions=["forward"], effort=QUICK)
    by_name = {row.competitor: row for row in rows}
    assert by_name["sdpa flash"].timing is None
    assert "error of out is" in by_name["sdpa flash"].reason
    assert by_name["flex"].reason == "not run: takes long to compile"
    assert by_name["sdpa math"].speedup is not None
    assert rows[0].competitor == OURS


def test_what_would_store_too_much_is_not_run():
    case, effort = small("window"), replace(QUICK, max_score_bytes=1000)
    rows = measure_case(case, backend="reference", directions=["forward"], effort=effort)
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


# runs


def test_run_writes_records_and_plots(capsys, tmp_path):
    record = run.run(
        ["segmented_attention"],
        kinds=["mac"],
        seq_lens=[16, 32],
        shape={"H": 2, "D": 8, "segment_len": 8},
        peers=["sdpa flash"],
        backend="reference",
        quick=True,
        out=tmp_path / "new" / "folder",
    )
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "new" / "folder" / "bench.json").read_text())
    assert saved == json.loads(json.dumps(record))
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {"bench.json", "segmented_attention-mac.png"}
    assert saved["machine"]["versions"]["torch"] == torch.__version__
    assert saved["machine"]["cpu"]["threads"] == torch.get_num_threads()
    timed = [row for row in saved["rows"] if row["seconds"] is not None and row["device"] == "cpu"]
    if not torch.cuda.is_available():
        assert len(timed) == 2 * 2 * 2  # lengths, directions, competitors
        missing = [row for row in saved["rows"] if row["device"] == "cuda"]
        assert {row["reason"] for row in missing} == {"not measured: no CUDA device"}
        assert "memattn on cuda: not measured: no CUDA device" in printed
    for row in timed:
        seconds = row["seconds"]
        assert seconds["min"] <= seconds["q20"] <= seconds["median"] <= seconds["q80"]
        assert row["flops_per_second"] == pytest.approx(row["useful_flops"] / seconds["median"])
        assert 0 < row["roof_share"] <= row["roof_share_without_overlap"]


def test_cells_of_a_row():
    timing = Timing((0.002,) * 3)
    row = Row(small("causal"), "forward", "sdpa flash", timing, speedup=Timing((1.5,) * 3))
    row.peak_bytes = 3 << 20
    cells = report.row_cells(report.row_record(row, Roofs(1e9, 1e9, 1e12)))
    flops = small("causal").work()["forward"].flops
    roof = f"{100 * flops / 1e9 / 0.002:.0f} %"
    assert cells[:4] == ["causal T=48 D=16", "forward", "sdpa flash", "2 ms"]
    assert [cells[6], cells[8], cells[9]] == [roof, "1.50x", "3.0 MiB"]


def test_table_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    report.table("title", ["a", "long"], [["1", "2"], ["333"]])
    assert capsys.readouterr().out == "\ntitle\na    long\n---  ----\n1    2\n333\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["attention"]}, r"operators must be one of .*, got 'attention'"),
        (
            {"kinds": ["sparse"], "names": ["segmented_attention"]},
            r"kinds must be from dense, .*, got sparse",
        ),
        ({"shape": {"heads": 2}}, r"shape must have names from B, H, .*, got heads"),
        ({"shape": {"H": 0}}, r"shape\[H\] must be at least 1, got 0"),
        ({"seq_lens": [0]}, r"seq_lens must be at least 1, got 0"),
        ({"directions": ["up"]}, r"directions must be one of .*, got 'up'"),
        ({"peers": ["flash"]}, r"peers must be one of sdpa flash, .*, got 'flash'"),
        ({"device": "tpu"}, r"device must be one of auto, cpu, cuda, got 'tpu'"),
        ({"dtype": "float8"}, r"dtype must be one of auto, .*, got 'float8'"),
        ({"backend": "fast"}, r"backend must be one of auto, .*, got 'fast'"),
        ({"seed": -1}, r"seed must be at least 0, got -1"),
        ({"suite": "all"}, r"suite must be one of cpu-bars, gpu-bars, got 'all'"),
        ({"suite": "cpu-bars", "quick": True}, r"quick must be left out with suite, got True"),
        ({"suite": "cpu-bars", "seq_lens": [8]}, r"seq_lens must be left out with suite"),
    ],
    ids=str,
)
def test_names_the_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        run.run(**arguments)


@pytest.mark.parametrize("text", ["H", "H=", "=3", "H=x", "H=-1", "H=1.5"])
def test_shape_of_a_command_line(text):
    assert run.parse_shape(["H=16", "window_size=8"]) == {"H": 16, "window_size": 8}
    with pytest.raises(ValueError, match=f"shape must be NAME=INTEGER, got '{text}'"):
        run.parse_shape([text])


def test_sizes_must_fit_the_operator(capsys):
    arguments = ["--quick", "--device", "cpu", "--shape", "H=3", "Hkv=2", "--backend", "reference"]
    assert __main__.main(arguments) == 2
    assert "key must have a number of heads that divides" in capsys.readouterr().err


def test_every_operator_with_a_file_is_found():
    found = operators()
    assert found["segmented_attention"] is SegmentedCase
    assert all(name == cls.operator for name, cls in found.items())


# bars


def bars_of_one_case() -> list:
    case = small("window", T=32)
    return [
        SpeedBar(case=case, direction="forward", target=1e9, against=("sdpa flash", "naive")),
        RateBar(case=case, direction="backward", target=1e-12, must=1e-13),
        RoofBar(case=case, direction="forward", target=1e-9),
        BackwardBar(case=case, target=1e9),
        FlatTimeBar(case=case, direction="forward", target=1e9, lengths=(16, 32)),
        LinearMemoryBar(case=case, direction="forward", target=1e9, lengths=(512, 1024)),
    ]


def test_suite_measures_its_bars(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(SegmentedCase, "bars", classmethod(lambda cls, suite: bars_of_one_case()))
    monkeypatch.setattr(run, "SUITE_SECONDS", 0.0)
    record = run.run(["segmented_attention"], suite="cpu-bars", backend="reference", out=tmp_path)
    reached = [bar["reached"] for bar in record["bars"]]
    if not Path("/proc/self/clear_refs").exists():
        reached.pop()
    assert all(value is not None for value in reached)
    assert [bar["met"] for bar in record["bars"][:5]] == [False, True, True, True, True]
    assert record["bars"][1]["met_must"] is True
    speed = [row["memattn_speedup"]["median"] for row in record["rows"] if row["memattn_speedup"]]
    assert reached[0] == min(speed)
    assert len(record["sweeps"]) == 2 + 2
    assert capsys.readouterr().out.count("MISSED") == 1
    assert json.loads((tmp_path / "bench.json").read_text())["suite"] == "cpu-bars"


def test_bars_by_hand():
    case = small("window", T=32)
    speed, rate, roof, backward, flat, memory = bars_of_one_case()
    found = Found(roofs={("cpu", torch.float32): Roofs(1e9, 1e15, 1e15)})
    forward = Timing((0.5,))
    found.rows[case, "forward", OURS] = Row(case, "forward", OURS, forward)
    found.rows[case, "backward", OURS] = Row(case, "backward", OURS, Timing((1.0,)))
    for name, ratio in (("sdpa flash", 3.0), ("naive", 2.0)):
        row = Row(case, "forward", name, forward, speedup=Timing((ratio,)))
        found.rows[case, "forward", name] = row
    found.times[flat.sweep] = [Timing((1.0,)), Timing((3.0,))]
    found.peaks[memory.sweep] = [100, 300]
    work = case.work()
    assert speed.reached(found) == 2.0
    assert rate.reached(found) == pytest.approx(work["backward"].flops / 1e12)
    assert roof.reached(found) == pytest.approx(100 * work["forward"].flops / 1e9 / 0.5)
    assert backward.reached(found) == 2.0
    assert flat.reached(found) == memory.reached(found) == pytest.approx(1.5)
    assert flat.holds(1.5, 1.5)
    assert not flat.holds(1.6, 1.5)
    assert not speed.holds(1.4, 1.5)
    # nothing to compare with: no number
    assert flat.reached(Found()) is memory.reached(Found()) is speed.reached(Found()) is None


def test_bars_ask_for_what_is_required():
    bars = {bar.name: bar.target for bar in SegmentedCase.bars("cpu-bars")}
    for direction in ("forward", "backward"):
        assert bars[f"causal T=2048 D=64, {direction}: speed over sdpa flash"] == 1.2
        masked = f"window T=4096 W=256 D=64, {direction}: speed over sdpa flash"
        assert bars[masked] == 10.0
        flat = f"window T=2048..32768 W=256 D=64, {direction}: spread of time per token"
        assert bars[flat] <= 1.15
    assert bars["window T=4096 W=256 D=64, forward: speed over flex"] == 2.0
    linear = "window T=2048..32768 W=256 D=64, forward+backward: growth of memory per token"
    assert bars[linear] <= 1.1
    for bar in SegmentedCase.bars("cpu-bars"):
        assert (bar.case.H, bar.case.D, bar.case.dtype) == (8, 64, torch.float32)
    for bar in SegmentedCase.bars("gpu-bars"):
        assert (bar.case.device, bar.case.dtype) == ("cuda", torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what is said without CUDA")
def test_gpu_bars_without_a_gpu_are_not_measured(capsys):
    record = run.run(suite="gpu-bars")
    assert record["bars"]
    assert {bar["reason"] for bar in record["bars"]} == {"not measured: no CUDA device"}
    assert all(bar["reached"] is None and bar["met"] is None for bar in record["bars"])
    assert "TFLOP/s" not in re.sub(r"[<>]= [\d.]+ TFLOP/s", "", capsys.readouterr().out)


# front doors


def in_new_process(command: list[str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_runs_where_only_torch_is_installed():
    code = """
import sys
for name in ("jsonargparse", "rich", "matplotlib", "transformers", "triton", "numpy"):
    sys.modules[name] = None
from memattn.bench.__main__ import main
options = ["--quick", "--kinds", "causal", "--seq_lens", "16", "--shape", "H=1", "D=8"]
sys.exit(main([*options, "--device", "cpu", "--backend", "reference", "--directions", "forward"]))
"""
    done = in_new_process([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert "causal T=16 D=8" in done.stdout


def test_command_line(capsys):
    from memattn.cli import main

    options = ["--quick", "--kinds", "causal", "--seq-lens", "16", "--shape", "H=1", "D=8"]
    options += ["--device", "cpu", "--backend", "reference", "--directions", "forward"]
    assert main(["bench", "segmented_attention", *options, "--peers", "none"]) == 0
    printed = capsys.readouterr().out
    assert "causal T=16 D=8" in printed
    assert "sdpa" not in printed
    assert main(["bench", "attention"]) == 2
    assert (
        "operators must be one of future_attention, segmented_attention" in capsys.readouterr().err
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what is said without CUDA")
def test_retune_needs_a_gpu(capsys, tmp_path):
    assert __main__.main(["--retune", "--out", str(tmp_path / "out")]) == 2
    assert "retune must have a CUDA device, got none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_exponentials_of_the_roof_are_computed():
    exp_roof = pytest.importorskip("memattn.bench.exp_roof")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not triton_is_interpreted():
        pytest.skip("Triton's interpreter is off")
    values = exp_roof.run_exps(device)
    # the fixed point of exp2(-x)
    torch.testing.assert_close(values, torch.full_like(values, 0.6411857445))
    assert exp_roof.count_exps(device) == values.numel() * 512


def test_pytest_benchmarks_run():
    command = [sys.executable, "-m", "pytest", "bench/", "-q", "--benchmark-disable", "-x"]
    command += ["-k", "mac and backward and flash", "-p", "no:cacheprovider"]
    done = in_new_process(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
