"""Checkpoints: complete or absent, and resumed bit for bit."""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from train_factories import columns, tiny_config, write_corpus

from memattn.cli import main
from memattn.train import TrainResult, checkpoint, loop, train
from memattn.train.interrupt import StopRequest
from memattn.train.metrics import MetricsLog, read_metrics
from memattn.train.setup import prepare_data

ROOT = Path(__file__).parent
EXACT = ("step", "tokens", "loss", "eval_loss", "learning_rate", "grad_norm")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> TrainResult:
    """A run that nothing interrupted."""
    return train(tiny_config(tmp_path_factory.mktemp("whole")), progress=False)


def assert_same_run(actual: TrainResult, expected: TrainResult) -> None:
    """Every number that does not depend on the clock, and every bit of the weights."""
    rows = [read_metrics(result.output_dir / "metrics.csv") for result in (actual, expected)]
    assert columns(rows[0], *EXACT) == columns(rows[1], *EXACT)
    for file in ("model/model.safetensors", "checkpoints/step-8/optimizer.safetensors"):
        a, b = (load_file(result.output_dir / file) for result in (actual, expected))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), file
    assert (actual.tokens, actual.loss, actual.eval_loss) == (
        *(expected.tokens, expected.loss, expected.eval_loss),
    )


@dataclasses.dataclass
class Faulty:
    """Runs in which something went wrong, each in a folder of its own."""

    folders: list[Path]
    faults: list[dict]
    codes: list[int]
    stderr: str


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> Faulty:
    """Five killed runs, one killed again after it was resumed, and one on a full disk."""
    draw = random.Random()  # any step must do
    faults = [{"kill_at_step": draw.randint(1, 8)} for _ in range(2)]
    # a checkpoint is three files, in steps 3, 6 and 8
    faults += [{"kill_in_save": call} for call in draw.sample(range(1, 10), 3)]
    folders = [tmp_path_factory.mktemp("faulty") for _ in range(6)]
    last = folders[5]
    # a model is some 25 kB; metrics are less
    faults += [{"kill_at_step": 4}, {"kill_at_step": 5}, {"small_disk": 16}]
    cases = [
        {"folder": str(folder), "faults": fault}
        for folder, fault in zip([*folders, last, last], faults, strict=True)
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_killed.py"), json.dumps(cases)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT.parent), str(ROOT)])},
        capture_output=True,
        text=True,
        check=True,
    )
    return Faulty(folders, faults, json.loads(done.stdout), done.stderr)


def test_a_paused_run_goes_on_bit_for_bit(whole, tmp_path):
    config = tiny_config(tmp_path)
    for stop_step in (1, 4, 4):  # the second 4 has nothing left to do
        paused = train(config, resume=True, stop_step=stop_step, progress=False)
        assert paused.step == stop_step and paused.eval_loss is None
        assert paused.checkpoint.name == f"step-{stop_step}" and not paused.model_dir.exists()
    assert_same_run(train(config, resume=True, stop_step=99, progress=False), whole)
    with pytest.raises(ValueError, match="stop_step must be at least 1, got 0"):
        train(config, resume=True, stop_step=0)


def test_a_run_without_time_pauses_after_a_step_and_goes_on_bit_for_bit(whole, tmp_path):
    config = tiny_config(tmp_path)
    for step in (1, 2):
        paused = train(config, resume=True, max_seconds=0.0, progress=False)
        assert paused.step == step and paused.checkpoint.name == f"step-{step}"
        assert not paused.model_dir.exists()
    assert_same_run(train(config, resume=True, max_seconds=600.0, progress=False), whole)
    with pytest.raises(ValueError, match="max_seconds must be at least 0, got -1"):
        train(config, resume=True, max_seconds=-1)


@pytest.mark.parametrize("case", range(5))
def test_a_killed_run_resumes_bit_for_bit(faulty, whole, case):
    assert faulty.codes[case] == -signal.SIGKILL, faulty.faults[case]
    folder = faulty.folders[case]
    result = train(tiny_config(folder), resume=True, progress=False)
    assert_same_run(result, whole)
    assert not list((folder / "run").rglob("*.tmp")), faulty.faults[case]


