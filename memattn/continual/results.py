"""Results of a benchmark of strategies: one file per run, means over seeds, and a table."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memattn._settings import check_same_settings
from memattn._tables import Spread, Table
from memattn.checks import must
from memattn.dtgma.metrics import continual_metrics
from memattn.files import write_text

# columns of the table; avg_forgetting_from_first is minus the backward transfer, so not shown
PERCENT = (
    "avg_accuracy",
    "learning_accuracy",
    "avg_forgetting",
    "backward_transfer",
    "forward_transfer",
    "gain_over_separate",
)
_HEADS = {
    "avg_accuracy": "accuracy",
    "learning_accuracy": "when learned",
    "avg_forgetting": "forgetting",
    "backward_transfer": "backward",
    "forward_transfer": "forward",
    "gain_over_separate": "over separate",
}


@dataclass(frozen=True)
class StrategyRun:
    """The result of one strategy with one seed.

    Attributes:
        strategy: Its name.
        seed: Its seed.
        accuracy: Row ``i``: accuracy on each task after training on task ``i``; None where it was
            not measured.
        untrained: Accuracy on each task before any training; None where each task has its own head,
            since the head of a task that was not learned is random.
        parameters: Count of values needed to predict all tasks.
        stored: Count of values kept for prediction and for further training, without stored
            samples.
        buffer: Count of values in stored samples.
        seconds: Time of training.
    """

    strategy: str
    seed: int
    accuracy: list[list[float | None]]
    untrained: list[float] | None
    parameters: int
    stored: int
    buffer: int
    seconds: float

    @property
    def matrix(self) -> Tensor:
        """Accuracies, float64 ``[n, n]``, with NaN where they were not measured."""
        rows = [[float("nan") if a is None else a for a in row] for row in self.accuracy]
        return torch.tensor(rows, dtype=torch.float64)

    def metrics(self) -> dict[str, float]:
        """Metrics of the accuracies, see ``continual_metrics``."""
        untrained = self.untrained
        start = None if untrained is None else torch.tensor(untrained, dtype=torch.float64)
        return continual_metrics(self.matrix, start)


@dataclass(frozen=True)
class StrategySummary:
    """A strategy over its seeds: mean and spread of its metrics, counts and time."""

    strategy: str
    metrics: dict[str, Spread]
    parameters: Spread
    stored: Spread
    buffer: Spread
    seconds: Spread


@dataclass(frozen=True)
class BenchmarkResults:
    """All finished runs of a benchmark.

    Attributes:
        stream: Name of the stream.
        scenario: Its scenario.
        tasks: Names of its tasks, those of the first seed.
        runs: The runs, in the order of strategies and seeds.
    """

    stream: str
    scenario: str
    tasks: tuple[str, ...]
    runs: tuple[StrategyRun, ...]

    def summarise(self) -> list[StrategySummary]:
        """Mean and spread of each strategy over its seeds.

        Where separate networks are among the strategies, ``gain_over_separate`` is the mean over
        all tasks but the first of the accuracy when learned, minus that of a separate network with
        the same seed. It is positive where earlier tasks helped.
        """
        separate = {r.seed: r.matrix.diagonal() for r in self.runs if r.strategy == "separate"}
        rows = []
        for strategy in dict.fromkeys(run.strategy for run in self.runs):
            own = [run for run in self.runs if run.strategy == strategy]
            values: dict[str, list[float]] = {}
            for run in own:
                metrics = run.metrics()
                alone = separate.get(run.seed)
                if alone is not None and len(alone) > 1:
                    gain = (run.matrix.diagonal() - alone)[1:].mean()
                    metrics["gain_over_separate"] = float(gain)
                for name, value in metrics.items():
                    values.setdefault(name, []).append(value)
            counts = {
                name: Spread.of([getattr(run, name) for run in own])
                for name in ("parameters", "stored", "buffer", "seconds")
            }
            rows.append(
                StrategySummary(strategy, {n: Spread.of(v) for n, v in values.items()}, **counts)
            )
        return rows

    def matrices(self) -> dict[str, Tensor]:
        """Accuracies of each strategy, ``[n, n]``, the mean over its seeds."""
        found: dict[str, list[Tensor]] = {}
        for run in self.runs:
            found.setdefault(run.strategy, []).append(run.matrix)
        return {strategy: torch.stack(m).mean(0) for strategy, m in found.items()}

    def table(self) -> Table:
        """Percent and counts, mean ± standard deviation over seeds."""
        rows = self.summarise()
        shown = [name for name in PERCENT if any(name in row.metrics for row in rows)]
        heads = [_HEADS[name] for name in shown]
        seeds = len({run.seed for run in self.runs})
        title = (
            f"{self.stream}, {len(self.tasks)} tasks, {self.scenario}-incremental, "
            f"{'one seed' if seeds == 1 else f'{seeds} seeds'}, %"
        )
        cells = []
        for row in rows:
            spreads = [row.metrics.get(name) for name in shown]
            counts = (row.parameters, row.stored, row.buffer)
            cells.append(
                (
                    row.strategy,
                    *("-" if spread is None else _percent(spread) for spread in spreads),
                    *(f"{round(spread.mean):,}" for spread in counts),
                    f"{row.seconds.mean:.1f}",
                )
            )
        counted = ("parameters", "stored", "samples", "seconds")
        return Table(title, ("strategy", *heads, *counted), cells)

    def to_dict(self) -> dict[str, Any]:
        """Runs and rows as plain values, for JSON."""
        rows = []
        for row in self.summarise():
            metrics = {name: asdict(spread) for name, spread in row.metrics.items()}
            rows.append({**asdict(row), "metrics": metrics})
        return {
            "stream": self.stream,
            "scenario": self.scenario,
            "tasks": list(self.tasks),
            "strategies": rows,
            "runs": [asdict(run) for run in self.runs],
        }


def write_run(file: Path, settings: Mapping[str, Any], result: StrategyRun) -> None:
    """Write the file of a finished run, which appears once it is whole."""
    content = {"settings": settings, "result": asdict(result)}
    write_text(file, json.dumps(content, indent=1, allow_nan=False) + "\n")


def run_file(folder: str | Path, strategy: str, seed: int) -> Path:
    """Where a finished run is kept."""
    return Path(folder) / strategy / f"seed-{seed}.json"


def read_run(file: Path, settings: Mapping[str, Any], n_tasks: int) -> StrategyRun:
    """Read the result of a finished run.

    Args:
        file: Its file.
        settings: Settings that the run must have had.
        n_tasks: Number of tasks of the stream.

    Raises:
        ValueError: If the file is damaged, or the run had other settings.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        before, result = dict(content["settings"]), StrategyRun(**content["result"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        must(str(file), "be the result of a run", f"{type(error).__name__}: {error}")
    check_same_settings("folder", file, before, settings)
    try:
        shape = list(result.matrix.shape)
        result.metrics()
    except (ValueError, TypeError) as error:
        must(str(file), "be the result of a run", f"{type(error).__name__}: {error}")
    if shape != [n_tasks, n_tasks]:
        must(str(file), f"have accuracies [{n_tasks}, {n_tasks}]", shape)
    return result


def _percent(spread: Spread) -> str:
    sd = None if spread.sd is None else 100.0 * spread.sd
    # + 0.0: no minus before a zero
    return Spread(round(100.0 * spread.mean, 1) + 0.0, sd, spread.n).text(".1f")
