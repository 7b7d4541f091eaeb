"""The study of future attention: equal parameters, pairs, tables, and nothing done twice."""

import csv
import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console
from train_factories import write_corpus

from memattn.cli import main
from memattn.models import PRESETS, MemAttnForCausalLM
from memattn.study import Cell, FutureCompare, FutureStudy, load_study, run_study
from memattn.study import run as study_run
from memattn.study.future import AXES
from memattn.study.report import mean_curves
from memattn.study.results import CellRun, Spread, summarise
from memattn.study.run import plan_runs
from memattn.train import DataConfig, ModelConfig, TrainingConfig, loop
from memattn.train.metrics import MetricsLog
from memattn.viz import plot_bands

CONFIGS = Path(__file__).parent.parent / "configs"


def tiny(folder: Path, **changes) -> FutureStudy:
    """A study of two models with two seeds, whose runs take a second."""
    corpus = folder.parent / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus)
    options = dict(
        out=str(folder),
        compare=FutureCompare(
            loss_types=["cosine"], future_dims=[3], sources=["table"], seeds=[0, 1]
        ),
        sizes=dict(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=40,
            max_position_embeddings=16,
        ),
        data=DataConfig(
            dataset_name=str(corpus),
            tokenizer="bytes",
            held_out=0.1,
            seq_len=16,
            cache_dir=str(folder.parent / "cache"),
        ),
        training=TrainingConfig(
            max_steps=4, batch_size=2, warmup_steps=1, eval_steps=2, save_steps=None, cpu=True
        ),
    )
    return FutureStudy(**{**options, **changes})


def study(config: FutureStudy, **options) -> tuple[Path | None, str]:
    """Run a study; the path of its report and what it printed."""
    with (Path(config.out).parent / "log.txt").open("w+") as file:
        report = run_study(config, console=Console(file=file, width=200), **options)
        file.seek(0)
        return report, file.read()


def losses(folder: Path) -> list[dict]:
    """Rows of ``results.csv`` without what depends on the clock."""
    with (folder / "results.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that nothing interrupted, the batches of its steps, and what it printed."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    batches = []

    def count_and_keep(accelerator, micro, **options):
        batches.append(torch.cat([batch["input_ids"].flatten() for batch in micro]))
        return count(accelerator, micro, **options)

    count = loop.count_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "count_batches", count_and_keep)
        report, text = study(tiny(folder), command="memattn study future")
    assert report == folder / "results.md"
    return folder, batches, text


def test_models_of_one_seed_see_the_same_text_in_the_same_order(whole):
    _, batches, _ = whole
    assert len(batches) == 4 * 4
    seed_0, model_0, seed_1, model_1 = (torch.stack(batches[i : i + 4]) for i in range(0, 16, 4))
    assert torch.equal(seed_0, model_0) and torch.equal(seed_1, model_1)
    assert not torch.equal(seed_0, seed_1)


def test_results_are_those_of_the_runs(whole):
    folder, _, text = whole
    rows = losses(folder)
    names = ["baseline", "cosine-3-table"]
    assert [(r["variant"], r["seed"]) for r in rows] == [(n, s) for s in "01" for n in names]
    report = json.loads((folder / "results.json").read_text())
    for row in rows:
        with (folder / row["variant"] / f"seed-{row['seed']}" / "metrics.csv").open() as file:
            metrics = list(csv.DictReader(file))
        assert row["val_loss"] == metrics[-1]["eval_loss"]
        assert row["future_loss"] == metrics[-1].get("eval_future_loss", "")
        assert row["train_loss"] == metrics[-2]["lm_loss"]  # the last of four steps
        assert (row["future_loss"] == "") == (row["variant"] == "baseline")
    differences = [float(r["val_loss_minus_baseline"]) for r in rows if r["variant"] != "baseline"]
    model = report["models"][1]
    assert model["name"] == "cosine-3-table"
    found = model["differences_to_baseline"]["val_loss"]
    assert found["mean"] == pytest.approx(sum(differences) / 2, abs=1e-12)
    assert model["parameters"] == int(rows[1]["parameters"])
    markdown = (folder / "results.md").read_text()
    assert "`memattn study future`: 4 runs of 4 steps of 2 x 16 tokens, 128 tokens" in markdown
    assert f"torch {torch.__version__}" in markdown and f"{found['mean']:+.4f}" in markdown
    assert "run 4 of 4: cosine-3-table, seed 1, " in text and f"{found['mean']:+.4f}" in text
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_and_interrupted_study_has_the_results_of_a_whole_one(
    whole, tmp_path, monkeypatch
):
    def write_and_signal(self, **row):
        write(self, **row)
        if row["step"] == 3 and row.get("loss") is not None:
            os.kill(os.getpid(), signal.SIGINT)

    write = MetricsLog.write
    config = tiny(tmp_path / "study")
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", write_and_signal)
        with pytest.raises(KeyboardInterrupt, match="in baseline, seed 0; the same command goes"):
            study(config)
    with monkeypatch.context() as patch:
        patch.setattr(study_run, "_train", limit(study_run._train))
        report, text = study(config, max_minutes=10.0)
    assert report is None and "1 of 4 runs are finished, " in text
    report, text = study(config, max_minutes=10.0)
    assert report is not None and "run 1 of 4" not in text and "run 2 of 4" in text
    assert losses(report.parent) == losses(whole[0])


