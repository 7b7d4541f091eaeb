"""memattn continual: one command from a stream to tables and pictures."""

import json

import pytest

from memattn.cli import main

pytest.importorskip("sklearn")
QUICK = ["--seeds=1", "--epochs=1", "--hidden_dim=16", "--batch_size=128", "--device=cpu"]


def test_runs_writes_and_goes_on(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["continual", *QUICK, "--tasks=2", f"--out={out}", "--strategies", "dtgma", "joint"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "2 tasks, task-incremental" in printed and "dtgma" in printed and "joint" in printed
    results = json.loads((out / "results.json").read_text())
    assert {run["strategy"] for run in results["runs"]} == {"dtgma", "joint"}
    for name in ("results.md", "accuracy.png", "graph.png"):
        assert (out / name).stat().st_size > 0
    # the same command trains nothing again, and another strategy joins the finished ones
    before = (out / "results.json").read_bytes()
    assert main(command) == 0
    assert (out / "results.json").read_bytes() == before
    assert main([*command, "finetuning"]) == 0
    again = json.loads((out / "results.json").read_text())
    assert again["runs"][:2] == results["runs"] and len(again["runs"]) == 3


def test_other_settings_need_another_folder(tmp_path, capsys):
    command = ["continual", *QUICK, "--tasks=2", f"--out={tmp_path}", "--strategies", "joint"]
    assert main(command) == 0
    assert main([*command, "--lr=0.1"]) == 2
    assert "folder must be a new folder for budget.lr 0.1, got" in capsys.readouterr().err


def test_no_graph_of_an_earlier_command_stays(tmp_path):
    command = ["continual", *QUICK, "--tasks=1", f"--out={tmp_path}", "--strategies"]
    assert main([*command, "dtgma"]) == 0
    assert (tmp_path / "graph.png").exists()
    assert main([*command, "joint"]) == 0
    assert not (tmp_path / "graph.png").exists()


def test_an_out_that_cannot_be_written_is_found_first(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("x")
    assert main(["continual", "--strategies=dtgma", f"--out={file}"]) == 2
    error = capsys.readouterr().err
    assert f"out must be a folder that can be written to, got {file} (" in error
    assert error.count("\n") == 1


def test_training_that_diverges_is_one_line(tmp_path, capsys):
    command = ["continual", *QUICK, "--lr=1e30", f"--out={tmp_path}", "--strategies", "dtgma"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "loss of task 0 must be finite in epoch 1 with lr=1e+30, got nan" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks=3"], "n_tasks must"),
        (["--tasks=0"], "n_tasks must be at least 1"),
        (["--seeds=0"], "seeds must be at least 1, got 0"),
        (["--strategies", "ewg"], "strategy must be one of joint,"),
        (["--benchmark=text_domains", "--permuted"], "permuted must be off for text_domains"),
        (["--data_dir=x"], "data_dir must be left out but for mnist"),
        (["--benchmark=mnist", "--data_dir=missing"], "train-images-idx3-ubyte"),
        (["--device=nowhere"], "device"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(options, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["continual", *QUICK, f"--out={out}", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()
