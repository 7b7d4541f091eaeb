"""Pictures that parts of a model define."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from memattn.parts.views import part_views
from memattn.viz.curves import save_figure


def plot_view(view: str, measures: Any, path: str | Path, *, title: str = "") -> None:
    """Draw the measures of a part into one picture.

    Args:
        view: Name of the picture, a key of ``memattn.parts.views.part_views()``.
        measures: What the view's ``measure(model, input_ids)`` returned.
        path: Picture to write, ``.png``, ``.svg``, ``.pdf`` or ``.html``; it is whole or absent.
        title: Heading.

    Raises:
        KeyError: If no part has such a view.
        ValueError: If the format is unknown.
    """
    figure = Figure(layout="constrained")
    part_views()[view].draw(figure, measures)
    figure.suptitle(title)
    save_figure(figure, path)