def limit(train):
    """Enough time for a run that was begun, and time for one step of a new one."""

    def run(config, study_run, seconds, console):
        return train(config, study_run, 600.0 if study_run.folder.exists() else 0.0, console)

    return run


def test_finished_runs_are_not_repeated_and_other_ones_not_mixed(whole, tmp_path, monkeypatch):
    folder = tmp_path / "study"
    shutil.copytree(whole[0], folder)
    before = losses(folder)
    config = dataclasses.replace(tiny(whole[0]), out=str(folder))
    monkeypatch.setattr(study_run, "train", None)  # would raise TypeError
    report, text = study(config)
    assert report is not None and "run " not in text and losses(folder) == before
    # more seeds are another study of the same runs
    more = dataclasses.replace(config.compare, seeds=[1])
    assert study(dataclasses.replace(config, compare=more))[0] is not None
    assert [row["seed"] for row in losses(folder)] == ["1", "1"]
    longer = dataclasses.replace(config.training, max_steps=5)
    match = r"out must be a new folder for training.max_steps 5, got .* with training.max_steps 4"
    with pytest.raises(ValueError, match=match):
        study(dataclasses.replace(config, training=longer))


def test_the_command_reads_a_file_and_flags(tmp_path, capsys):
    config = tiny(tmp_path / "study")
    (tmp_path / "study.yaml").write_text(config.to_yaml())
    assert load_study("future", tmp_path / "study.yaml") == config
    command = [
        "study",
        "future",
        "--config",
        str(tmp_path / "study.yaml"),
        "--compare.seeds",
        "[3]",
    ]
    assert main([*command, "--max_minutes", "1e-9"]) == 0
    assert "0 of 2 runs are finished; the same command goes on" in capsys.readouterr().out
    assert main([*command, "--max_minutes", "0"]) == 2
    assert "max_minutes must be above 0, got 0.0" in capsys.readouterr().err
    assert main([*command, "--sizes.hidden", "3"]) == 2
    assert "hidden must be a field of MemAttnConfig" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["future_small", "future_seed"])
def test_shipped_files_have_their_own_folder_and_are_described(name):
    assert load_study("future", CONFIGS / f"{name}.yaml").out == f"runs/{name}"
    assert f"`{name}.yaml`" in (CONFIGS / "README.md").read_text()


def test_the_small_configuration_is_the_default():
    assert load_study("future", CONFIGS / "future_small.yaml") == FutureStudy()
    names = [cell.name for cell in FutureStudy().plan(2048)]
    assert names[:4] == ["baseline", "cosine-127-table", "mse-127-table", "none-127-table"]
    assert names[4:6] == ["cosine-16-table", "cosine-64-table"]
    assert names[6:] == ["cosine-127-relative", "cosine-127-computed"]


def test_the_published_model_has_the_published_number_of_parameters():
    config = load_study("future", CONFIGS / "future_seed.yaml")
    cells = config.plan(50257)
    assert [cell.counts["parameters"] for cell in cells] == [15_846_048] * 7
    for cell in cells[1:]:
        assert cell.model.options["intermediate_size"] == 576
    with torch.device("meta"):
        model = MemAttnForCausalLM(PRESETS["future"](**cells[1].model.options))
    assert sum(p.numel() for p in model.parameters()) == 15_846_048
    run = plan_runs(config, cells)[1].config
    training, rows = (
        run.training,
        run.training.batch_size * run.training.gradient_accumulation_steps,
    )
    assert (training.max_steps, rows, run.data.seq_len) == (9000, 800, 200)


