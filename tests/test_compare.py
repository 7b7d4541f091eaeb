"""The comparison of Titans with its peers, its options, and the example with the other ones."""

import csv
import importlib.util
import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from train_factories import write_corpus

from memattn.bench.memory import step_peak
from memattn.cli import main
from memattn.cli._parser import build_parser, normalise
from memattn.cli.compare import compare
from memattn.data import load_tokenizer
from memattn.data.wikitext import load_wikitext, wikitext_file
from memattn.models import PRESETS, MemAttnConfig
from memattn.study import run as study_run
from memattn.study.compare import CompareStudy, ModelSizes
from memattn.study.peers import PEERS, PeerSizes, count_parameters, peer_config
from memattn.viz.comparison import plot_comparison

ROOT = Path(__file__).parent.parent
# the options that the plan names, with their defaults
DEFAULTS = {
    "dim": 512,
    "depth": 6,
    "heads": 8,
    "dim_head": 64,
    "segment_len": 512,
    "ff_mult": 4,
    "use_memory": True,
    "use_flex_attn": False,
    "memory_dim": None,  # that of the model
    "batch_size": 16,
    "eval_batch_size": 16,
    "lr": 5e-5,
    "steps": 10000,
    "warmup_steps": 1000,
    "max_grad_norm": 0.5,
    "label_smoothing": 0.1,
    "output_dir": "./outputs",
    "save_interval": 1000,
    "log_interval": 100,
    "eval_interval": 500,
    "eval_steps": 50,
    "seq_len": 1024,
    "data_dir": "./data",
    "dataset": "wikitext",
}
# its first command line, and its options that are switches
COMMAND = """
    --dim 512 --depth 6 --heads 8 --dim-head 64 --segment-len 512 --batch-size 16 --lr 5e-5
    --steps 10000 --warmup-steps 500 --eval-steps 50 --eval-interval 1000 --log-interval 100
    --dataset wikitext --seq-len 1024 --data-dir ./data --output-dir ./outputs/comparison
    --save-interval 1000 --use-memory --use-flex-attn --memory-dim 256 --ff-mult 4
"""
WIKITEXT = """
 = A ship =

 The ship sails under the wind , and the sea is dark .

 = = Sails = =

 Bright sails . The pass of the wind is = 3 = here .

 = <unk> =

 Over the sea .

 = <unk> =

 Under the sea .
"""


