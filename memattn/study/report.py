"""Writes the numbers, tables and curves of a finished study."""

import csv
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from memattn._tables import Spread
from memattn.bench.report import machine
from memattn.files import replacing_file, write_text
from memattn.study.base import Study
from memattn.study.cells import Cell
from memattn.study.results import COMMON, CellRun, cross_entropy, summarise
from memattn.train.config import DEFAULT_STEPS
from memattn.viz import plot_bands
from memattn.viz.curves import smooth_curve

READING = "\n## Reading\n"
Metrics = Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]


def print_report(console: Console, study: Study, cells: list[Cell], runs: list[CellRun]) -> None:
    """Print the tables."""
    rows = summarise(cells, runs, study.baselines, study.measures)
    for table in study.tables(rows):
        console.print(table.to_rich())
    console.print(study.note(rows), highlight=False)


def write_report(
    study: Study,
    cells: list[Cell],
    runs: list[CellRun],
    metrics: Metrics,
    facts: dict[str, Any],
    page: Path | None = None,
) -> Path:
    """Write ``results.json``, ``results.csv``, ``curves.png`` and ``results.md``, and a page.

    Args:
        study: The study.
        cells: Its cells.
        runs: The results of its runs.
        metrics: Rows of ``metrics.csv`` by cell and seed.
        facts: The command, and the sizes of the text.
        page: Another Markdown file with the report, under a heading and with the curves beside it;
            what it has from its heading ``Reading`` on is kept.

    Returns:
        Path of ``results.md``.
    """
    out = Path(study.out)
    rows = summarise(cells, runs, study.baselines, study.measures)
    made_by = machine(study.seeds[0])
    made_by.pop("seed")
    made_by["versions"] |= {name: version(name) for name in study.packages}
    names = [measure.name for measure in (*COMMON, *study.measures)]
    report = {
        **facts,
        "machine": made_by,
        "models": [row.to_dict() for row in rows],
        "runs": [_record(run, names) for run in runs],
    }
    write_text(out / "results.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_text(out / "results.csv", _to_csv(study, cells, runs))
    _plot(study, cells, metrics, out / "curves.png")
    tables = "\n".join(table.to_markdown() for table in study.tables(rows))
    text = f"{tables}\n{study.note(rows)}\n\n{_made(report)}\n"
    write_text(out / "results.md", text)
    if page is not None:
        picture = page.with_suffix(".png")
        _plot(study, cells, metrics, picture)
        write_text(page, f"# {study.heading}\n\n{text}\n{_curves(picture)}\n{_reading(page)}")
    return out / "results.md"


def write_parts(study: Study, page: Path | None = None) -> Path:
    """Write ``results.md`` of a study whose parts are finished, and a page.

    Args:
        study: The study.
        page: As for ``write_report``; the curves of each part stand beside it.

    Returns:
        Path of ``results.md``.
    """
    texts, illustrated = [], []
    for name, part in study.parts().items():
        text = (Path(part.out) / "results.md").read_text(encoding="utf-8")
        texts.append(f"## {part.heading}\n\n{text}")
        if page is not None:
            picture = page.with_name(f"{page.stem}_{name}.png")
            with replacing_file(picture) as file:
                shutil.copyfile(Path(part.out) / "curves.png", file)
            illustrated.append(f"{texts[-1]}\n{_curves(picture)}\n")
    report = Path(study.out) / "results.md"
    write_text(report, "\n".join(texts))
    if page is not None:
        body = "\n".join(illustrated)
        write_text(page, f"# {study.heading}\n\n{body}{_reading(page)}")
    return report


def _curves(picture: Path) -> str:
    return f"![Losses over the steps]({picture.name})"


def _reading(page: Path) -> str:
    """The text of an earlier page from its heading ``Reading`` on."""
    if not page.is_file():
        return ""
    return "".join(page.read_text(encoding="utf-8").partition(READING)[1:])


def _record(run: CellRun, names: Sequence[str]) -> dict[str, Any]:
    """A run as plain values; None where it has no such loss."""
    losses = {name: run.losses.get(name) for name in names}
    own = {"tokens": run.tokens, "seconds": run.seconds}
    return {"variant": run.variant, "seed": run.seed, **losses, **own}


def _made(report: Mapping[str, Any]) -> str:
    """The command and the settings behind the numbers, as Markdown."""
    config, machine = report["config"], report["machine"]
    data, training, cpu = config["data"], config["training"], machine["cpu"]
    rows = training["batch_size"] * training["gradient_accumulation_steps"]
    tokens, n = report["runs"][0]["tokens"], len(report["runs"])
    device = machine["gpu"] or f"{cpu['name']}, {cpu['threads']} threads, {cpu['capability']}"
    minutes = sum(run["seconds"] for run in report["runs"]) / 60.0
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"Printed by `{report['command']}`: {n} runs of {training['max_steps'] or DEFAULT_STEPS:,} "
        f"steps of {rows} x {data['seq_len']} tokens, {tokens:,} tokens each, from {_source(data)} "
        f"({report['train_tokens']:,} tokens to train on, "
        f"{report['held_out_tokens']:,} held out); {minutes:.1f} min of training and "
        f"evaluation on {device}; {versions}; {machine['date']}."
    )


