"""The command line's frame, and the commands that need no training."""

import ast
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from memattn.cli import main
from memattn.cli._main import COMMANDS
from memattn.cli._parser import build_parser, normalise
from memattn.data import Document, tokenize_documents, train_tokenizer
from memattn.models import MemAttnConfig, MemAttnForCausalLM
from memattn.ops._dispatch import triton_is_installed, triton_is_interpreted

ROOT = Path(__file__).parents[1]
TEXT = "the cat sat on the mat and the dog sat on the log " * 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = train_tokenizer([TEXT], 270, folder)
    torch.manual_seed(0)
    config = MemAttnConfig.segmented(
        segment_len=4,
        window_size=3,
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    MemAttnForCausalLM(config).save_pretrained(folder)
    return folder


def run(capsys, *arguments):
    """Exit code, stdout and stderr of the command line."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def assert_user_error(result, *words):
    code, out, err = result
    assert code == 2 and out == ""
    (line,) = err.splitlines()
    assert all(word in line for word in words), line


def test_help_is_quick_and_loads_neither_torch_nor_transformers():
    code = (
        "import sys; from memattn.cli import main; code = main(['--help'])\n"
        "loaded = {'torch', 'transformers', 'jsonargparse', 'matplotlib'} & sys.modules.keys()\n"
        "sys.exit(f'loaded {loaded}' if loaded else code)"
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - began < 10.0  # a fraction of a second where nothing else runs
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z].*\.$", done.stdout, re.MULTILINE), done.stdout


def test_python_m_gives_the_version():
    from memattn import __version__

    done = subprocess.run(
        [sys.executable, "-m", "memattn", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"memattn {__version__}\n")


def test_nothing_to_do_prints_help(capsys):
    code, out, _ = run(capsys)
    assert code == 0 and out.startswith("usage: memattn COMMAND")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_each_of_its_options(capsys, name):
    import importlib

    module = importlib.import_module(f"memattn.cli.{name}")
    commands = {name: getattr(module, name)}
    for kind, of_kind in getattr(module, "KINDS", {}).items():
        commands[f"{name} {kind}"] = of_kind
    for words, function in commands.items():
        code, out, _ = run(capsys, *words.split(), "--help")
        assert code == 0 and f"usage: memattn {words} " in out
        parser, _ = build_parser(function, f"memattn {words}")
        undocumented = [
            action.dest
            for action in parser._actions
            if not action.help and "." not in action.dest and action.dest != "help"
        ]
        assert undocumented == []


def test_cli_files_import_nothing_heavy_at_the_top():
    for file in (ROOT / "memattn" / "cli").glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            heavy = ("torch", "transformers", "triton", "matplotlib", "memattn.models")
            assert not [name for name in names if name.startswith(heavy)], file


def test_unknown_command_names_the_known_ones(capsys):
    assert_user_error(
        run(capsys, "frobnicate"), "command must be one of doctor, data", "frobnicate"
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("a must be b,\n  got c"), "a must be b, got c"),
        (TypeError("a must be a tensor"), "a must be a tensor"),
        (NotImplementedError("no such thing"), "no such thing"),
        (ImportError("run: pip install x"), "run: pip install x"),
        (FileNotFoundError(2, "No such file or directory", "f.txt"), "directory: f.txt"),
        (OSError(28, "No space left on device", "out/x"), "no space left on the device: out/x"),
        (ValueError(), "ValueError"),
    ],
)
def test_user_errors_are_one_line(capsys, monkeypatch, error, words):
    import memattn.cli.doctor

    def doctor() -> int:
        """Raise."""
        raise error

    monkeypatch.setattr(memattn.cli.doctor, "doctor", doctor)
    assert_user_error(run(capsys, "doctor"), "memattn doctor: error:", words)
    with pytest.raises(type(error)):
        main(["doctor", "--debug"])


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    import memattn.cli.doctor

    def doctor() -> int:
        """Raise."""
        raise AssertionError("ours")

    monkeypatch.setattr(memattn.cli.doctor, "doctor", doctor)
    with pytest.raises(AssertionError, match="ours"):
        main(["doctor"])


def test_ctrl_c_is_130(capsys, monkeypatch):
    import memattn.cli.doctor

    def doctor() -> int:
        """Raise."""
        raise KeyboardInterrupt("resume from here")

    monkeypatch.setattr(memattn.cli.doctor, "doctor", doctor)
    assert run(capsys, "doctor") == (
        130,
        "",
        "memattn doctor: interrupted: resume from here\n",
    )


def example(
    items: list[str], count: int = 3, loud: bool = False, ratio: float | None = None
) -> int:
    """Do it.

    Args:
        items: Things.
        count: How many.
        loud: Whether to shout.
        ratio: A share.
    """
    return 0


def test_parser_gives_the_functions_arguments(tmp_path):
    parser, build = build_parser(example, "example")
    values = build(parser.parse_args(["a", "b", "--count", "5", "--loud"]))
    assert values == dict(items=["a", "b"], count=5, loud=True, ratio=None)
    config = tmp_path / "c.yaml"
    config.write_text("count: 7\nratio: 0.5\n")
    values = build(parser.parse_args(["a", "--config", str(config), "--no_loud"]))
    assert values == dict(items=["a"], count=7, loud=False, ratio=0.5)


def test_dashes_in_option_names_are_underscores():
    assert normalise(["a-b", "--batch-size=x-y", "--seq-len", "3", "--", "--c-d"]) == [
        *("a-b", "--batch_size=x-y", "--seq_len", "3", "--", "--c-d"),
    ]


def test_wrong_values_and_files_are_one_line(capsys, tmp_path):
    assert_user_error(run(capsys, "audit"), "model")
    assert_user_error(run(capsys, "audit", "x", "--seq_len", "long"), "seq_len", "long")
    assert_user_error(run(capsys, "audit", tmp_path), "model must be a folder", str(tmp_path))
    assert_user_error(run(capsys, "audit", "vanilla", "--seq-len", "5"), "seq_len must be between")
    assert_user_error(run(capsys, "audit", "vanilla", "--device", "gpu"), "device must be", "gpu")
    assert_user_error(run(capsys, "plot", tmp_path), "run must be a folder with metrics.csv")
    bad = tmp_path / "bad.yaml"
    bad.write_text("no_such_field: 1\n")
    assert_user_error(run(capsys, "audit", "vanilla", "--config", bad), "no_such_field")


def test_a_damaged_model_is_one_line(capsys, saved, tmp_path):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_user_error(run(capsys, "audit", tmp_path), "model must be a whole checkpoint")
    weights.unlink()
    assert_user_error(run(capsys, "audit", tmp_path), str(tmp_path))
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved / "model.safetensors")
    name = next(name for name in tensors if "mlp" in name)
    del tensors[name]
    save_file(tensors, weights, metadata={"format": "pt"})
    assert_user_error(run(capsys, "audit", tmp_path), "model must have all weights", name)


def test_audit_passes_a_saved_model_and_writes_json(capsys, saved, tmp_path):
    report = tmp_path / "deep" / "report.json"
    code, out, _ = run(capsys, "audit", saved, "--json", report)
    assert code == 0 and "audit: all 0" in out
    values = json.loads(report.read_text())
    assert values["passed"] and values["model"] == "MemAttnForCausalLM"
    assert {row["check"] for row in values["rows"]} >= {"future leak", "packed documents"}


@pytest.mark.parametrize("preset", ["vanilla", "segmented"])
def test_audit_passes_presets(preset):
    from memattn.evaluate import audit
    from memattn.models import PRESETS

    own = dict(segment_len=9, window_size=6) if preset == "segmented" else {}
    sizes = dict(vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    report = audit(MemAttnForCausalLM(PRESETS[preset](**sizes, **own)))
    assert report.verdict == "all 0" and report.notes == ()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that cannot be reached, and a cache of it that is empty."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("command", ["audit", "evaluate", "generate"])
def test_a_hub_that_cannot_be_reached_is_one_line(capsys, hub, command):
    for name in ("gpt2", "owner/gpt2"):
        words = ("or a name on the Hugging Face hub", f"got {name} (no such folder, and the hub")
        assert_user_error(run(capsys, command, name), *words, "cannot be reached")
    # no name that the hub could have
    for name in ("./gpt2", "a/b/c", "two words"):
        assert_user_error(run(capsys, command, name), f"got {name} (no such folder)")


def test_a_model_that_the_hub_lacks_is_one_line(capsys, monkeypatch):
    def download(*args, **options):
        raise OSError("404 Client Error.\n\nRepository Not Found for url: u")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert_user_error(run(capsys, "audit", "owner/gpt2"), "got owner/gpt2 (404 Client Error.)")


def test_models_of_the_hub_are_taken_by_name(capsys, hub, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    # as the hub's own library leaves a download
    folder = hub / "models--owner--tiny"
    snapshot = folder / "snapshots" / ("0" * 40)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=270, **sizes)).save_pretrained(snapshot)
    train_tokenizer([TEXT], 270).save_pretrained(snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    code, out, _ = run(capsys, "audit", "owner/tiny", "--seq-len", 20)
    assert code == 0 and "LlamaForCausalLM" in out and "audit: all 0" in out
    code, out, _ = run(capsys, "generate", "owner/tiny", "--prompt", "cat", "--max-new-tokens", 2)
    assert code == 0 and out.startswith("cat")
    assert run(capsys, "audit", snapshot, "--seq-len", 20)[0] == 0  # and by folder


def test_audit_fails_with_1(capsys, monkeypatch):
    from memattn.evaluate import AuditReport, AuditRow

    row = AuditRow(check="future leak", case="", dtype="float64", value=1.0, bound=0.0)
    report = AuditReport(model="M", rows=(row,))
    monkeypatch.setattr("memattn.evaluate.audit", lambda *args, **options: report)
    code, out, _ = run(capsys, "audit", "vanilla")
    assert code == 1 and "failed: future leak" in out


def test_evaluate_gives_the_perplexity_of_a_file(capsys, saved, tmp_path):
    from memattn.evaluate import perplexity

    file, report = tmp_path / "text.txt", tmp_path / "report.json"
    file.write_text(TEXT)
    code, out, _ = run(capsys, "evaluate", saved, "--data", file, "--json", report)
    assert code == 0 and "bits per byte" in out
    values = json.loads(report.read_text())
    model = MemAttnForCausalLM.from_pretrained(saved)
    tokenizer = train_tokenizer([TEXT], 270)
    expected = perplexity(model, [TEXT], tokenizer)
    assert values["loss"] == pytest.approx(expected.loss) and values["num_words"] == len(
        TEXT.split()
    )
    tokens = tokenize_documents([Document("", TEXT)], tokenizer)
    assert values["num_tokens"] == len(tokens.ids) - 2  # all but begin- and end-of-text


def test_evaluate_needs_data_and_a_tokenizer(capsys, saved, tmp_path):
    assert_user_error(run(capsys, "evaluate", saved), "data must be given")
    assert_user_error(run(capsys, "evaluate", "vanilla"), "folder with a tokenizer, got vanilla")
    missing = tmp_path / "none.txt"
    assert_user_error(run(capsys, "evaluate", saved, "--data", missing), str(missing))


def test_generate_continues_the_prompt(capsys, saved):
    arguments = ("generate", saved, "--prompt", "the cat", "--max-new-tokens", 8)
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and out.startswith("the cat") and len(out) > len("the cat\n")
    assert run(capsys, *arguments)[1] == out
    others = [run(capsys, *arguments, "--seed", seed)[1] for seed in range(1, 4)]
    assert set(others) != {out}
    greedy = [run(capsys, *arguments, "--temperature", 0, "--seed", seed)[1] for seed in (0, 1)]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--max_new_tokens", 0, "max_new_tokens must be at least 1, got 0"),
        ("--temperature", -1, "temperature must be at least 0"),
        ("--top_p", 0, "top_p must be in (0, 1], got 0"),
        ("--top_k", -1, "top_k must be at least 0, got -1"),
    ],
)
def test_generate_checks_its_options(capsys, saved, option, value, words):
    assert_user_error(run(capsys, "generate", saved, "--prompt", "a", option, value), words)


def test_doctor_reports(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    code, out, _ = run(capsys, "doctor")
    if triton_is_installed() and triton_is_interpreted():
        assert "launches are not recorded: MEMATTN_RECORD_LAUNCHES=1 is not set" in out
    assert code == 0
    assert torch.__version__.split("+")[0] in out
    for words in ("versions", "devices", "backends", "reference", "cpu float64", "always the"):
        assert words in out


def test_doctor_says_how_to_build_a_missing_extension(capsys, monkeypatch):
    import importlib.util

    from memattn.ops import _dispatch

    find_spec = importlib.util.find_spec
    blocked = lambda name, *rest: None if name == "memattn._C" else find_spec(name, *rest)
    monkeypatch.setattr(importlib.util, "find_spec", blocked)
    monkeypatch.setattr(_dispatch, "cpp_is_built", lambda: False)
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "not built" in out and "--no-build-isolation" in out
    assert "the C++ backend is not usable here" in out  # what auto picks for float32
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "no C++ compiler" in run(capsys, "doctor")[1]


def test_doctor_fails_where_torch_does_not_load(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out, _ = run(capsys, "doctor")
    assert code == 1 and "pip install torch" in out
