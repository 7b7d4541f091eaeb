"""Runs of the benchmark: records, tables, suites of bars, the command line, retuning."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_factories import longer_window, plant, small

from memattn.bench import __main__, report, run
from memattn.bench.bars import (
    BackwardBar,
    BarInputs,
    FasterBar,
    FlatTimeBar,
    LinearMemoryBar,
    RateBar,
    RoofBar,
    SpeedBar,
)
from memattn.bench.case import operators
from memattn.bench.engine import OURS, Measurement
from memattn.bench.roofline import Roofs
from memattn.bench.segmented_attention import SegmentedCase
from memattn.bench.timing import Timing
from memattn.ops._dispatch import triton_is_interpreted

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]


def test_nothing_of_a_wrong_operator_is_printed_or_written(monkeypatch, capsys, tmp_path):
    plant(monkeypatch, longer_window)
    arguments = ["--quick", "--kinds", "causal", "window", "--seq_lens", "24", "--device", "cpu"]
    arguments += ["--shape", "H=2", "D=8", "window_size=4", "--backend", "reference"]
    assert __main__.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "wrong result, so no times are printed: segmented_attention, window T=24" in printed.err
    assert not (tmp_path / "out").exists()


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
    row = Measurement(small("causal"), "forward", "sdpa flash", timing, speedup=Timing((1.5,) * 3))
    row.peak_bytes = 3 << 20
    cells = report.row_cells(report.row_record(row, Roofs(1e9, 1e9, 1e12)))
    flops = small("causal").work()["forward"].flops
    roof = f"{100 * flops / 1e9 / 0.002:.0f} %"
    assert cells[:4] == ["causal B=2 T=48 D=16", "forward", "sdpa flash", "2 ms"]
    assert cells[5] == "48,000"  # tokens in a second
    assert [cells[7], cells[9], cells[10]] == [roof, "1.50x", "3.0 MiB"]


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
        ({"shape": {"heads": 2}}, r"shape must have names from B, .*, got heads"),
        ({"shape": {"H": 0}}, r"shape\[H\] must be at least 1, got 0"),
        ({"seq_lens": [0]}, r"seq_lens must be at least 1, got 0"),
        ({"directions": ["up"]}, r"directions must be one of .*, got 'up'"),
        ({"peers": ["flash"]}, r"peers must be one of .*, got 'flash'"),
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
    assert {file.name for file in tmp_path.iterdir()} == {"bench.json", "sweeps.png"}


def test_bars_by_hand():
    case = small("window", T=32)
    speed, rate, roof, backward, flat, memory = bars_of_one_case()
    found = BarInputs(roofs={("cpu", torch.float32): Roofs(1e9, 1e15, 1e15)})
    forward = Timing((0.5,))
    found.rows[case, "forward", OURS] = Measurement(case, "forward", OURS, forward)
    found.rows[case, "backward", OURS] = Measurement(case, "backward", OURS, Timing((1.0,)))
    for name, ratio in (("sdpa flash", 3.0), ("naive", 2.0)):
        row = Measurement(case, "forward", name, forward, speedup=Timing((ratio,)))
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
    assert (
        flat.reached(BarInputs())
        is memory.reached(BarInputs())
        is speed.reached(BarInputs())
        is None
    )


def test_bars_ask_for_what_is_required():
    everything = SegmentedCase.bars("cpu-bars")
    bars = {bar.name: bar.target for bar in everything}
    least = {bar.name: bar.must for bar in everything}
    for direction in ("forward", "backward"):
        causal = f"causal T=2048 D=64, {direction}: speed over sdpa flash"
        assert bars[causal] == 1.5 and least[causal] == 1.2
        masked = f"window T=4096 W=256 D=64, {direction}: speed over sdpa flash"
        assert bars[masked] == 10.0
        flat = f"window T=2048..32768 W=256 D=64, {direction}: spread of time per token"
        assert bars[flat] <= 1.15
    flex = "window T=4096 W=256 D=64, forward: speed over flex"
    assert bars[flex] == 4.0 and least[flex] == 2.0
    linear = "window B=4 T=2048..32768 W=256 D=64, forward+backward: growth of memory per token"
    assert bars[linear] <= 1.1
    for bar in SegmentedCase.bars("cpu-bars"):
        assert (bar.case.device, bar.case.H, bar.case.D) == ("cpu", 8, 64)
    for bar in SegmentedCase.bars("gpu-bars"):
        assert (bar.case.device, bar.case.dtype) == ("cuda", torch.bfloat16)


@pytest.mark.parametrize("has_products", [True, False])
def test_bfloat16_has_bars_where_the_processor_multiplies_it(has_products, monkeypatch):
    monkeypatch.setattr("memattn.bench.bars.multiplies_bfloat16", lambda: has_products)
    bars = [b for b in SegmentedCase.bars("cpu-bars") if b.case.dtype == torch.bfloat16]
    found = {bar.name: bar.target for bar in bars}
    assert len(found) == len(bars) == (10 if has_products else 0)
    if not has_products:
        return
    name = "dense T=2048 D=64 bfloat16"
    assert found[f"{name}, forward: speed over sdpa flash"] == 2.0
    assert found[f"{name}, backward: speed over sdpa flash"] == 1.6
    assert found[f"{name}, backward: speed over dense T=2048 D=64"] == 1.6
    faster = next(bar for bar in bars if isinstance(bar, FasterBar))
    slow, fast = (Timing((seconds,) * 3) for seconds in (0.3, 0.1))
    assert faster.reached(BarInputs(times={faster.times: [slow, fast]})) == pytest.approx(3.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what is said without CUDA")
def test_gpu_bars_without_a_gpu_are_not_measured(capsys):
    record = run.run(suite="gpu-bars")
    assert record["bars"]
    assert {bar["reason"] for bar in record["bars"]} == {"not measured: no CUDA device"}
    assert all(bar["reached"] is None and bar["met"] is None for bar in record["bars"])
    assert "TFLOP/s" not in re.sub(r"[<>]= [\d.]+ TFLOP/s", "", capsys.readouterr().out)


# command line


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
        "future_attention, models, neural_memory, segmented_attention, task_masked_attention, got"
        in capsys.readouterr().err
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