def _source(data: Mapping[str, Any]) -> str:
    """The source of the tokens."""
    if data["task"] is None:
        return f"the corpus {data['dataset_name']}"
    options = ", ".join(f"{name} {value}" for name, value in data["task"]["options"].items())
    return f"the task {data['task']['name']}" + (f" with {options}" if options else "")


def _to_csv(study: Study, cells: list[Cell], runs: list[CellRun]) -> str:
    """One row for each run."""
    by_name = {cell.name: cell for cell in cells}
    by_run = {(run.variant, run.seed): run.losses for run in runs}
    labels = list(dict.fromkeys(name for cell in cells for name in cell.labels))
    counts = list(dict.fromkeys(name for cell in cells for name in cell.counts))
    losses = [measure.name for measure in (*COMMON, *study.measures)]
    minus = [f"val_loss_minus_{name}" for name in study.baselines]
    out = io.StringIO()
    columns = ["variant", *labels, *counts, "seed", *losses, *minus, "tokens", "seconds"]
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for run in runs:
        cell = by_name[run.variant]
        row = {**cell.labels, **cell.counts, **_record(run, losses)}
        for column, name in zip(minus, study.baselines, strict=True):
            base = by_name[name].fixed or by_run[name, run.seed]
            row[column] = run.losses["val_loss"] - base["val_loss"]
        writer.writerow(row)
    return out.getvalue()


def _plot(study: Study, cells: list[Cell], metrics: Metrics, path: Path) -> None:
    """Draw the train loss and what is measured of held-out documents over the steps."""
    columns = {"train loss, smoothed": "lm_loss", "validation loss": "eval_loss"}
    columns |= {f"{m.head}, held out": m.column for m in study.measures if m.column is not None}
    panels = {}
    for title, column in columns.items():
        curves = {}
        for cell in cells:
            runs = [metrics[cell.name, seed] for seed in study.seeds if cell.fixed is None]
            if column == "lm_loss":
                runs = [
                    [{**row, column: cross_entropy(row)} for row in rows if row["loss"] is not None]
                    for rows in runs
                ]
            points = mean_curves(runs, column, smooth=column == "lm_loss")
            if points:
                curves[cell.name] = points
        panels[title] = curves
    plot_bands({title: curves for title, curves in panels.items() if curves}, path)


def mean_curves(
    runs: Sequence[Sequence[Mapping[str, Any]]], column: str, *, smooth: bool = False
) -> list[tuple[float, float, float]]:
    """A column of ``metrics.csv`` over the seeds: step, mean and standard deviation.

    Args:
        runs: Rows of the metrics of each seed.
        column: Name of the column. Rows without it are left out.
        smooth: Whether each seed's values are smoothed first.

    Returns:
        The points at the steps that all seeds have.
    """
    values: dict[float, list[float]] = {}
    for rows in runs:
        points = [(row["step"], row[column]) for row in rows if row.get(column) is not None]
        for step, value in smooth_curve(points) if smooth else points:
            values.setdefault(step, []).append(value)
    spreads = {s: Spread.of(v) for s, v in sorted(values.items()) if len(v) == len(runs)}
    return [(step, spread.mean, spread.sd or 0.0) for step, spread in spreads.items()]
