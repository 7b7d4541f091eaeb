"""The demo's processes: results as they come, and nothing left running."""

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from memattn.demo import DemoConfig
from memattn.demo import run as demo_run
from memattn.demo.plan import Plan
from memattn.demo.workers import Workers
from memattn.models import MemAttnConfig
from memattn.train.interrupt import StopRequest
from memattn.train.metrics import read_metrics


def wait_for(file):
    while not file.exists():
        time.sleep(0.02)


def until_told(folder, name):
    """Training in short: ends behind a checkpoint."""
    with StopRequest() as stop:
        (folder / f"{name} begun").touch()
        while not stop.received:
            time.sleep(0.02)
    (folder / f"{name} saved").touch()
    raise KeyboardInterrupt


def fails_behind(file):
    wait_for(file)
    raise ValueError("seq_len must be at most 5, got 7")


@pytest.fixture(scope="module")
def workers():
    with Workers(2, Console(quiet=True)) as workers:
        yield workers


def test_results_come_from_other_processes_which_share_the_threads(workers):
    jobs = {"pid": os.getpid, "threads": torch.get_num_threads, "other pid": os.getpid}
    results = dict(workers.run(jobs, "counting"))
    assert results.keys() == jobs.keys() and results["threads"] == max(
        1, torch.get_num_threads() // 2
    )
    assert os.getpid() not in (results["pid"], results["other pid"])
    # the processes stay
    again = dict(workers.run({str(i): os.getpid for i in range(4)}, None))
    assert len({*again.values(), results["pid"], results["other pid"]}) <= 2


def test_alone_a_job_runs_here():
    with Workers(1, Console(quiet=True)) as workers:
        assert workers.alone and list(workers.run({"pid": os.getpid}, "counting")) == [
            ("pid", os.getpid())
        ]


def test_an_error_ends_the_other_jobs_behind_their_checkpoint(workers, tmp_path):
    jobs = {
        "goes on": partial(until_told, tmp_path, "goes on"),
        "fails": partial(fails_behind, tmp_path / "goes on begun"),
        "never begins": partial(until_told, tmp_path, "never begins"),
    }
    with pytest.raises(ValueError, match="seq_len must be at most 5, got 7") as raised:
        list(workers.run(jobs, "training"))
    assert "in the process of fails" in str(cause := raised.value.__cause__)
    assert "in fails_behind" in str(cause)  # its traceback
    assert (tmp_path / "goes on saved").exists()
    assert not (tmp_path / "never begins begun").exists()
    # and there are processes for what follows
    assert len(dict(workers.run({"a": os.getpid, "b": os.getpid}, None))) == 2


def test_a_process_that_is_killed_is_named(workers):
    with pytest.raises(RuntimeError, match="the process of titans ended with exit code -9"):
        list(workers.run({"titans": partial(signal.raise_signal, signal.SIGKILL)}, "training"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_jobs_behind_their_checkpoints(workers, tmp_path, number):
    names = ("vanilla", "future")
    begun = [tmp_path / f"{name} begun" for name in names]

    def kill():
        for file in begun:
            wait_for(file)
        os.kill(os.getpid(), number)

    killer = threading.Thread(target=kill)
    killer.start()
    jobs = {name: partial(until_told, tmp_path, name) for name in names}
    with pytest.raises(KeyboardInterrupt, match="in vanilla, future; the same command goes on"):
        list(workers.run(jobs, "training"))
    killer.join()
    assert all((tmp_path / f"{name} saved").exists() for name in names)


def test_presets_that_train_side_by_side_do_the_same_steps(monkeypatch, tmp_path, workers):
    text = " ".join(str(i * i % 97) for i in range(3000))
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"{i} {text}")
    presets = {"vanilla": MemAttnConfig.vanilla, "segmented": MemAttnConfig.segmented}
    monkeypatch.setattr(demo_run, "PRESETS", presets)
    config = DemoConfig(
        out=str(tmp_path / "demo"),
        minutes=1e-3,
        corpus=str(tmp_path),
        seq_len=32,
        batch_size=2,
        vocab_size=280,
        sizes=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1),
        cache_dir=str(tmp_path / "cache"),
        processes=2,
    )
    console = Console(quiet=True)
    plan = demo_run._plan(config, Path(config.out), console)
    assert plan.processes == 2
    demo_run._train(config, plan, workers, console)
    assert plan.is_complete and Plan.load(Path(config.out) / "plan.json") == plan
    for preset in presets:
        rows = read_metrics(Path(config.out) / preset / "metrics.csv")
        assert [row["step"] for row in rows if row["loss"]] == list(range(1, plan.steps + 1))
        assert (Path(config.out) / preset / "model").is_dir()
