"""The tasks of a DTG-MA model: which tokens each may see, and what it attends to."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from memattn.checks import must
from memattn.dtgma import DTGMAModel, TaskAttention
from memattn.viz.curves import COLOURS, save_figure

MAX_TASKS = 12
_MASK_COLOURS = ListedColormap(["#f1f1ee", COLOURS[0]])


def plot_tasks(
    model: DTGMAModel, path: str | Path, *, x: Tensor | None = None, title: str = ""
) -> None:
    """Draw the mask of each task, and the attention of its column layer by layer.

    A row of the picture is a task. In each panel queries run down, the tokens of the task's own
    column, and keys run right: the own column, then those of the tasks that it reads. Attention is
    the mean over heads and inputs, as a share of the largest of the task; masked pairs are blank.
    Dotted lines stand before node tokens.

    Args:
        model: The model.
        path: Picture to write, ``.png``, ``.svg``, ``.pdf`` or ``.html``; it is whole or absent.
        x: Inputs, ``[B, ...]``, that all tasks see. None means the mean input of each class, which
            the model keeps as prototypes; a task without prototypes then has its mask alone.
        title: Heading.

    Raises:
        ValueError: If the model has no task, or more than 12, an input does not fit, or the format
            is unknown.
    """
    save_figure(tasks_figure(model, x=x, title=title), path)


def tasks_figure(model: DTGMAModel, *, x: Tensor | None = None, title: str = "") -> Figure:
    """What ``plot_tasks`` writes."""
    if not 1 <= len(model.tasks) <= MAX_TASKS:
        must("model", f"have from 1 to {MAX_TASKS} tasks to draw", len(model.tasks))
    found = {task: model.attention(task, x) for task in model.tasks}
    n_panels = 1 + max(0 if a.weights is None else len(a.weights) for a in found.values())
    width = max(len(a.columns) for a in found.values())
    figure = Figure(
        figsize=(1.0 + 2.4 * n_panels * min(width, 3), 0.9 + 2.5 * len(found)),
        layout="constrained",
    )
    grid = figure.subplots(len(found), n_panels, squeeze=False)
    image = None
    for row, (task, attention) in zip(grid, found.items(), strict=True):
        shares = attention.mask.float().mean(0).cpu().numpy()
        row[0].imshow(shares, cmap=_MASK_COLOURS, vmin=0.0, vmax=1.0, interpolation="nearest")
        row[0].set_title(f"{task}: what it may see", fontsize=9)
        layers = np.empty((0, *attention.mask.shape[1:]))
        if attention.weights is not None:
            layers = attention.weights.mean(1).cpu().numpy()
        for number, (axes, weights) in enumerate(zip(row[1:], layers, strict=False), 1):
            seen = np.where(shares > 0.0, weights / layers.max(), np.nan)
            image = axes.imshow(seen, vmin=0.0, vmax=1.0, interpolation="nearest")
            axes.set_title(f"{task}: attention, layer {number}", fontsize=9)
        for axes in row[1 + len(layers) :]:
            axes.set_axis_off()
        for axes in row[: 1 + len(layers)]:
            _mark_columns(axes, attention)
    if image is not None:
        figure.colorbar(
            image,
            ax=grid,
            label="attention, as a share of the task's largest; blank: masked",
            shrink=0.6,
        )
    figure.suptitle(title)
    return figure


def _mark_columns(axes: Axes, attention: TaskAttention) -> None:
    """Name axes and columns, and draw lines between columns and before their node tokens."""
    length = attention.mask.shape[1]
    starts = np.arange(len(attention.columns)) * length
    names = [str(name) for name in attention.columns]
    axes.set_xticks(starts + (length - 1) / 2, names, fontsize=8)
    axes.set_yticks([(length - 1) / 2], [names[0]], rotation=90, va="center", fontsize=8)
    axes.tick_params(length=0)
    axes.set_xlabel("tokens that are seen, by task", fontsize=8)
    axes.set_ylabel("tokens that look", fontsize=8)
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="white", linewidth=2.0)
    if attention.n_nodes:
        for start in starts:
            nodes = start + length - attention.n_nodes - 0.5
            axes.axvline(nodes, color="#7f7f7f", linewidth=0.8, linestyle=":")
        axes.axhline(
            length - attention.n_nodes - 0.5, color="#7f7f7f", linewidth=0.8, linestyle=":"
        )