def run(folder: Path, *options: str) -> int:
    """A comparison that takes a second."""
    tiny = "--dim 32 --depth 1 --heads 1 --dim-head 32 --segment-len 48 --batch-size 2 --lr 1e-3"
    tiny += " --eval-batch-size 3 --steps 4 --warmup-steps 1 --log-interval 1 --eval-interval 2"
    tiny += " --eval-steps 1 --save-interval 2 --seq-len 96 --tokenizer bytes"
    where = ["--dataset", str(folder / "corpus.jsonl"), "--data-dir", str(folder / "data")]
    where += ["--output-dir", str(folder / "out"), "--cache-dir", str(folder / "cache")]
    return main(["compare", *tiny.split(), *where, *options])


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison that was stopped in its second model, and went on; and what it trained."""
    folder = tmp_path_factory.mktemp("compared")
    write_corpus(folder / "corpus.jsonl")
    (folder / "data").mkdir()
    (folder / "data" / "test.txt").write_text(WIKITEXT)
    trained, train = [], study_run.train

    def stop_once(config, **options):
        trained.append(Path(config.training.output_dir).parent.name)
        if trained == ["titans", "vanilla"]:
            train(config, **{**options, "max_seconds": 0.0})
            raise KeyboardInterrupt("stopped")
        return train(config, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_run, "train", stop_once)
        assert run(folder) == 130
        assert not (folder / "out" / "results.md").exists()
        assert run(folder) == 0
    return folder, trained


def test_all_options_of_the_plan_have_its_defaults():
    parameters = inspect.signature(compare).parameters
    assert {name: parameters[name].default for name in DEFAULTS} == DEFAULTS
    parser, build = build_parser(compare, "memattn compare")
    given = build(parser.parse_args(normalise(COMMAND.split())))
    changed = {"warmup_steps": 500, "eval_interval": 1000, "output_dir": "./outputs/comparison"}
    changed |= {"use_flex_attn": True, "memory_dim": 256}
    assert {name: given[name] for name in DEFAULTS} == {**DEFAULTS, **changed}


def test_models_have_equal_tokens_and_parameters_and_all_is_written(compared):
    folder, trained = compared
    assert trained == ["titans", "vanilla", "vanilla"], "a finished model is not trained again"
    out = folder / "out"
    report = json.loads((out / "results.json").read_text())
    titans, vanilla = report["models"]
    assert [titans["preset"], vanilla["preset"]] == ["titans", "vanilla"]
    assert titans["options"]["intermediate_size"] == 4 * 32  # as given
    one_more = 2 * 32  # what one feature of the MLP has
    assert abs(titans["parameters"] - vanilla["parameters"]) <= one_more / 2
    assert {run["tokens"] for run in report["runs"]} == {4 * 2 * 96}
    for run in report["runs"]:
        for name in ("word_perplexity", "tokens_per_second", "peak_mebibytes", "needle_loss"):
            assert run[name] > 0.0, name
        assert run["peak_mebibytes"] * 2**20 >= 2 * 4 * titans["parameters"]  # and gradients
        assert 0.0 <= run["needle_accuracy"] <= 1.0 and 0.0 <= run["recall_accuracy"] <= 1.0
        place = out / run["variant"] / "seed-0"
        assert (place / "checkpoints" / "step-4").is_dir()
        needle = json.loads((place / "needle.json").read_text())
        assert sorted({cell["length"] for cell in needle["cells"]}) == [96, 192]
        assert (place / "needle.png").read_bytes().startswith(b"\x89PNG")
        with (place / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows if row["eval_loss"]] == ["2", "4"]
    for picture in ("comparison.png", "curves.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG"), picture
    text, page = ((out / name).read_text() for name in ("results.md", "report.html"))
    # losses and measures together, and attention and state of each model
    assert page.count("<svg") == 5 and "vanilla: state behind 96 tokens" in page
    assert f"<td>{titans['losses']['word_perplexity']['mean']:,.2f}</td>" in page
    assert f"{titans['losses']['word_perplexity']['mean']:,.2f}" in text
    assert "Perplexity: the standard test text of wikitext-103, in windows of 96 tokens" in text
    loaded = PRESETS["titans"].__self__.from_pretrained(out / "titans" / "seed-0" / "model")
    assert loaded.attention.memory_head_dim == 32 and loaded.attention.segment_len == 48


def test_runs_stand_on_one_page(compared, tmp_path, capsys):
    runs = [str(compared[0] / "out" / name / "seed-0") for name in ("titans", "vanilla")]
    page = tmp_path / "page.html"
    command = ["plot", "page", *runs, "--out"]
    assert main([*command, str(page), "--text", "A ship sails."]) == 0
    text = page.read_text()
    assert text.count("<svg") == 5 and f"{runs[0]}: where attention goes" in text
    assert "update of the weights" in text and "held out" in text
    capsys.readouterr()
    for options, message in (
        ([str(page)], "runs must be page and one run at least, with a text, got no text"),
        (["page.png", "--text", "A"], "out must end in .html for page, got page.png"),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err


def test_another_test_text_is_measured_anew_and_another_run_refused(
    compared, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("memattn.study.compare_report.write_pictures", lambda study: None)
    shutil.copytree(compared[0], tmp_path, dirs_exist_ok=True)
    before = json.loads((tmp_path / "out" / "titans" / "seed-0" / "measures.json").read_text())
    shutil.rmtree(tmp_path / "data")
    corpus, out = str(compared[0] / "corpus.jsonl"), str(tmp_path / "out")
    same = ["--dataset", corpus, "--cache-dir", str(compared[0] / "cache"), "--output-dir", out]
    assert run(tmp_path, *same, "--steps", "5") == 2
    assert "output_dir must be a new folder for training.max_steps 5" in capsys.readouterr().err
    monkeypatch.setattr(study_run, "train", None)  # would raise TypeError
    assert run(tmp_path, *same) == 0
    after = json.loads((tmp_path / "out" / "titans" / "seed-0" / "measures.json").read_text())
    assert before["word_perplexity"] != after["word_perplexity"]
    assert (
        "Perplexity: the documents that are held out"
        in (tmp_path / "out" / "results.md").read_text()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--models mamba2 vanilla", "models must begin with titans or vanilla, whose sizes are"),
        ("--models titans", "models must have vanilla, which the others are compared with"),
        ("--models titans rwkv", "error: models must have entries of titans, vanilla, mamba2"),
        ("--seeds 1 1", "error: seeds must have at least one entry and none twice, got [1, 1]"),
        ("--memory-dim 48", "memory_dim must be a multiple of the head size 32, got 48"),
        ("--warmup-steps 4", "warmup_steps must be below steps=4, got 4"),
        ("--seq-len 48", "seq_len must be long enough for what is measured: length must be at"),
        ("--variant macro", '"variant": Expected a typing.Literal'),
        ("--depth 0", "depth must be at least 1, got 0"),
    ],
)
def test_one_line_says_what_is_wrong(compared, capsys, options, message):
    assert run(compared[0], *options.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="FlexAttention trains on CUDA")
def test_flex_attention_is_refused_with_the_reason(compared, capsys):
    assert run(compared[0], "--use-flex-attn") == 2
    error = capsys.readouterr().err
    assert "use_flex_attn must be left out without CUDA, got it: PyTorch" in error
    assert "has no backward of FlexAttention on the CPU" in error


@pytest.mark.parametrize("name", PEERS)
def test_peers_have_as_many_parameters(name):
    tokenizer = load_tokenizer("bytes")
    for dim, heads, target in ((64, 2, 150_000), (128, 3, 600_000)):
        sizes = PeerSizes(hidden_size=dim, num_layers=2, num_heads=heads, head_dim=32, seq_len=64)
        config = peer_config(name, sizes, target, tokenizer)
        assert config.hidden_size == dim
        assert abs(count_parameters(config) / target - 1.0) < 0.01
    with pytest.raises(ValueError, match=f"{name}"):
        peer_config(name, sizes, 20_000, tokenizer)


def test_wikitext_is_cut_into_articles_or_named(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "wikitext-2"
    folder.mkdir(parents=True)
    (folder / "wiki.test.tokens").write_text(WIKITEXT)
    where = dict(data_dir=tmp_path / "data", version=2, cache_dir=tmp_path / "cache")
    articles = load_wikitext("test", **where)
    assert [article.title.split(" (")[0] for article in articles] == ["A ship", "<unk>", "<unk>"]
    assert articles[1].title != articles[2].title  # or one of them would be left out
    assert "".join(article.text for article in articles).split() == WIKITEXT.split()
    rows = [{"text": line} for line in WIKITEXT.splitlines(keepends=True)]
    monkeypatch.setattr("memattn.data.wikitext.load_hub_rows", lambda *names: rows)
    from_hub = wikitext_file("train", **where)
    assert load_wikitext("train", **where) == articles
    monkeypatch.undo()
    assert wikitext_file("train", **where) == from_hub  # kept


def test_without_wikitext_one_error_names_another_dataset(tmp_path, monkeypatch, capsys):
    def offline(name, subset, split):
        raise ConnectionError(f"Hugging Face dataset {name} must be on a hub, got: no hub")

    monkeypatch.setattr("memattn.data.wikitext.load_hub_rows", offline)
    assert run(tmp_path, "--dataset", "wikitext") == 2
    error = capsys.readouterr().err
    assert (
        f"dataset wikitext must be in a folder (wiki.train.tokens, got no such file in {tmp_path}"
    )
    assert error.strip().endswith("got: no hub; --dataset wiki needs no hub")


def test_without_memory_titans_is_its_attention():
    sizes = dict(dim=128, heads=3, dim_head=64, segment_len=32)
    made = ModelSizes(**sizes).model("titans", 64)
    config = PRESETS[made.preset](vocab_size=64, **made.options)
    assert (config.head_dim, config.attention.memory_sizes(config.sizes)) == (64, (2, 64))
    bare = ModelSizes(**sizes, use_memory=False).model("titans", 64)
    config = PRESETS[bare.preset](vocab_size=64, **bare.options)
    assert config.attention.spans == (None, 32)
    study = CompareStudy(sizes=ModelSizes(**sizes, use_memory=False))
    assert list(study.cell_names) == ["titans-without-memory", "vanilla"]


def test_a_step_peaks_where_its_largest_tensors_are():
    size = 2**24  # 64 MiB

    def step() -> None:
        torch.ones(size).add_(1.0)

    peak = step_peak(step, "cpu")
    if peak is None:
        pytest.skip("only Linux tells the peak of a process")
    assert 0.9 * 4 * size < peak < 1.5 * 4 * size


def test_a_comparison_without_losses_is_not_drawn(tmp_path):
    with pytest.raises(ValueError, match="runs must have losses to draw"):
        plot_comparison({}, {}, tmp_path / "comparison.png")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("main_example", ROOT / "examples" / "main.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_takes_the_second_command_line(example):
    command = """
        --mode train --dataset wikitext --wikitext_version 103
        --data_path ./titans/data/dataloader --model_dim 128 --depth 6 --heads 3
        --seq_length 1024 --batch_size 1 --val_batch_size 1
        --output_dir ./outputs/wikitext_model --learning_rate 0.03 --use_memory
        --fp16 --max_epochs 50
    """
    args = example.parse(command.split())
    config = example.make_config(args, "wiki")
    model = PRESETS[str(config.model.preset)](vocab_size=64, **config.model.options)
    assert isinstance(model, MemAttnConfig) and model.attention.kind == "titans"
    assert (model.hidden_size, model.num_attention_heads, model.head_dim) == (128, 3, 64)
    training = config.training
    assert (training.max_epochs, training.eval_batch_size, training.mixed_precision) == (
        *(50, 1, "fp16"),
    )
    assert (training.base_model_lr, config.data.seq_len) == (0.03, 1024)
    plain = example.parse(["--fp16", "false", "--model_dim", "64", "--heads", "1"])
    config = example.make_config(plain, "wiki")
    assert (config.model.preset, config.training.mixed_precision) == ("vanilla", "no")


def test_the_example_trains_measures_and_goes_on(example, compared, tmp_path, capsys):
    options = [
        "--dataset",
        str(compared[0] / "corpus.jsonl"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    options += ["--data_path", str(compared[0] / "data"), "--cache_dir", str(tmp_path / "cache")]
    options += ["--model_dim", "64", "--depth", "1", "--heads", "1", "--seq_length", "256"]
    options += ["--vocab_size", "300", "--batch_size", "4", "--max_epochs", "1", "--use_memory"]
    assert example.main([*options, "--mode", "evaluate"]) == 2
    assert "output_dir must have a trained model, got" in capsys.readouterr().err
    assert example.main(options) == 0
    shown = capsys.readouterr().out
    assert "wikitext-103: perplexity of a word" in shown.replace("\n", " ")
    assert example.main([*options, "--mode", "evaluate"]) == 0
    assert capsys.readouterr().out.split(":")[-1] == shown.split(":")[-1]
    if not torch.cuda.is_available():
        assert example.main([*options, "--fp16"]) == 2
        assert "fp16 must be false without CUDA, got true: give --fp16 false" in (
            capsys.readouterr().err
        )
