"""``--config`` of commands: the configuration of a run, before and after it is trained."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from adapter_factories import make_base
from chat_templates import CHATML
from train_factories import tiny_config

from memattn.cli import main
from memattn.cli._evaluate_texts import load_texts
from memattn.cli._runs import load_either
from memattn.data import load_tokenizer
from memattn.train import TaskConfig, train
from memattn.train.metrics import read_metrics

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The file of a finished run."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny_config(folder, preset="vanilla", max_steps=3)
    (folder / "run.yaml").write_text(config.to_yaml())
    train(config, progress=False)
    return folder


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_generate_takes_what_is_trained_or_what_training_starts_from(trained, capsys, tmp_path):
    options = ("--prompt", "the sea", "--max_new_tokens", 5, "--temperature", 0, "--device", "cpu")
    by_file = run(capsys, "generate", "--config", trained / "run.yaml", *options)
    assert by_file == run(capsys, "generate", trained / "run", *options)
    assert by_file[0] == 0 and by_file[1].startswith("the sea") and by_file[2] == ""
    fresh = tmp_path / "fresh.yaml"
    text = (trained / "run.yaml").read_text()
    fresh.write_text(text.replace(str(trained / "run"), str(tmp_path / "no")))
    code, out, err = run(capsys, "generate", "--config", fresh, *options)
    assert code == 0 and out.startswith("the sea")
    assert (
        err == f"nothing is trained in {tmp_path / 'no'} yet: this is what training starts from\n"
    )


def test_evaluate_measures_what_the_run_held_out(trained, capsys, tmp_path):
    for name, arguments in (("a", ["--config", trained / "run.yaml"]), ("b", [trained / "run"])):
        options = ["--device", "cpu", "--json", tmp_path / name]
        code, out, _ = run(capsys, "evaluate", *arguments, *options)
        assert code == 0 and "held-out part of" in out
    a, b = (json.loads((tmp_path / name).read_text()) for name in "ab")
    assert a == b and a["num_tokens"] > 0


def test_evaluate_measures_the_answers_of_conversations(capsys, tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"number {i}?"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for i in range(8)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "chat.jinja").write_text(CHATML)
    data = {"dataset_name": str(tmp_path / "chats.jsonl"), "seq_len": 96, "held_out": 0.25}
    data["chat_template"] = str(tmp_path / "chat.jinja")
    mode = "instruction_finetuning"
    config = tiny_config(tmp_path, preset="vanilla", data=data, training_mode=mode, max_steps=2)
    result = train(config, progress=False)
    out = tmp_path / "out.json"
    options = ["--device", "cpu", "--json", out, "--batch_size", 1]
    code, text, _ = run(capsys, "evaluate", tmp_path / "run", *options)
    assert code == 0 and "held-out answers of" in text
    assert json.loads(out.read_text())["eval_loss"] == pytest.approx(result.eval_loss, abs=1e-6)


def test_evaluate_measures_the_answers_of_a_task(capsys, tmp_path):
    options = {"vocab_size": 12, "num_pairs": 2}
    data = {"task": TaskConfig(options=options, samples=8), "seq_len": 16, "held_out": 0.25}
    data |= {"dataset_name": "wiki", "vocab_size": None}
    config = tiny_config(tmp_path, preset="vanilla", data=data, max_steps=2)
    result = train(config, progress=False)
    out = tmp_path / "out.json"
    options = ["--device", "cpu", "--json", out, "--batch_size", 1]
    code, text, _ = run(capsys, "evaluate", tmp_path / "run", *options)
    assert code == 0 and "held-out answers of recall" in text
    assert json.loads(out.read_text())["eval_loss"] == pytest.approx(result.eval_loss, abs=1e-6)
    with pytest.raises(ValueError, match="data must be given where the run has learnt a task"):
        load_texts(load_either(str(tmp_path / "run"), None, None, "cpu"), None, str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model must be given, or --config, but not both, got neither"),
        (["m", "--config", "c"], "model must be given, or --config, but not both, got both"),
        (["--config", "no.yaml"], "config must be a file that exists, got no.yaml"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_names_what_is_wrong(capsys, command, arguments, message):
    code, _, err = run(capsys, command, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1


def test_base_model_is_for_pretrained_models(trained, capsys):
    wrong = ["--config", trained / "run.yaml", "--base_model", "x"]
    code, _, err = run(capsys, "generate", *wrong)
    assert code == 2 and "base_model must be left out for" in err


def test_a_pretrained_model_that_is_nowhere_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    file = SCRIPTS.parent / "configs" / "adapter_qwen_1.5b.yaml"
    for command in (["train"], ["generate", "--prompt", "Hello, world"], ["evaluate"]):
        code, _, err = run(capsys, command[0], "--config", file, *command[1:])
        assert code == 2 and "got Qwen/Qwen2.5-1.5B (" in err and err.count("\n") == 1
        assert "--base_model FOLDER" in err and "--model.model_path FOLDER" in err


def test_the_adapter_configuration_runs_on_a_local_qwen(capsys, monkeypatch, tmp_path):
    """A tiny one with random weights, from untrained memory to trained answers."""
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained("qwen")
    torch.manual_seed(0)
    make_base("qwen2", torch.float32, vocab_size=len(tokenizer) + 5).save_pretrained("qwen")
    asked = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "yes"}]
    rows = [{"messages": [{**asked[0], "content": f"{i}?"}, asked[1]]} for i in range(8)]
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = SCRIPTS.parent / "configs" / "adapter_qwen_1.5b.yaml"
    generate = ["generate", "--config", file, "--base_model", "qwen", "--prompt", "Hello, world"]
    generate += ["--max_new_tokens", 4, "--temperature", 0, "--device", "cpu"]
    code, out, err = run(capsys, *generate)
    assert code == 0, err
    assert out.startswith("Hello, world") and "nothing is trained" in err
    options = {"memory_lr": "0.03", "max_steps": 12, "warmup_steps": 1, "cpu": "true"}
    options |= {"gradient_accumulation_steps": 1, "save_steps": "null"}
    arguments = [f"--training.{name}={value}" for name, value in options.items()]
    arguments += ["--model.model_path=qwen", "--data.dataset_name=chats.jsonl"]
    arguments += ["--data.seq_len=128", "--data.held_out=0.25", "--data.cache_dir=cache"]
    code, out, err = run(capsys, "train", "--config", file, "--no_progress", *arguments)
    assert code == 0, err
    rows = read_metrics("runs/adapter_qwen_1.5b/metrics.csv")
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    assert losses[-1] < losses[0]  # as far as a frozen random output layer lets it
    code, trained, err = run(capsys, *generate)
    assert code == 0 and err == "" and trained.startswith("Hello, world")


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("train.py", ["--training.max_steps", "1"]),
        ("eval.py", ["--device", "cpu"]),
        ("inference.py", ["--prompt", "the", "--max_new_tokens", "1", "--device", "cpu"]),
    ],
)
def test_scripts_are_the_commands(trained, capsys, monkeypatch, tmp_path, script, options):
    file = trained / "run.yaml"
    if script == "train.py":
        options = [*options, "--training.output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [script, "--config", str(file), *options])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    assert stop.value.code == 0, capsys.readouterr().err
