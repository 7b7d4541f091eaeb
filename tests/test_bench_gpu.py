"""The session on a rented card, rehearsed: every stage, a cut at any moment, bad plans."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from memattn.bench.gpu import compare, correctness, host, session, speed
from memattn.bench.gpu.__main__ import main, read_plan
from memattn.bench.gpu.page import page
from memattn.bench.gpu.pool import Pool

ROOT = Path(__file__).parent.parent


def command(folder: Path, *words: str) -> list[str]:
    own = [sys.executable, "-m", "memattn.bench.gpu", "--dry", "--workers", "2"]
    return [*own, "--out", str(folder), *words]


def start(folder: Path, *words: str) -> subprocess.Popen:
    """A dry run in a process of its own, as `make gpu-dry` starts it."""
    environment = os.environ | {"PYTHONPATH": ".:kernels"}
    return subprocess.Popen(
        command(folder, *words),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def results(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_the_whole_session_runs_without_a_card(tmp_path: Path):
    process = start(tmp_path, "--seconds", "900", "--before", str(ROOT))
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    found = results(tmp_path)
    assert {session._stage_of(record["job"]) for record in found} == set(session.STAGES)
    assert {record["result"]["status"] for record in found} == {"ok", "skipped"}
    # every operator in both directions, every prediction, every stage to its end
    correct = [record["job"] for record in found if record["job"]["task"] == "correct"]
    assert len(correct) == 2 * 2 * len(correctness.CASES)
    assert printed.index("\nsummary\n") > printed.rindex("[tune-time]")
    assert "not finished" not in printed
    # nothing was timed
    rows = [row for record in found for row in record["result"].get("rows", ())]
    assert rows and all(row["seconds"] is None for row in rows)
    assert page(tmp_path).count("| segmented_attention |") == 4


def test_what_is_cut_off_keeps_its_results(tmp_path: Path):
    process = start(tmp_path, "--seconds", "200", "correct")
    deadline = time.monotonic() + 60
    while not (tmp_path / "results.jsonl").exists() or len(results(tmp_path)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "\nsummary\n" in printed and "not finished" in printed
    assert len(results(tmp_path)) >= 2
    assert (tmp_path / "summary.txt").read_text() in printed


def test_a_worker_that_dies_costs_its_own_job_only(tmp_path: Path):
    pool = Pool(1, tmp_path / "log", {"TRITON_INTERPRET": "1", "PYTHONPATH": ".:kernels"})
    found = []
    jobs = [{"task": "correct"}, *correctness.jobs(("task_masked_attention",), dry=True)[1:2]]
    jobs.insert(1, jobs[1] | {"T": -1})
    done = pool.run(
        jobs,
        lambda job, result: found.append(result["status"]),
        deadline=time.monotonic() + 100,
        job_seconds=60,
    )
    assert (done, found) == (3, ["error", "error", "ok"])
    found.clear()
    # a limit that no job can keep kills its worker
    pool.run(
        jobs[2:],
        lambda job, result: found.append(result["reason"]),
        deadline=time.monotonic() + 100,
        job_seconds=0.01,
    )
    assert found == ["exceeded its time limit"]


def test_a_wrong_result_is_told_with_its_case():
    (job, *_) = correctness.jobs(("segmented_attention",), dry=True)
    result = {"status": "wrong", "reason": "out: error 1e0 over the budget 1e-6"}
    result["configurations"] = correctness.configurations(job)
    line = session.line_of(job, result)
    assert "all sources, backward, float32, D=16: wrong" in line
    assert "seed 0, T=21" in line and '"BLOCK_M"' in line and "error 1e0" in line


def test_every_bar_of_a_gpu_is_planned():
    timed = tuple(name for name in correctness.CASES if name not in correctness.CHECKED_ONLY)
    plan = speed.plan(timed, False)
    for bar in plan.bars:
        assert set(bar.directions) <= set(plan.directions.get(bar.case, ()))
        assert not bar.directions or set(bar.peers) <= set(plan.peers[bar.case])
        assert bar.times is None or bar.times in plan.sweeps
    jobs = speed.speed_jobs(timed, dry=False, wrong=())
    # ours first, one case of each operator
    n = len(timed)
    assert [job["peers"] for job in jobs[: n + 1]].count([]) == n


def test_builds_are_compared_by_their_fastest_rounds():
    job = {"task": "before", "case": "causal", "direction": "forward"}
    times = {"before": (3.0, 2.0), "now": (1.0, 1.5)}
    pairs = [
        (job | {"build": build}, {"status": "ok", "milliseconds": value})
        for build, values in times.items()
        for value in values
    ]
    (row,) = compare.ratios(pairs)
    assert row["speedup"] == 2.0 and row["now"] == [1.0, 1.5]
    assert compare.ratios(pairs[:2]) == []


def test_small_calls_are_told_beside_the_card():
    (job, *_) = host.jobs(("segmented_attention",), dry=False)
    row = {"part": "forward", "plain": 110.25, "recorded": 30.5, "card": 8.0}
    missing = {"part": "backward", "plain": 200.0}
    line, other = host.lines([(job, {"status": "ok", "host": [row, missing, {"part": "x"}]})])
    assert line == (
        "segmented_attention, forward: plain 110.25 us, recorded 30.5 us, GPU alone 8 us, "
        "recorded minus GPU 22.5 us"
    )
    assert other.endswith("recorded minus GPU not measured")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "[gw9] [ 27%] FAILED tests/test_cuda.py::test_a[future] ",
            ("tests/test_cuda.py::test_a[future]", "failed"),
        ),
        ("tests/test_x.py::test_a SKIPPED (needs) [ 4%]", ("tests/test_x.py::test_a", "skipped")),
        ("SKIPPED [2] tests/test_x.py:12: needs a CUDA device", None),
    ],
)
def test_outcomes_are_read_from_lines(line: str, expected: tuple | None):
    assert session.read_outcome(line) == expected


def test_plans_pick_stages_and_operators():
    assert read_plan(["tests,correct"])[0] == ["correct", "tests"]
    assert read_plan(["future_attention"]) == (list(session.STAGES), ("future_attention",))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["sped"],
            "PLAN must have stages (correct, before, host, speed, tests, retune) and operators",
        ),
        (["--seconds", "1"], "seconds must be between 10 and 86400, got 1.0"),
        (["before"], "before must be given for the stage of that name, got None"),
        (["--before", "/"], "before must be a checkout of this project, got /"),
        (["--workers", "0"], "workers must be between 1 and 256, got 0"),
    ],
)
def test_bad_words_are_refused_before_anything_starts(
    words: list[str], message: str, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = tmp_path / "out"
    assert main(["--dry", "--out", str(folder), *words]) == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "file").touch()
    assert main(["--dry", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "out must be a folder that can be written" in capsys.readouterr().err


def test_without_a_card_the_session_is_refused(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "capability 8.0 or newer, got (7, 5)" in capsys.readouterr().err
