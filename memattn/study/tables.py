"""The tables of a study, for the terminal and as Markdown."""

from collections.abc import Sequence
from typing import Any

from memattn._tables import Spread, Table
from memattn.study.config import CompareConfig
from memattn.study.results import LOSSES, Row
from memattn.study.variants import BASELINE

LOSS_HEADS = ("train loss", "validation loss", "future loss")
NOTE = (
    "Mean ± standard deviation over {seeds}, nats per token. Train loss: cross-entropy over "
    "the last tenth of the steps. Validation and future loss: held-out documents, at the end; "
    "future losses of different types do not compare, and `none` is measured as {measured} without "
    "being trained on. Differences: validation loss minus that of the baseline with the same seed, "
    "which has the same text in the same order; in brackets the 95 % t interval of their mean."
)


def make_tables(compare: CompareConfig, rows: Sequence[Row]) -> list[Table]:
    """By loss type, by future_dim, by source, and all against the baseline.

    Args:
        compare: What was compared. A list with one entry has no table of its own.
        rows: The models over their seeds, the baseline first.
    """
    lists: dict[str, list[Any]] = {
        "loss_type": compare.loss_types,
        "future_dim": sorted(compare.future_dims),
        "source": compare.sources,
    }
    centre = {
        "loss_type": compare.loss_types[0],
        "future_dim": compare.future_dims[0],
        "source": compare.sources[0],
    }
    tables = []
    for name, values in lists.items():
        others = {other: value for other, value in centre.items() if other != name}
        picked = [
            row
            for value in values
            for row in rows
            if all(getattr(row.variant, o) == v for o, v in {**others, name: value}.items())
        ]
        if len(values) > 1:
            fixed = ", ".join(f"{other} {value}" for other, value in others.items())
            cells = [(str(getattr(row.variant, name)), *_losses(row)) for row in picked]
            tables.append(Table(f"By {name} ({fixed})", (name, *LOSS_HEADS), cells))
    heads = ("model", "parameters", *LOSS_HEADS, "validation loss - baseline", "seeds below it")
    cells = [
        (row.variant.name, f"{row.variant.parameters:,}", *_losses(row), *_difference(row))
        for row in rows
    ]
    return [*tables, Table("All models at equal parameters", heads, cells)]


def make_note(compare: CompareConfig, rows: Sequence[Row]) -> str:
    """What the numbers of the tables mean."""
    measured = next((t for t in compare.loss_types if t != "none"), "none")
    n = rows[0].losses["val_loss"].n
    return NOTE.format(seeds="one seed" if n == 1 else f"{n} seeds", measured=measured)


def _losses(row: Row) -> list[str]:
    return [_spread(row.losses[name]) if name in row.losses else "-" for name in LOSSES]


def _difference(row: Row) -> tuple[str, str]:
    if row.variant.name == BASELINE:
        return "-", "-"
    spread = row.differences["val_loss"]
    text = _spread(spread, "+")
    if spread.interval is not None:
        low, high = spread.interval
        text += f" [{low:+.4f}, {high:+.4f}]"
    return text, f"{row.lower} of {spread.n}"


def _spread(spread: Spread, sign: str = "") -> str:
    text = f"{spread.mean:{sign}.4f}"
    return text if spread.sd is None else f"{text} ± {spread.sd:.4f}"
