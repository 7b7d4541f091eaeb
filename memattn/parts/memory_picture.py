"""Picture of the measures of neural memories."""

# matplotlib's own types are partly unknown
# pyright: reportUnknownMemberType=false

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memattn.parts.memory_measures import MemoryUse
from memattn.parts.views import short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "surprise": "surprise (norm of the gradient)",
    "update": "update of the weights (share of their norm)",
    "relevance": "relevance (share of the memory)",
}


def by_chunk(use: MemoryUse) -> dict[str, dict[str, Tensor]]:
    """One number per chunk for each measure and layer: means over sequences and heads.

    ``tokens`` counts the tokens up to the chunk's end; the other names are keys of ``LABELS``.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, layer in zip(*use, strict=True):
        sizes = layer.chunk_tokens
        found[name] = {
            "tokens": torch.tensor(layer.chunk_tokens).cumsum(0),
            "update": layer.update.mean((0, 1)),
            "surprise": _means(layer.surprise.mean((0, 1)), sizes),
            "relevance": _means(layer.relevance.mean(0), sizes),
        }
    return found


def _means(x: Tensor, sizes: list[int]) -> Tensor:
    """The mean of each piece of ``x``."""
    return torch.stack([piece.mean() for piece in x.split_with_sizes(sizes)])


def draw_measure(axes: "Axes", metrics: Mapping[str, Mapping[str, Tensor]], name: str) -> None:
    """Draw one measure of each layer over the tokens.

    Args:
        axes: Matplotlib axes to draw into.
        metrics: The result of ``by_chunk``, or the metrics of a ``KeptMemory``.
        name: A key of ``LABELS``.
    """
    for layer, measures in metrics.items():
        axes.plot(measures["tokens"].numpy(), measures[name].numpy(), label=short_name(layer))
    axes.set_xlabel("tokens")
    axes.set_ylabel(LABELS[name])
    axes.set_ylim(bottom=0.0, top=1.05 if name == "relevance" else None)
    finish(axes)


def draw_memory_use(figure: "Figure", use: MemoryUse) -> None:
    """Draw the five measures, one line for each layer."""
    figure.set_size_inches(12.0, 7.0)
    axes = figure.subplots(2, 3).flatten()
    for ax, name in zip(axes, LABELS, strict=False):
        draw_measure(ax, by_chunk(use), name)
    for name, layer in zip(*use, strict=True):
        firsts = [bucket.first for bucket in layer.retrieval]
        qualities = [bucket.quality for bucket in layer.retrieval]
        axes[3].plot(firsts, qualities, marker="o", label=short_name(name))
    axes[3].set_xscale("log", base=2)
    axes[3].set_xlabel("tokens to the end, at least")
    axes[3].set_ylabel("retrieval quality")
    finish(axes[3])
    depth = max(layer.utilisation.shape[-1] for layer in use.uses)
    for n in range(depth):
        parts = [(i, x.utilisation) for i, x in enumerate(use.uses) if x.utilisation.shape[-1] > n]
        at = [i + (n + 0.5) / depth * 0.8 - 0.4 for i, _ in parts]
        heights = [float(x[..., n].mean()) for _, x in parts]
        axes[4].bar(at, heights, 0.8 / depth, label=f"memory layer {n}")
    axes[4].set_xticks(range(len(use.layers)), [short_name(name) for name in use.layers])
    axes[4].set_ylim(0.0, 1.05)
    axes[4].set_ylabel("utilisation (effective rank)")
    finish(axes[4])
    axes[5].axis("off")


def finish(axes: "Axes") -> None:
    """Set grid, frame and legend."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
