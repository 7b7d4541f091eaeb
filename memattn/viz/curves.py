"""Loss curves, drawn without a display."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from memattn.files import replacing_file
from memattn.viz.pages import write_figures

Rows = Sequence[Mapping[str, Any]]
AXES = {"tokens": "tokens", "seconds": "seconds", "step": "optimizer steps"}
FORMATS = (".png", ".svg", ".pdf", ".html")
# Okabe and Ito (2008): distinct in every common kind of colour blindness
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")


def plot_curves(
    runs: Mapping[str, Rows], path: str | Path, *, x: str = "tokens", title: str = ""
) -> None:
    """Draw the loss of runs into one picture.

    Args:
        runs: Rows of ``metrics.csv`` by the name of the run. Training losses are smoothed over
            their last rows (the raw ones stand faintly behind); held-out losses are points.
        path: Picture to write, ``.png``, ``.svg``, ``.pdf`` or ``.html``; it is whole or absent.
        x: ``"tokens"``, ``"seconds"`` or ``"step"``.
        title: Heading.

    Raises:
        ValueError: If there is nothing to draw, or ``x`` or the format is unknown.
    """
    save_figure(curves_figure(runs, x=x, title=title), path)


def curves_figure(runs: Mapping[str, Rows], *, x: str = "tokens", title: str = "") -> Figure:
    """The figure of ``plot_curves``."""
    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    axes = figure.add_subplot()
    draw_curves(axes, runs, x=x)
    axes.set_title(title)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as ``.png``, ``.svg``, ``.pdf`` or ``.html``; the file is whole or absent.

    Raises:
        ValueError: If the format is unknown.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"path must end in {', '.join(FORMATS)}, got {path}")
    if path.suffix == ".html":
        write_figures({"": figure}, path, title=path.stem)
        return
    FigureCanvasAgg(figure)
    content = io.BytesIO()
    figure.savefig(content, dpi=160, format=path.suffix[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as temporary:
        temporary.write_bytes(content.getvalue())


def draw_curves(axes: Axes, runs: Mapping[str, Rows], *, x: str = "tokens") -> None:
    """Draw the loss of runs into a pair of axes; see ``plot_curves``."""
    if x not in AXES:
        raise ValueError(f"x must be one of {', '.join(AXES)}, got {x!r}")
    drawn, has_both = 0, False
    for i, (name, rows) in enumerate(runs.items()):
        colour = COLOURS[i % len(COLOURS)]
        # without what a model adds to the cross-entropy, where it says so
        train = _points(rows, x, "lm_loss") or _points(rows, x, "loss")
        held_out = _points(rows, x, "eval_loss")
        if train:
            axes.plot(*zip(*train, strict=True), color=colour, alpha=0.2, linewidth=0.8)
            axes.plot(
                *zip(*smooth_curve(train), strict=True), color=colour, linewidth=1.8, label=name
            )
        if held_out:
            has_both |= bool(train)
            label = None if train else name
            axes.plot(
                *zip(*held_out, strict=True), color=colour, label=label, linestyle="--", marker="o"
            )
        drawn += len(train) + len(held_out)
    if not drawn:
        raise ValueError(
            f"runs must have losses to draw, got none in {', '.join(runs) or 'no run'}"
        )
    axes.set_xlabel(AXES[x])
    axes.set_ylabel("loss (nats per token)")
    if x != "step":
        axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    handles, _ = axes.get_legend_handles_labels()
    if has_both:  # one entry for all
        handles.append(
            Line2D([], [], color="#555555", label="held out", linestyle="--", marker="o")
        )
    axes.legend(handles=handles, frameon=False)


def _points(rows: Rows, x: str, y: str) -> list[tuple[float, float]]:
    """Points of one column; rows without it, and losses that are not finite, are left out."""
    points = [(row.get(x), row.get(y)) for row in rows]
    return [(a, b) for a, b in points if a is not None and b is not None and math.isfinite(b)]


def smooth_curve(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Running mean that forgets over a twentieth of the points, without bias at the start."""
    decay = 1.0 - 1.0 / max(1.0, len(points) / 20.0)
    total = weight = 0.0
    smoothed = []
    for a, b in points:
        total, weight = decay * total + b, decay * weight + 1.0
        smoothed.append((a, total / weight))
    return smoothed


def short_number(value: float) -> str:
    """1500000 as 1.5M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
