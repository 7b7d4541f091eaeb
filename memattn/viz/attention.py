"""The attention mass that each layer and head puts on each source of keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from memattn.checks import must
from memattn.parts.views import (
    MASSES_BY_SOURCE,
    attention_layers,
    draw_attention_mass,
    visit_layers,
)
from memattn.viz.curves import save_figure


@torch.no_grad()
def attention_mass(model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """Share of attention that each head of each layer puts on each source of keys.

    Exact, in O(T) memory: the mass of a source is ``exp(lse of the source - lse of all)``, where
    the log-sum-exps are those of the operator itself. Averaged over the batch and the positions.

    Args:
        model: A model whose attention layers are of kinds in ``MASSES_BY_SOURCE``, called with
            ``input_ids`` and ``use_cache=False``. It is put into its evaluation mode meanwhile.
        input_ids: ``[B, T]``, without padding.

    Returns:
        By source, ``[layers, heads]``, float64; the sum over the sources is 1. Tokens are one
        source, ``"tokens"``, or with segments and a window two: ``"segment"``, the tokens of the
        query's own segment, and ``"window"``, those that it sees beside them. A layer without a
        source has 0 there.

    Raises:
        TypeError: If the model has no attention layer of a known kind.
    """
    layers = attention_layers(model)
    if not layers:
        kinds = ", ".join(kind.__name__ for kind in MASSES_BY_SOURCE)
        must("model", f"have layers of kind {kinds}", type(model).__name__, TypeError)
    masses: dict[nn.Module, dict[str, Tensor]] = {}

    def measure(module: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        kind = next(kind for kind in type(module).__mro__ if kind in MASSES_BY_SOURCE)
        found = MASSES_BY_SOURCE[kind](module, *args, **options)
        masses[module] = {name: mass.double().mean((0, 2)).cpu() for name, mass in found.items()}

    visit_layers(model, input_ids, layers, measure)
    found = [masses[layer] for layer in layers]
    names = dict.fromkeys(name for mass in found for name in mass)
    none = torch.zeros_like(next(iter(found[0].values())))
    return {name: torch.stack([mass.get(name, none) for mass in found]) for name in names}


def plot_attention_mass(masses: Mapping[str, Tensor], path: str | Path, *, title: str = "") -> None:
    """Draw the masses into one picture, a heat map for each source.

    Args:
        masses: What ``attention_mass`` returned.
        path: Picture to write, ``.png``, ``.svg``, ``.pdf`` or ``.html``; it is whole or absent.
        title: Heading.

    Raises:
        ValueError: If the format is unknown.
    """
    save_figure(attention_figure(masses, title=title), path)


def attention_figure(masses: Mapping[str, Tensor], *, title: str = "") -> Figure:
    """The figure of ``plot_attention_mass``."""
    figure = Figure(figsize=(1.5 + 3.0 * len(masses), 3.6), layout="constrained")
    axes = figure.subplots(1, len(masses), squeeze=False)[0]
    images = [draw_attention_mass(ax, *item) for ax, item in zip(axes, masses.items(), strict=True)]
    figure.colorbar(images[-1], ax=list(axes), label="share of attention", shrink=0.85)
    figure.suptitle(title)
    return figure