def test_a_full_disk_is_one_error_and_loses_nothing(faulty, whole):
    assert faulty.codes[5:] == [-signal.SIGKILL, -signal.SIGKILL, 3]
    last = faulty.folders[5] / "run/checkpoints/step-3"
    assert faulty.stderr.startswith("checkpoint must be writable, got "), faulty.stderr
    assert faulty.stderr.endswith(f"the last good checkpoint is {last}")
    assert "\n" not in faulty.stderr
    assert [path.name for path in last.parent.iterdir()] == ["step-3"]
    assert_same_run(train(tiny_config(faulty.folders[5]), resume=True, progress=False), whole)


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")],
    ids=["OSError", "SafetensorError"],
)
def test_a_failed_write_leaves_no_half_checkpoint(tmp_path, monkeypatch, error):
    def fail(tensors, path, *metadata):
        if "step-6" in str(path):
            raise error
        save_file(tensors, path, *metadata)

    save_file = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="got .*No space left.* the last good checkpoint is .*step-3"):
        train(tiny_config(tmp_path), progress=False)
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-3"]
    checkpoint.read_checkpoint(folder / "step-3")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_leaves_a_checkpoint_and_exit_code_130(
    tmp_path, monkeypatch, capsys, whole, number
):
    def write_and_signal(self, **row):
        write(self, **row)
        if row["step"] == 5:
            os.kill(os.getpid(), number)

    write = MetricsLog.write
    config = tiny_config(tmp_path)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    command = ["train", "--config", str(tmp_path / "config.yaml"), "--no-progress"]
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", write_and_signal)
        assert main(command) == 130
    assert signal.getsignal(number) is handler
    assert "stopped after step 5; resume from" in capsys.readouterr().err
    assert (tmp_path / "run/checkpoints/step-5").is_dir()
    assert main([*command, "--resume", "true"]) == 0
    assert "step 8, 1,024 tokens" in capsys.readouterr().out
    shown = train(config, resume=True, progress=False)  # nothing is left to do
    assert shown.tokens_per_second == 0.0
    assert_same_run(shown, whole)


def test_a_run_stopped_before_its_first_step_resumes(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "__enter__", lambda self: setattr(self, "received", 1) or self)
        with pytest.raises(KeyboardInterrupt, match="stopped after step 0; resume from .*step-0"):
            train(tiny_config(tmp_path), progress=False)
    assert_same_run(train(tiny_config(tmp_path), resume=True, progress=False), whole)


def test_epochs_end_a_run_wherever_it_was_paused(tmp_path, monkeypatch):
    def keep(accelerator, model, batches, max_batches):
        evaluated.append([len(b["input_ids"][0]) for b in islice(batches.one_epoch(), max_batches)])
        return held_out_losses(accelerator, model, batches, max_batches)

    evaluated, held_out_losses = [], loop.held_out_losses
    monkeypatch.setattr(loop, "held_out_losses", keep)
    results = []
    for name, pauses in (("whole", ()), ("paused", (3, 5))):
        folder = tmp_path / name
        folder.mkdir()
        write_corpus(folder / "corpus.jsonl", documents=4)
        options = {"eval_batch_size": 1, "eval_batches": 2, "save_steps": None}
        config = tiny_config(folder, max_steps=None, max_epochs=2, **options)
        for stop_step in pauses:
            assert train(config, resume=True, stop_step=stop_step, progress=False).step == stop_step
        results.append(train(config, resume=True, progress=False))
    whole, paused = results
    epoch = prepare_data(config).train.ids.numel() / (4 * 32)  # in steps of four rows
    assert 3 < epoch < 4, "the pauses must lie in both epochs"
    # an epoch ends in mid-row and the next goes on there; the last step is a whole one
    assert whole.step == paused.step == math.ceil(2 * math.ceil(4 * epoch) / 4)
    assert evaluated == [[32, 32]] * 2
    for column in EXACT:
        rows = [read_metrics(result.output_dir / "metrics.csv") for result in results]
        assert columns(rows[0], column) == columns(rows[1], column), column
    capped = dataclasses.replace(config.training, max_steps=3, output_dir=str(tmp_path / "capped"))
    assert train(dataclasses.replace(config, training=capped), progress=False).step == 3


