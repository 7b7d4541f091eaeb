"""The results of a study: means over seeds, and paired differences to the baselines."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from memattn._tables import Spread
from memattn.study.cells import Cell, Measure
from memattn.train.metrics import read_metrics

# what every study measures: cross-entropy over the last tenth of the steps, and of the held-out
# documents at the end
COMMON = (Measure("train_loss", "train loss"), Measure("val_loss", "validation loss", "eval_loss"))


MEASURES = "measures.json"  # in the folder of a run: what its study has measured itself


class CellRun(NamedTuple):
    """The results of one finished run: its losses by the names of the measures that it has."""

    variant: str
    seed: int
    losses: Mapping[str, float]
    tokens: int
    seconds: float


@dataclass(frozen=True)
class CellSummary:
    """One cell over its seeds.

    Attributes:
        cell: The cell.
        losses: Spread over seeds of each measure that all of its runs have.
        differences: By baseline, the spread of each compared measure minus that of the baseline
            with the same seed; empty for the baseline itself.
        lower: By baseline, the seeds in which ``val_loss`` is below that of the baseline.
    """

    cell: Cell
    losses: dict[str, Spread]
    differences: dict[str, dict[str, Spread]]
    lower: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        values = self.cell.to_dict()
        values["losses"] = {name: asdict(spread) for name, spread in self.losses.items()}
        for baseline, spreads in self.differences.items():
            values[f"differences_to_{baseline}"] = {
                name: {**asdict(spread), "t_interval_95": spread.interval}
                for name, spread in spreads.items()
            }
            values[f"seeds_below_{baseline}"] = self.lower[baseline]
        return values


def read_run(
    folder: Path, cell: str, seed: int, max_steps: int, measures: Sequence[Measure] = ()
) -> CellRun:
    """The results of a finished run.

    Args:
        folder: Its folder.
        cell: Name of its cell.
        seed: Its seed.
        max_steps: The step at which it must have ended.
        measures: What is read from its held-out evaluations beside the losses of every study.

    Raises:
        ValueError: If its metrics are damaged or do not reach the last step.
    """
    rows = read_metrics(folder / "metrics.csv")
    trained = [row for row in rows if row["loss"] is not None]
    held_out = [row for row in rows if row["eval_loss"] is not None]
    if not trained or not held_out or rows[-1]["step"] != max_steps:
        raise ValueError(f"metrics must reach step {max_steps}, got {folder / 'metrics.csv'}")
    late = [row for row in trained if row["step"] > 0.9 * max_steps]
    losses = {"train_loss": fmean(cross_entropy(row) for row in late)}
    for measure in (*COMMON, *measures):
        value = held_out[-1].get(measure.column) if measure.column is not None else None
        if value is not None:
            losses[measure.name] = value
    if (folder / MEASURES).is_file():
        losses |= json.loads((folder / MEASURES).read_text(encoding="utf-8"))
    return CellRun(cell, seed, losses, rows[-1]["tokens"], rows[-1]["seconds"])


def cross_entropy(row: Mapping[str, Any]) -> float:
    """The cross-entropy of a row of training metrics; without other losses it is the loss."""
    return row["loss"] if row.get("lm_loss") is None else row["lm_loss"]


def summarise(
    cells: Sequence[Cell],
    runs: Sequence[CellRun],
    baselines: Sequence[str],
    measures: Sequence[Measure] = (),
) -> list[CellSummary]:
    """The cells in order, each over the seeds that it was trained with.

    Args:
        cells: The cells, the baselines among them.
        runs: At least one for each cell that is trained.
        baselines: Names of the cells that the others are compared with.
        measures: What is measured beside the losses of every study.
    """
    seeds = list(dict.fromkeys(run.seed for run in runs))
    values = {
        cell.name: {run.seed: run.losses for run in runs if run.variant == cell.name}
        if cell.fixed is None
        else dict.fromkeys(seeds, cell.fixed)
        for cell in cells
    }
    names = [measure.name for measure in (*COMMON, *measures)]
    compared = [measure.name for measure in (*COMMON, *measures) if measure.compared]
    rows = []
    for cell in cells:
        own = values[cell.name]
        losses = {
            # what is not trained has one value
            name: Spread.of(
                [of_seed[name] for of_seed in own.values()][: 1 if cell.fixed else None]
            )
            for name in names
            if all(name in of_seed for of_seed in own.values())
        }
        differences, lower = {}, {}
        for baseline in baselines:
            base = values[baseline]
            pairs = [(own[s], base[s]) for s in own if s in base and cell.name != baseline]
            minus = {
                name: [a[name] - b[name] for a, b in pairs]
                for name in compared
                if pairs and all(name in a and name in b for a, b in pairs)
            }
            differences[baseline] = {name: Spread.of(gaps) for name, gaps in minus.items()}
            lower[baseline] = sum(gap < 0.0 for gap in minus.get("val_loss", []))
        rows.append(CellSummary(cell, losses, differences, lower))
    return rows
