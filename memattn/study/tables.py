"""The tables of a study, for the terminal and as Markdown."""

from collections.abc import Sequence

from memattn._tables import Spread, Table
from memattn.study.cells import Measure
from memattn.study.results import COMMON, CellSummary


def make_table(
    title: str,
    rows: Sequence[CellSummary],
    baselines: Sequence[str],
    measures: Sequence[Measure] = (),
) -> Table:
    """All cells with their counts and losses, and their differences from the baselines.

    Args:
        title: Title of the table.
        rows: The cells over their seeds.
        baselines: Names of the cells that the others are compared with.
        measures: What is measured beside the losses of every study.
    """
    counts = dict.fromkeys(name for row in rows for name in row.cell.counts)
    heads = ["model", *(name.replace("_", " ") for name in counts), *loss_heads(measures)]
    for baseline in baselines:
        heads += [f"validation loss - {baseline}", "seeds below it"]
        heads += [f"{measure.head} - {baseline}" for measure in measures if measure.compared]
    cells = []
    for row in rows:
        own = [f"{row.cell.counts[name]:,}" if name in row.cell.counts else "-" for name in counts]
        differences = [text for name in baselines for text in _against(row, name, measures)]
        cells.append((row.cell.name, *own, *loss_cells(row, measures), *differences))
    return Table(title, tuple(heads), cells)


def difference_table(
    rows: Sequence[CellSummary], baseline: str, measures: Sequence[Measure] = ()
) -> Table:
    """The differences of the other cells from one baseline.

    Args:
        rows: The cells over their seeds, the baseline among them.
        baseline: Its name.
        measures: What is measured beside the losses of every study.
    """
    heads = ["model", f"validation loss - {baseline}", "seeds below it"]
    heads += [f"{measure.head} - {baseline}" for measure in measures if measure.compared]
    others = [row for row in rows if row.cell.name != baseline]
    cells = [(row.cell.name, *_against(row, baseline, measures)) for row in others]
    return Table(f"Differences to {baseline}", tuple(heads), cells)


def loss_heads(measures: Sequence[Measure] = ()) -> tuple[str, ...]:
    """The heads of ``loss_cells``."""
    return tuple(measure.head for measure in (*COMMON, *measures))


def loss_cells(row: CellSummary, measures: Sequence[Measure] = ()) -> list[str]:
    """Each loss of a cell over its seeds."""
    names = [measure.name for measure in (*COMMON, *measures)]
    return [row.losses[name].text(".4f") if name in row.losses else "-" for name in names]


def difference(spread: Spread) -> str:
    """A difference over seeds, with the interval of its mean."""
    text = spread.text("+.4f")
    if spread.interval is not None:
        low, high = spread.interval
        text += f" [{low:+.4f}, {high:+.4f}]"
    return text


def _against(row: CellSummary, baseline: str, measures: Sequence[Measure]) -> list[str]:
    """A cell's differences from a baseline; the baseline's own row is empty."""
    spreads = row.differences[baseline]
    compared = ["val_loss", *(measure.name for measure in measures if measure.compared)]
    texts = [difference(spreads[name]) if name in spreads else "-" for name in compared]
    lower = f"{row.lower[baseline]} of {spreads['val_loss'].n}" if spreads else "-"
    return [texts[0], lower, *texts[1:]]