def test_a_run_with_muon_resumes_bit_for_bit(tmp_path):
    results = []
    for name, pauses in (("whole", ()), ("paused", (3,))):
        folder = tmp_path / name
        folder.mkdir()
        write_corpus(folder / "corpus.jsonl", documents=4)
        config = tiny_config(folder, max_steps=8, optimizer="muon", save_steps=None)
        for stop_step in pauses:
            train(config, resume=True, stop_step=stop_step, progress=False)
        results.append(train(config, resume=True, progress=False))
    assert_same_run(results[1], results[0])


def test_a_finished_run_goes_on_in_another_folder(tmp_path, whole):
    config = tiny_config(tmp_path, max_steps=8)
    other = train(config, resume=whole.checkpoint, progress=False)
    assert other.checkpoint == tmp_path / "run/checkpoints/step-8"
    assert other.loss == whole.loss
    a, b = (load_file(result.model_dir / "model.safetensors") for result in (other, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def finished(tmp_path, whole) -> Path:
    """A copy of the whole run, which a test may damage."""
    shutil.copytree(whole.output_dir.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named(finished, file, damage):
    path = finished / "run/checkpoints/step-8" / file
    raw = bytearray(path.read_bytes())
    match damage:
        case "flip":
            raw[len(raw) // 3] ^= 255
            path.write_bytes(raw)
        case "truncate":
            path.write_bytes(raw[: len(raw) // 2])
        case "remove":
            path.unlink()
    with pytest.raises(ValueError, match="must be complete, got .*step-8 .*resume from .*step-6"):
        checkpoint.read_checkpoint(path.parent)


def test_resumes_from_a_checkpoint_that_is_named(finished, whole):
    config = tiny_config(finished)
    step_6 = finished / "run/checkpoints/step-6"
    (step_6.parent / "step-8/model.safetensors").unlink()
    with pytest.raises(ValueError, match="must be complete"):
        train(config, resume=True, progress=False)
    assert_same_run(train(config, resume=step_6, progress=False), whole)
    names = {path.name for path in step_6.parent.iterdir()}
    assert names == {"step-6", "step-8", "step-8.abandoned"}


def test_another_run_is_not_resumed_and_none_is_overwritten(finished):
    config = tiny_config(finished)

    def resume(**training):
        changed = dataclasses.replace(config.training, **training)
        return train(dataclasses.replace(config, training=changed), resume=True, progress=False)

    with pytest.raises(ValueError, match="output_dir must be a new folder, or resume be true, got"):
        train(config, progress=False)
    with pytest.raises(ValueError, match=r"training.seed must be 0 as in .*step-8, got 1"):
        resume(seed=1)
    with pytest.raises(ValueError, match=r"batch_size \* .* must be 4 as in .*step-8, got 8"):
        resume(batch_size=8)
    other = tiny_config(finished, data={"dataset_name": str(write_corpus(finished / "o.jsonl", 9))})
    with pytest.raises(ValueError, match="data must give the training tokens of .*step-8, got oth"):
        train(other, resume=True, progress=False)
    with pytest.raises(FileNotFoundError, match="resume must name a checkpoint folder, got nowh"):
        train(config, resume="nowhere", progress=False)
    # the same rows in other pieces, and more of them, are a choice
    result = resume(batch_size=2, gradient_accumulation_steps=2, max_steps=9)
    assert result.step == 9 and result.tokens == 9 * 4 * 32
    steps = [row["step"] for row in read_metrics(result.output_dir / "metrics.csv")]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 9]
