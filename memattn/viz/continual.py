"""Continual learning: accuracy matrices, and which task reads which."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from torch import Tensor

from memattn.checks import must
from memattn.viz.curves import COLOURS, save_figure

MAX_COLUMNS = 5
_MAX_WRITTEN = 10  # tasks up to which the numbers fit into the cells


def plot_accuracy_matrices(
    matrices: Mapping[str, Tensor], path: str | Path, *, tasks: Sequence[str] | None = None
) -> None:
    """Draw accuracy matrices side by side; forgetting shows as columns that fade downwards.

    Args:
        matrices: By strategy, ``[n, n]`` accuracies in 0..1 on task ``j`` (column) after training
            on task ``i`` (row); NaN stays blank.
        path: Picture to write, ``.png``, ``.svg``, ``.pdf`` or ``.html``; it is whole or absent.
        tasks: Names of the tasks; by default their numbers.

    Raises:
        ValueError: If there is nothing to draw, a matrix is not square, or the format is unknown.
    """
    if not matrices:
        must("matrices", "have a strategy to draw", "none")
    columns = min(len(matrices), MAX_COLUMNS)
    rows = math.ceil(len(matrices) / columns)
    figure = Figure(figsize=(2.6 * columns + 0.8, 3.0 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    image = None
    for axes in grid.flat[len(matrices) :]:
        axes.set_axis_off()
    for number, (axes, (name, matrix)) in enumerate(zip(grid.flat, matrices.items(), strict=False)):
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            must(f"matrices[{name}]", "be a square [n, n]", f"shape {list(matrix.shape)}")
        image = axes.imshow(matrix.cpu().numpy(), vmin=0.0, vmax=1.0, cmap="viridis")
        _write_cells(axes, matrix)
        labels = [str(n) for n in range(len(matrix))] if tasks is None else list(tasks)
        axes.set_xticks(range(len(matrix)), labels, rotation=0 if tasks is None else 60)
        axes.set_yticks(range(len(matrix)), labels)
        axes.set_title(name, fontsize=10)
        if number % columns == 0:
            axes.set_ylabel("after task")
        if number >= len(matrices) - columns:
            axes.set_xlabel("accuracy on task")
    assert image is not None
    figure.colorbar(image, ax=grid, shrink=0.8, pad=0.01)
    save_figure(figure, path)


def _write_cells(axes: Axes, matrix: Tensor) -> None:
    """Percent in the cells, where they fit."""
    if len(matrix) > _MAX_WRITTEN:
        return
    for i, row in enumerate(matrix.tolist()):
        for j, accuracy in enumerate(row):
            if accuracy == accuracy:  # not NaN
                colour = "white" if accuracy < 0.6 else "black"
                axes.text(
                    *(j, i, f"{100 * accuracy:.0f}"),
                    ha="center",
                    va="center",
                    color=colour,
                    fontsize=7,
                )


def plot_task_graph(reads: Mapping[str, Sequence[str]], path: str | Path) -> None:
    """Draw the tasks in the order of training, and an arrow from each to those that read it.

    Args:
        reads: By task, the earlier tasks that it reads.
        path: Picture to write, ``.png``, ``.svg``, ``.pdf`` or ``.html``; it is whole or absent.

    Raises:
        ValueError: If there is no task, a task reads one that does not come before it, or the
            format is unknown.
    """
    if not reads:
        must("reads", "have a task to draw", "none")
    places = {task: number for number, task in enumerate(reads)}
    figure = Figure(figsize=(max(3.0, 1.5 * len(reads)), 2.6), layout="constrained")
    axes = figure.add_subplot()
    reach = 0.0
    for task, sources in reads.items():
        for source in sources:
            if places.get(source, len(reads)) >= places[task]:
                must(f"reads[{task}]", "name tasks before it", source)
            apart = places[task] - places[source]
            reach = max(reach, 0.45 * apart)
            axes.add_patch(
                FancyArrowPatch(
                    (places[source], 0.0),
                    (places[task], 0.0),
                    connectionstyle="arc3,rad=-0.45",
                    arrowstyle="-|>",
                    mutation_scale=14,
                    shrinkA=16,
                    shrinkB=16,
                    color=COLOURS[places[source] % len(COLOURS)],
                    linewidth=1.6,
                )
            )
    for task, place in places.items():
        axes.scatter(place, 0.0, s=700, color=COLOURS[place % len(COLOURS)], zorder=3)
        axes.text(place, -0.32, task, ha="center", va="top", fontsize=9)
    axes.set(xlim=(-0.6, len(reads) - 0.4), ylim=(-0.6, 0.4 + 0.5 * reach))
    axes.set_axis_off()
    save_figure(figure, path)
