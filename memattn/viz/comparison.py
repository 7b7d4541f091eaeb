"""Models side by side: curves of their training, and bars of their measures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memattn.viz.curves import COLOURS, Rows, draw_curves, save_figure, short_number

COLUMNS = 4


def plot_comparison(
    curves: Mapping[str, Rows],
    bars: Mapping[str, Mapping[str, Sequence[float]]],
    path: str | Path,
    *,
    title: str = "",
) -> None:
    """Draw models side by side into one picture.

    Args:
        curves: Rows of ``metrics.csv`` by the name of the model, for the losses over the tokens.
        bars: By title of the panel and name of the model, the values of its seeds; the bar is their
            mean, and each of several is a point. A model has one colour everywhere.
        path: Picture to write, ``.png``, ``.svg``, ``.pdf`` or ``.html``; it is whole or absent.
        title: Heading.

    Raises:
        ValueError: If there is nothing to draw, or the format is unknown.
    """
    save_figure(comparison_figure(curves, bars, title=title), path)


def comparison_figure(
    curves: Mapping[str, Rows],
    bars: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    title: str = "",
) -> Figure:
    """The figure of ``plot_comparison``."""
    columns = min(COLUMNS, max(1, len(bars)))
    rows = 1 + math.ceil(len(bars) / columns)
    figure = Figure(figsize=(2.7 * columns, 3.6 + 2.6 * (rows - 1)), layout="constrained")
    grid = figure.add_gridspec(rows, columns, height_ratios=[3.6] + [2.6] * (rows - 1))
    draw_curves(figure.add_subplot(grid[0, :]), curves)
    for number, (name, values) in enumerate(bars.items()):
        axes = figure.add_subplot(grid[1 + number // columns, number % columns])
        _draw_bars(axes, values, list(curves))
        axes.set_title(name, fontsize=10)
    figure.suptitle(title)
    return figure


def _draw_bars(axes: Axes, values: Mapping[str, Sequence[float]], names: list[str]) -> None:
    """One bar for each model that has values."""
    for name, of_seeds in values.items():
        place = names.index(name)
        mean = sum(of_seeds) / len(of_seeds)
        axes.bar(place, mean, color=COLOURS[place % len(COLOURS)])
        axes.annotate(f"{mean:,.4g}", (place, mean), ha="center", va="bottom", fontsize=8)
        if len(of_seeds) > 1:
            axes.plot([place] * len(of_seeds), of_seeds, "k.", markersize=4)
    axes.set_xticks(range(len(names)), names, rotation=20, fontsize=8)
    axes.margins(y=0.15)
    axes.set_ylim(bottom=0.0)
    axes.yaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
