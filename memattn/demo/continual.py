"""DTG-MA's part of the demo: five tasks of digits one after the other, beside plain fine-tuning."""

import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from memattn.continual import Stream, digits_stream
from memattn.continual.run import run_strategy
from memattn.continual.strategies import Budget, Strategy, make_strategy
from memattn.files import write_json

CONTINUAL = "continual.json"
STRATEGIES = ("dtgma", "finetuning")
BUDGET = Budget(epochs=15)
HEADS = ("strategy", "accuracy", "forgetting", "parameters", "seconds", "earlier tasks' logits")


def has_digits() -> bool:
    """Whether scikit-learn is here, whose digits these are."""
    return find_spec("sklearn") is not None


def measure_continual(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Train both on the same stream, unless that was done."""
    file = folder / CONTINUAL
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    stream = digits_stream(seed=seed)
    results = [_run(make_strategy(name, stream, BUDGET, seed), stream) for name in STRATEGIES]
    write_json(file, results)
    return results


def _run(strategy: Strategy, stream: Stream) -> dict[str, Any]:
    """Train, and compare the logits of each task at the end with those when it was learned."""
    kept: list[Tensor] = []

    def keep() -> None:
        kept.append(strategy.predict(len(kept), stream.tasks[len(kept)].test_x))

    run = run_strategy(strategy, stream, keep)
    now = [strategy.predict(i, task.test_x) for i, task in enumerate(stream.tasks)]
    change = max((a - b).abs().max().item() for a, b in zip(now, kept, strict=True))
    return {**asdict(run), **run.metrics(), "largest_change": change}


def continual_rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of the comparison, as text."""
    return [
        (
            result["strategy"],
            f"{100 * result['avg_accuracy']:.1f} %",
            f"{100 * result['avg_forgetting']:.1f} %",
            f"{result['parameters'] / 1e6:.2f} M",
            f"{result['seconds']:.1f}",
            "unchanged" if _is_unchanged(result) else f"changed by {result['largest_change']:.2g}",
        )
        for result in results
    ]


def _is_unchanged(result: dict[str, Any]) -> bool:
    return result["largest_change"] == 0.0


def continual_table(results: list[dict[str, Any]]) -> Table:
    """One row for each strategy."""
    tasks = len(results[0]["accuracy"])
    table = Table(title=f"digits in {tasks} tasks, {BUDGET.epochs} epochs each")
    for name in HEADS:
        table.add_column(name, justify="left" if name in (HEADS[0], HEADS[-1]) else "right")
    for result, cells in zip(results, continual_rows(results), strict=True):
        style = "green" if _is_unchanged(result) else "yellow"
        table.add_row(*cells[:-1], f"[{style}]{cells[-1]}[/]")
    return table
