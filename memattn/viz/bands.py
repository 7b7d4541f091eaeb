"""Curves of means over seeds, with bands of standard deviations."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from memattn.viz.curves import COLOURS, save_figure

Band = Sequence[tuple[float, float, float]]  # step, mean, standard deviation
STYLES = ("-", "--", ":")


def plot_bands(panels: Mapping[str, Mapping[str, Band]], path: str | Path) -> None:
    """Draw panels of curves side by side into one picture.

    Args:
        panels: Curves by title of the panel and name; each is points ``(step, mean, standard
            deviation)``. A name has the same colour in every panel.
        path: Picture to write, ``.png``, ``.svg``, ``.pdf`` or ``.html``; it is whole or absent.

    Raises:
        ValueError: If there is nothing to draw, or the format is unknown.
    """
    if not panels or not all(panels.values()):
        raise ValueError(f"panels must have curves to draw, got {', '.join(panels) or 'none'}")
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    figure = Figure(figsize=(5.2 * len(panels), 5.0), layout="constrained")
    for number, (title, curves) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), number)
        for name, points in curves.items():
            _draw(axes, name, points, names.index(name))
        axes.set(title=title, xlabel="optimizer steps")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _zoom(axes, curves)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    figure.legend(
        [lines[name] for name in names],
        names,
        loc="outside lower center",
        ncols=min(len(names), 5),
        frameon=False,
    )
    save_figure(figure, path)


def _draw(axes: Axes, name: str, points: Band, index: int) -> None:
    """One curve and its band."""
    steps, means, deviations = zip(*points, strict=True)
    colour = COLOURS[index % len(COLOURS)]
    style = STYLES[index // len(COLOURS) % len(STYLES)]
    marker = "o" if len(points) < 20 else None
    axes.plot(steps, means, style, color=colour, label=name, marker=marker, markersize=3.5)
    low, high = (
        [mean + sign * sd for mean, sd in zip(means, deviations, strict=True)] for sign in (-1, 1)
    )
    axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def _zoom(axes: Axes, curves: Mapping[str, Band]) -> None:
    """Show the values of the last three quarters of the steps: the first ones dwarf the rest."""
    last = max(points[-1][0] for points in curves.values())
    late = [
        mean + sign * sd
        for points in curves.values()
        for step, mean, sd in points
        if step >= last / 4
        for sign in (-1, 1)
    ]
    margin = 0.05 * (max(late) - min(late)) or 0.01
    axes.set_ylim(min(late) - margin, max(late) + margin)