@pytest.mark.parametrize("equal_to", ["baseline", "future"])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_parameters_are_as_equal_as_the_width_allows(equal_to, mlp):
    compare = FutureCompare(
        loss_types=["mse", "none"],
        future_dims=[5, 9],
        sources=["relative", "table", "computed"],
        full=True,
        equal_to=equal_to,
        seeds=[0],
    )
    sizes = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, mlp=mlp)
    sizes |= dict(max_position_embeddings=30, position_embedding="learned", intermediate_size=90)
    config = FutureStudy(compare=compare, sizes=sizes, future_options={"source_rank": 2})
    cells = config.plan(100)
    assert len(cells) == 1 + 2 * 2 * 3 == len({cell.name for cell in cells})
    reference = cells[0 if equal_to == "baseline" else 1]
    assert reference.model.options["intermediate_size"] == 90
    unit = 2 * 12 * (2 if mlp == "gelu" else 3)  # parameters of one more feature in each MLP
    for cell in cells:
        preset, options = PRESETS[cell.model.preset], cell.model.options
        model = MemAttnForCausalLM(preset(vocab_size=100, **options))
        assert sum(p.numel() for p in model.parameters()) == cell.counts["parameters"]
        assert abs(cell.counts["parameters"] - reference.counts["parameters"]) <= unit / 2
    unmeasured = [cell.model.options for cell in cells if cell.labels["loss_type"] == "none"]
    assert len(unmeasured) == 6
    for options in unmeasured:
        assert options["loss_coefficient"] == 0.0
        assert options["loss_type"] == "mse"


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="sizes must leave cosine-127-table room for an MLP at"):
        FutureStudy(sizes={**FutureStudy().sizes, "intermediate_size": 9}).plan(300)
    with pytest.raises(ValueError, match="sizes.vocab_size must be at least the tokenizer's 300"):
        FutureStudy(sizes={**FutureStudy().sizes, "vocab_size": 9}).plan(300)
    with pytest.raises(ValueError, match=r"compare.seeds must have at least one .*, got \[1, 1\]"):
        FutureCompare(seeds=[1, 1])
    with pytest.raises(ValueError, match="compare.sources must have entries of table, .*, got 'x'"):
        FutureCompare(sources=["x"])
    with pytest.raises(ValueError, match="compare.future_dims must be at least 1, got 0"):
        FutureCompare(future_dims=[0])
    with pytest.raises(ValueError, match="compare.equal_to must be one of baseline, future, got"):
        FutureCompare(equal_to="x")
    with pytest.raises(ValueError, match="future_options.source must be given as compare.sources"):
        FutureStudy(future_options={"source": "table"})
    with pytest.raises(ValueError, match="training.seed must be left to the study, got 3"):
        FutureStudy(training=TrainingConfig(seed=3))
    with pytest.raises(ValueError, match="data.held_out must be above 0 for a study, got 0.0"):
        FutureStudy(data=DataConfig(held_out=0.0))


def made(*cells: tuple) -> list[Cell]:
    """Models of a name, loss, future_dim and source each."""
    model = ModelConfig(preset="vanilla")
    return [
        Cell(
            name=name,
            model=model,
            labels=dict(zip(AXES, labels, strict=True)),
            counts={"parameters": 1234},
        )
        for name, *labels in cells
    ]


def result(cell: str, seed: int, train_loss: float, val_loss: float, future_loss: float | None):
    losses = {"train_loss": train_loss, "val_loss": val_loss}
    if future_loss is not None:
        losses["future_loss"] = future_loss
    return CellRun(cell, seed, losses, 10, 1.0)


def summary(cells: list[Cell], runs: list[CellRun]):
    return summarise(cells, runs, FutureStudy.baselines, FutureStudy.measures)


CELLS = made(("baseline", None, None, None), ("a", "mse", 4, "table"), ("b", "cosine", 4, "table"))
RUNS = [
    result("baseline", 0, 3.0, 4.0, None),
    result("baseline", 1, 3.2, 4.4, None),
    result("baseline", 2, 3.4, 4.5, None),
    result("a", 0, 2.9, 3.9, 0.25),  # -0.1
    result("a", 1, 3.2, 4.2, 0.50),  # -0.2
    result("a", 2, 3.5, 4.7, 0.75),  # +0.2
    *(result("b", seed, 3.0, 5.0, 0.125) for seed in (0, 1, 2)),
]


