"""Pictures of the size of a model's state and of the influence of a token."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from memattn.viz.curves import COLOURS, save_figure


def draw_state(axes: Axes, states: Mapping[str, Sequence[tuple[int, int]]]) -> None:
    """Draw the bytes that a sequence carries over its tokens.

    Args:
        axes: Where to draw.
        states: Points ``(tokens, bytes)`` by the name of the model.
    """
    for i, (name, points) in enumerate(states.items()):
        tokens, sizes = zip(*points, strict=True)
        mebibytes = [size / 2**20 for size in sizes]
        axes.plot(tokens, mebibytes, color=COLOURS[i % len(COLOURS)], marker="o", label=name)
    axes.set_xlabel("tokens decoded")
    axes.set_ylabel("state of one sequence (MiB)")
    axes.set_ylim(bottom=0.0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def draw_influence(
    axes: Axes, changed: Sequence[int], log10: Sequence[Sequence[float | None]]
) -> AxesImage:
    """Draw how much a change of one token moves the logits at each position.

    Args:
        axes: Where to draw.
        changed: Positions that were changed, evenly spaced.
        log10: One row for each, the logarithm of the change over blocks of positions; None, where
            nothing changed, is left blank.

    Returns:
        The image, for a colour bar.
    """
    values = np.array(log10, dtype=float)  # None becomes NaN
    stride = changed[1] - changed[0] if len(changed) > 1 else 1
    length = values.shape[1] * stride
    colours = mpl.colormaps["viridis"].with_extremes(bad=(0.0, 0.0, 0.0, 0.0))
    image = axes.imshow(
        values.T,  # queries run down, keys run right, as in an attention matrix
        cmap=colours,
        extent=(0.0, changed[-1] + stride, length, 0.0),
        interpolation="nearest",
    )
    cells = f"; a cell is {stride} tokens" if stride > 1 else ""
    axes.set_xlabel(f"token that is changed{cells}")
    axes.set_ylabel("position whose logits move")
    return image


def plot_influence(found: Mapping[str, Any], path: str | Path, *, title: str = "") -> None:
    """Draw what ``memattn.evaluate.influence`` returned into one picture.

    Args:
        found: ``changed`` and ``log10``, see there.
        path: Picture to write, ``.png``, ``.svg``, ``.pdf`` or ``.html``; it is whole or absent.
        title: Heading.

    Raises:
        ValueError: If the format is unknown.
    """
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes = figure.add_subplot()
    image = draw_influence(axes, found["changed"], found["log10"])
    figure.colorbar(image, ax=axes, label="mean change of the logits (log10); blank: none at all")
    axes.set_title(title)
    save_figure(figure, path)
