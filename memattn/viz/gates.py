"""Gates of specialists on several texts beside each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from memattn.viz.curves import COLOURS, save_figure


def plot_gate_comparison(
    means: Mapping[str, Mapping[str, Sequence[float]]],
    layers: Sequence[int],
    path: str | Path,
    *,
    title: str = "",
) -> None:
    """Draw mean gates over the layers, a panel for each branch and a line for each text.

    Args:
        means: By text and by branch, the mean gate in each layer.
        layers: Numbers of the layers.
        path: Picture to write, ``.png``, ``.svg``, ``.pdf`` or ``.html``; it is whole or absent.
        title: Heading.

    Raises:
        ValueError: If the format is unknown.
    """
    branches = list(dict.fromkeys(name for gates in means.values() for name in gates))
    figure = Figure(figsize=(1.0 + 3.4 * len(branches), 4.0), layout="constrained")
    panels = figure.subplots(1, len(branches), squeeze=False, sharey=True)[0]
    for axes, branch in zip(panels, branches, strict=True):
        for i, (text, gates) in enumerate(means.items()):
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(layers, gates[branch], marker="o", color=colour, label=text)
        axes.set(title=branch, xlabel="layer", ylim=(0.0, 1.05))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("mean gate")
    panels[0].legend(frameon=False)
    figure.suptitle(title)
    save_figure(figure, path)
