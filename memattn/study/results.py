"""What the runs of a study gave: means over seeds, and differences to the baseline in pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from memattn._tables import Spread
from memattn.study.variants import BASELINE, Variant
from memattn.train.metrics import read_metrics
from memattn.viz.curves import smooth_curve

LOSSES = ("train_loss", "val_loss", "future_loss")


class RunResult(NamedTuple):
    """What one finished run gave.

    ``train_loss`` is the mean cross-entropy over the last tenth of the steps, ``val_loss`` and
    ``future_loss`` are those of the held-out documents at the end.
    """

    variant: str
    seed: int
    train_loss: float
    val_loss: float
    future_loss: float | None
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Row:
    """One model over its seeds.

    Attributes:
        variant: The model.
        losses: Spread of each of ``LOSSES`` over seeds; without ``future_loss`` where there is
            none.
        differences: Spread of ``train_loss`` and ``val_loss`` minus those of the baseline with the
            same seed; empty for the baseline itself.
        lower: Seeds in which ``val_loss`` is below that of the baseline.
    """

    variant: Variant
    losses: dict[str, Spread]
    differences: dict[str, Spread]
    lower: int

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        return {
            **asdict(self.variant),
            "losses": {name: asdict(spread) for name, spread in self.losses.items()},
            "differences_to_baseline": {
                name: {**asdict(spread), "t_interval_95": spread.interval}
                for name, spread in self.differences.items()
            },
            "seeds_below_baseline": self.lower,
        }


def read_run(folder: Path, variant: str, seed: int, max_steps: int) -> RunResult:
    """What a finished run gave.

    Raises:
        ValueError: If its metrics are damaged or do not reach the last step.
    """
    rows = read_metrics(folder / "metrics.csv")
    trained = [row for row in rows if row["loss"] is not None]
    held_out = [row for row in rows if row["eval_loss"] is not None]
    if not trained or not held_out or rows[-1]["step"] != max_steps:
        raise ValueError(f"metrics must reach step {max_steps}, got {folder / 'metrics.csv'}")
    late = [row["lm_loss"] for row in trained if row["step"] > 0.9 * max_steps]
    return RunResult(
        variant=variant,
        seed=seed,
        train_loss=fmean(late),
        val_loss=held_out[-1]["eval_loss"],
        future_loss=held_out[-1].get("eval_future_loss"),
        tokens=rows[-1]["tokens"],
        seconds=rows[-1]["seconds"],
    )


def summarise(variants: Sequence[Variant], runs: Sequence[RunResult]) -> list[Row]:
    """The models in order, each over the seeds that it was trained with.

    Args:
        variants: The models, the baseline among them.
        runs: At least one for each model.
    """
    by_model = {v.name: {r.seed: r for r in runs if r.variant == v.name} for v in variants}
    base = by_model[BASELINE]
    rows = []
    for variant in variants:
        own = by_model[variant.name]
        losses = {}
        for name in LOSSES:
            values = [getattr(run, name) for run in own.values()]
            if None not in values:
                losses[name] = Spread.of(values)
        differences: dict[str, list[float]] = {}
        if variant.name != BASELINE:
            for name in ("train_loss", "val_loss"):
                differences[name] = [
                    getattr(own[seed], name) - getattr(base[seed], name)
                    for seed in own.keys() & base.keys()
                ]
        rows.append(
            Row(
                variant=variant,
                losses=losses,
                differences={name: Spread.of(values) for name, values in differences.items()},
                lower=sum(value < 0.0 for value in differences.get("val_loss", [])),
            )
        )
    return rows


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