def test_spread_and_interval():
    spread = Spread.of([1.0, 2.0, 3.0])
    assert (spread.mean, spread.sd, spread.n) == (2.0, 1.0, 3)
    low, high = spread.interval
    t = math.sqrt(2 * 0.95**2 / (1 - 0.95**2))  # 95 % of Student's t with 2 degrees of freedom
    assert (low + high) / 2 == 2.0
    assert (high - low) / 2 == pytest.approx(t / math.sqrt(3), rel=1e-4)
    assert Spread.of([5.0]).sd is None and Spread.of([5.0]).interval is None


def test_tables_from_known_numbers():
    compare = FutureCompare(loss_types=["mse", "cosine"], future_dims=[4], sources=["table"])
    rows = summary(CELLS, RUNS)
    study = FutureStudy(compare=compare)
    by_loss, everything = study.tables(rows)
    assert by_loss.title == "By loss_type (future_dim 4, source table)"
    assert by_loss.rows == [
        ("mse", "3.2000 ± 0.3000", "4.2667 ± 0.4041", "0.5000 ± 0.2500"),
        ("cosine", "3.0000 ± 0.0000", "5.0000 ± 0.0000", "0.1250 ± 0.0000"),
    ]
    assert everything.rows[0][2:] == ("3.2000 ± 0.2000", "4.3000 ± 0.2646", "-", "-", "-")
    # -0.1, -0.2 and 0.2; the interval is 4.303 / sqrt(3) deviations to each side
    assert everything.rows[1][5:] == ("-0.0333 ± 0.2082 [-0.5505, +0.4838]", "2 of 3")
    assert everything.rows[2][6] == "0 of 3"
    assert rows[1].differences["baseline"]["train_loss"].mean == pytest.approx(0.0, abs=1e-12)
    lines = by_loss.to_markdown().splitlines()
    assert lines[3] == "|---|---:|---:|---:|" and lines[4].startswith("| mse | 3.2000 ± 0.3000 |")
    compare = FutureCompare(loss_types=["mse"], future_dims=[4, 2], sources=["table"])
    smaller = made(("c", "mse", 2, "table"))
    runs = [result("c", 0, 1.0, 2.0, 0.5), *RUNS]
    by_dim, _ = FutureStudy(compare=compare).tables(summary([*CELLS, *smaller], runs))
    assert by_dim.title == "By future_dim (loss_type mse, source table)"
    assert [row[:2] for row in by_dim.rows] == [("2", "1.0000"), ("4", "3.2000 ± 0.3000")]
    note = study.note(rows)
    assert "over 3 seeds" in note and "measured as mse" in note


def test_one_seed_has_no_deviation():
    rows = summary(CELLS, [run for run in RUNS if run.seed == 1])
    compare = FutureCompare(loss_types=["mse"], future_dims=[4], sources=["table"])
    (everything,) = FutureStudy(compare=compare).tables(rows)
    assert everything.rows[1][2:] == ("3.2000", "4.2000", "0.5000", "-0.2000", "1 of 1")


def test_curves_are_means_over_seeds(tmp_path):
    runs = [
        [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 3.0}, {"step": 2, "loss": None}],
        [{"step": 1, "loss": 2.0}, {"step": 3, "loss": 9.0}],
    ]
    assert mean_curves(runs, "loss") == [(1, 1.5, math.sqrt(0.5))]
    assert mean_curves([runs[0]], "loss") == [(1, 1.0, 0.0), (2, 3.0, 0.0)]
    # the running mean forgets all but the last twentieth
    assert mean_curves([runs[0]], "loss", smooth=True) == [(1, 1.0, 0.0), (2, 3.0, 0.0)]
    curves = {"loss": {"a": mean_curves(runs, "loss"), "b": mean_curves([runs[0]], "loss")}}
    plot_bands(curves, tmp_path / "bands.svg")
    assert "<svg" in (tmp_path / "bands.svg").read_text()
    with pytest.raises(ValueError, match="panels must have curves to draw, got none"):
        plot_bands({}, tmp_path / "x.png")
