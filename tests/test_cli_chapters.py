"""``memattn chapters`` on a finished run, and the example that trains a model to read chapters."""

import json
import runpy
from pathlib import Path

import pytest
from train_factories import tiny_config, write_corpus
from transformers import AutoModelForCausalLM

from memattn.chapters import chapter_from_text, chapters_of
from memattn.cli import main
from memattn.parts import chapters as chapters_file
from memattn.train import train

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished run of a memory transformer."""
    folder = tmp_path_factory.mktemp("runs")
    train(tiny_config(folder, preset="memory_transformer", max_steps=2), progress=False)
    return folder / "run"


def test_the_command(run_folder, tmp_path, capsys):
    def run(*arguments):
        code = main(["chapters", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, " ".join((out + err).split())

    for name, text in (("tale", "the sea under the wind " * 9), ("other", "a dark ship " * 9)):
        (tmp_path / f"{name}.txt").write_text(text)
    tale, other = tmp_path / "tale.txt", tmp_path / "other.txt"
    assert run("list", run_folder) == (0, f"no chapters in {run_folder}")
    code, out = run("add", run_folder, tale)
    assert (code, out) == (0, "added tale, 207 tokens, closed")
    file = run_folder / "model" / "chapters.safetensors"
    assert chapters_file.list_chapters(file)[0].source == str(tale)
    assert run("open", run_folder, "tale", "--weight", 2) == (0, "opened tale")
    code, out = run("list", run_folder, "--check")
    assert code == 0 and "open, weight 2" in out and "the same" in out
    model = AutoModelForCausalLM.from_pretrained(run_folder / "model")
    assert chapters_of(model)["tale"].is_open
    chapter_from_text(model, "the sea", name="mine")  # with the tokenizer of the folder
    code, out = run("effect", run_folder, other, "--json", tmp_path / "own.json", "--device", "cpu")
    assert code == 0 and "closed" in out and "open" in out, out
    before = file.read_bytes()
    code, out = run("effect", run_folder, tale, "--other", other, "--json", tmp_path / "two.json")
    assert code == 0 and file.read_bytes() == before
    effects = json.loads((tmp_path / "two.json").read_text())["effects"]
    assert [each["condition"] for each in effects] == 2 * ["closed", "open", "control", "context"]
    assert effects[1]["change"] == pytest.approx(effects[1]["loss"] - effects[0]["loss"])
    assert effects[0]["change"] == 0 and effects[1]["change"] != 0 and effects[1]["error"] > 0
    assert run("refresh", run_folder) == (0, "made 1 chapters again")
    code, out = run("close", run_folder, "tail")
    assert code == 2 and "name must be one of tale, got 'tail'" in out
    assert run("close", run_folder, "tale")[0] == 0
    assert not chapters_file.list_chapters(file)[0].is_open
    assert run("delete", run_folder, "tale") == (0, "deleted tale") and not file.exists()
    code, out = run("effect", run_folder, other)
    assert code == 2 and "model must have chapters, got none" in out
    code, out = run("open", tmp_path, "tale")
    assert code == 2 and "model must be a folder with a saved model or a run" in out
    assert run("ad")[0] == 2


def test_the_example_measures_all_conditions(run_folder, tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus.jsonl", documents=60, words=250)
    example = runpy.run_path(str(ROOT / "examples/read_chapters.py"))
    options = ["--data", corpus, "--steps", 1, "--documents", 1, "--held_out", 2]
    assert example["main"](list(map(str, [run_folder / "model", *options]))) == 0
    out = capsys.readouterr().out
    assert "reading" in out and "mean over 2 documents" in out
    assert example["main"]([str(tmp_path)]) == 2
