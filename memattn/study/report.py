"""What a finished study writes: numbers, tables and curves."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from memattn.bench.report import machine
from memattn.files import write_text
from memattn.study.config import StudyConfig
from memattn.study.results import RunResult, mean_curves, summarise
from memattn.study.tables import make_note, make_tables
from memattn.study.variants import Variant
from memattn.viz import plot_bands

Metrics = Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]


def print_report(
    console: Console, config: StudyConfig, variants: list[Variant], runs: list[RunResult]
) -> None:
    """Print the tables."""
    rows = summarise(variants, runs)
    for table in make_tables(config.compare, rows):
        console.print(table.to_rich())
    console.print(make_note(config.compare, rows), highlight=False)


def write_report(
    config: StudyConfig,
    variants: list[Variant],
    runs: list[RunResult],
    metrics: Metrics,
    facts: dict[str, Any],
) -> Path:
    """Write ``results.json``, ``results.csv``, ``curves.png`` and ``results.md``.

    Args:
        config: The study.
        variants: Its models.
        runs: What each of its runs gave.
        metrics: Rows of ``metrics.csv`` by model and seed.
        facts: The command, and the sizes of the text.

    Returns:
        Path of ``results.md``.
    """
    out = Path(config.out)
    rows = summarise(variants, runs)
    made_by = machine(config.compare.seeds[0])
    made_by.pop("seed")
    report = {
        **facts,
        "machine": made_by,
        "models": [row.to_dict() for row in rows],
        "runs": [run._asdict() for run in runs],
    }
    write_text(out / "results.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_text(out / "results.csv", _to_csv(variants, runs))
    _plot(config, variants, metrics, out / "curves.png")
    tables = "\n".join(table.to_markdown() for table in make_tables(config.compare, rows))
    text = f"{tables}\n{make_note(config.compare, rows)}\n\n{_made(report)}\n"
    write_text(out / "results.md", text)
    return out / "results.md"


def _made(report: Mapping[str, Any]) -> str:
    """How the numbers were made, as Markdown."""
    config, machine = report["config"], report["machine"]
    data, training, cpu = config["data"], config["training"], machine["cpu"]
    rows = training["batch_size"] * training["gradient_accumulation_steps"]
    tokens, n = report["runs"][0]["tokens"], len(report["runs"])
    device = machine["gpu"] or f"{cpu['name']}, {cpu['threads']} threads, {cpu['capability']}"
    minutes = sum(run["seconds"] for run in report["runs"]) / 60.0
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"Printed by `{report['command']}`: {n} runs of {training['max_steps']:,} "
        f"steps of {rows} x {data['seq_len']} tokens, {tokens:,} tokens each, from the corpus "
        f"{data['dataset_name']} ({report['train_tokens']:,} tokens to train on, "
        f"{report['held_out_tokens']:,} held out); {minutes:.1f} min of training and "
        f"evaluation on {device}; {versions}; {machine['date']}."
    )


def _to_csv(variants: list[Variant], runs: list[RunResult]) -> str:
    """One row for each run."""
    by_name = {variant.name: variant for variant in variants}
    base = {run.seed: run for run in runs if run.variant == variants[0].name}
    out = io.StringIO()
    names = ["variant", "loss_type", "future_dim", "source", "parameters", "seed", "train_loss"]
    names += ["val_loss", "future_loss", "val_loss_minus_baseline", "tokens", "seconds"]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for run in runs:
        variant = by_name[run.variant]
        own = {name: getattr(variant, name) for name in names[1:5]}
        difference = run.val_loss - base[run.seed].val_loss
        writer.writerow({**run._asdict(), **own, "val_loss_minus_baseline": difference})
    return out.getvalue()


def _plot(config: StudyConfig, variants: list[Variant], metrics: Metrics, path: Path) -> None:
    """Draw training, validation and future loss over the steps."""
    panels = {}
    for title, column in (
        ("train loss, smoothed", "lm_loss"),
        ("validation loss", "eval_loss"),
        ("future loss, held out", "eval_future_loss"),
    ):
        curves = {}
        for variant in variants:
            runs = [metrics[variant.name, seed] for seed in config.compare.seeds]
            points = mean_curves(runs, column, smooth=column == "lm_loss")
            if points:
                curves[variant.name] = points
        panels[title] = curves
    plot_bands({title: curves for title, curves in panels.items() if curves}, path)
