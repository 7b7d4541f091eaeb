"""docs/start.md: its journeys run as they are written, and their likely mistakes are told."""

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

from memattn.cli import main

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "start.md").read_text()
JOURNEYS = {
    "1. Segmented attention": ["windowed.png"],
    "2. A small model of each system": ["losses.png"],
    "3. A memory or a specialist": ["chapters.png", "gates.png"],
    "4. A task mask": ["mask.png", "tasks.png"],
}
# fewer steps than the page's, so that a test takes seconds
SMALLER = {
    "max_steps: 100": "max_steps: 3",
    "seq_len: 128": "seq_len: 48",
    "batch_size: 8": "batch_size: 2",
}


def section(title: str) -> str:
    """The text of the section whose heading begins so."""
    (found,) = (part for part in PAGE.split("\n## ") if part.startswith(title))
    return found


def run_blocks(text: str, names: dict) -> None:
    """Run code blocks in order, in this process and folder: Python, and commands."""
    for language, code in re.findall(r"^```(python|bash)\n(.*?)^```$", text, re.S | re.M):
        if language == "python":
            exec(compile(code, "docs/start.md", "exec"), names)
            continue
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if words[0] != "memattn":
                subprocess.run(["bash", "-c", line], check=True, cwd=Path.cwd())
                continue
            with pytest.MonkeyPatch.context() as patch:
                if "<" in words:
                    *words, _, file = words
                    patch.setattr("sys.stdin", io.StringIO(Path(file).read_text()))
                assert main(words[1:]) == 0, line


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder in which the blocks before the first journey have run."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "design.md", folder / "docs")
    (folder / "configs").mkdir()
    config = (ROOT / "configs" / "start.yaml").read_text()
    for old, new in SMALLER.items():
        assert old in config
        config = config.replace(old, new)
    (folder / "configs" / "start.yaml").write_text(config)
    with pytest.MonkeyPatch.context() as patch, plain_warnings():
        patch.chdir(folder)
        run_blocks(section("Before you begin"), {})
    return folder


@contextlib.contextmanager
def plain_warnings():
    """Warnings of other libraries are none of a newcomer's mistakes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("title", JOURNEYS)
def test_a_journey_ends_with_its_pictures(title, begun, tmp_path, monkeypatch, capsys):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # of the cache
    text = section(title)
    with plain_warnings():
        run_blocks(text.replace("steps=20", "steps=2").replace("epochs=3,", "epochs=1,"), {})
    for picture in JOURNEYS[title]:
        assert f"`{picture}`" in text or f"--out {picture}" in text
        assert (tmp_path / picture).stat().st_size > 5_000


def test_the_list_of_journeys_is_whole():
    headings = [part.partition("\n")[0] for part in PAGE.split("\n## ")[2:]]
    assert len(headings) == len(JOURNEYS)
    anchors = re.findall(r"^\d\. \[.*?\]\(#(.*)\)$", PAGE.replace("\n   ", " "), re.M)
    assert anchors == [re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings]


# mistakes: each is told in one sentence that says what to do


def told(capsys, *arguments) -> str:
    """The one line on stderr of a command that ends with a user error."""
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def table_has(message: str) -> None:
    """The page explains the message by its beginning."""
    explained = re.findall(r"^\| `([^`]+)`", PAGE, re.M)
    assert any(known in message for known in explained), message


def test_a_model_without_a_tokenizer(begun, tmp_path, capsys):
    shutil.copytree(begun / "my-model", tmp_path / "bare")
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    line = told(capsys, "plot", "influence", tmp_path / "bare", "--text", "a")
    assert "put one into it with tokenizer.save_pretrained(" in line
    table_has(line)
    line = told(
        *(capsys, "train", "--model.model_path", tmp_path / "bare", "--model.preset", "null"),
        *("--data.dataset_name", begun / "my_text.txt", "--training.output_dir", tmp_path / "run"),
    )
    assert "give the folder of another as data.tokenizer" in line
    table_has(line)


@pytest.mark.parametrize(
    ("text", "flags", "remedy"),
    [
        ("short text", ["--data.held_out", "0"], "a longer text or a smaller seq_len, got 4"),
        ("x", [], "hold its end out, or held_out be 0"),
        (None, [], "source must be a file or folder that exists"),
    ],
)
def test_a_text_that_is_too_short_or_missing(text, flags, remedy, begun, tmp_path, capsys):
    file = tmp_path / "text.txt"
    if text is not None:
        file.write_text(text)
    line = told(
        *(capsys, "train", "--config", begun / "configs" / "start.yaml"),
        *("--data.dataset_name", file, "--training.output_dir", tmp_path / "run"),
        *("--data.cache_dir", tmp_path / "cache", *flags),
    )
    assert remedy in line
    table_has(line.replace("=48", "=128"))
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_take_the_attention():
    from transformers import GPTJConfig, GPTJForCausalLM

    import memattn.models  # noqa: F401

    sizes = dict(vocab_size=50, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    model = GPTJForCausalLM(GPTJConfig(**sizes, bos_token_id=0, eos_token_id=0))
    with pytest.raises(NotImplementedError, match="take a model of another family") as told:
        model.set_attn_implementation("memattn_segmented")
    table_has(str(told.value))


def test_a_mask_of_another_length_or_dtype():
    from memattn import DTGMAModel

    model = DTGMAModel((8, 8), 16, 2)
    model.register_task("a")
    for mask in (torch.ones(16, 16, dtype=torch.bool), torch.ones(17, 17)):
        with pytest.raises(ValueError, match=r"got (16|torch.float32)") as told:
            model.set_mask("a", mask)
        table_has(str(told.value))


def test_no_compiler(monkeypatch, capsys):
    import importlib.util

    from memattn.cli import doctor

    find_spec = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "memattn._C" else find_spec(name, *rest)
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor"]) == 0
    steps = capsys.readouterr().out.partition("what to do next\n")[2].splitlines()
    assert steps[0].startswith(
        "1. the fast backend for this machine is not usable: not built: no C++"
    )
    assert "apt-get install g++" in steps[0] and "run: pip install" in steps[0]
    assert [step[:2] for step in steps] == ["1.", "2.", "3."] and "docs/start.md" in steps[2]


def test_a_missing_package_comes_first(monkeypatch, capsys):
    from memattn.cli import doctor

    version = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: None if name == "einops" else version(name)
    )
    assert main(["doctor"]) == 0
    steps = capsys.readouterr().out.partition("what to do next\n")[2].splitlines()
    assert steps[0] == "1. pip install einops, which nothing goes without"
