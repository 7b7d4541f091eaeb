"""Accuracy of recall by length and depth."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memattn.viz.curves import save_figure

if TYPE_CHECKING:
    from memattn.evaluate import RecallReport


def plot_recall(report: "RecallReport", path: str | Path, *, title: str = "") -> None:
    """Draw the accuracy of a task: a heat map of depth and length, or a curve over length.

    Args:
        report: What ``memattn.evaluate.recall`` returned.
        path: Picture to write, ``.png``, ``.svg``, ``.pdf`` or ``.html``; it is whole or absent.
        title: Heading.

    Raises:
        ValueError: If the format is unknown.
    """
    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    axes = figure.add_subplot()
    if report.cells[0].depth is None:
        _draw_curve(axes, report)
    else:
        _draw_map(figure, axes, report)
    axes.set_title(title or report.task)
    save_figure(figure, path)


def _draw_map(figure: Figure, axes: Axes, report: "RecallReport") -> None:
    lengths = list(dict.fromkeys(cell.length for cell in report.cells))
    depths = list(dict.fromkeys(cell.depth for cell in report.cells))
    values = np.array([cell.accuracy for cell in report.cells]).reshape(len(lengths), -1).T
    image = axes.imshow(values, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
    for column in range(len(lengths)):
        for row in range(len(depths)):
            cell = report.cells[column * len(depths) + row]
            value = cell.accuracy
            mark = "*" if cell.beyond_reach else ""
            colour = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{value:.2f}{mark}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set_xlabel("tokens" + (", * beyond the reach of attention" if report.reach else ""))
    axes.set_ylabel("depth of the fact (0 is the start)")
    chance = max(cell.chance for cell in report.cells)
    figure.colorbar(image, label=f"accuracy (chance {chance:.2g})")


def _draw_curve(axes: Axes, report: "RecallReport") -> None:
    lengths = [cell.length for cell in report.cells]
    axes.plot(lengths, [cell.accuracy for cell in report.cells], marker="o", label="accuracy")
    axes.plot(lengths, [cell.chance for cell in report.cells], linestyle="--", label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("tokens")
    axes.set_ylabel("share of right answers")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
