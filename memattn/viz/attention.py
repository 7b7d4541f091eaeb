"""Where attention goes: the mass that each layer and head puts on each source of keys."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor, nn

from memattn.checks import must
from memattn.nn import SegmentedAttention
from memattn.nn.rotary import apply_rotary
from memattn.ops import segmented_attention
from memattn.viz.curves import save_figure


@torch.no_grad()
def attention_mass(model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """Share of attention that each head of each layer puts on each source of keys.

    Exact, in O(T) memory: the mass of a source is ``exp(lse of the source - lse of all)``, where
    the log-sum-exps are those of the operator itself. Averaged over the batch and the positions.

    Args:
        model: A model whose attention layers are of kinds in ``SOURCES``, called with
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
    layers = [module for module in model.modules() if isinstance(module, tuple(SOURCES))]
    if not layers:
        kinds = ", ".join(kind.__name__ for kind in SOURCES)
        must("model", f"have layers of kind {kinds}", type(model).__name__, TypeError)
    masses: dict[nn.Module, dict[str, Tensor]] = {}

    def measure(module: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        kind = next(kind for kind in type(module).__mro__ if kind in SOURCES)
        found = SOURCES[kind](module, *args, **options)
        masses[module] = {name: mass.double().mean((0, 2)).cpu() for name, mass in found.items()}

    visit_layers(model, input_ids, layers, measure)
    found = [masses[layer] for layer in layers]
    names = dict.fromkeys(name for mass in found for name in mass)
    none = torch.zeros_like(next(iter(found[0].values())))
    return {name: torch.stack([mass.get(name, none) for mass in found]) for name in names}


def visit_layers(
    model: nn.Module,
    input_ids: Tensor,
    layers: Sequence[nn.Module],
    visit: Callable[[nn.Module, tuple[Tensor, ...], dict[str, Any]], None],
) -> None:
    """Run a model once, and call ``visit(layer, args, options)`` before each of these layers."""
    was_training = model.training
    hooks = [layer.register_forward_pre_hook(visit, with_kwargs=True) for layer in layers]
    try:
        model.eval()(input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)


def _segmented_sources(
    layer: SegmentedAttention,
    hidden_states: Tensor,
    *,
    rotary: tuple[Tensor, Tensor] | None,
    **bounds: Any,
) -> dict[str, Tensor]:
    """Masses ``[B, H, T]`` of tokens and persistent keys."""
    query, key, value = layer.split_heads(hidden_states)
    if rotary is not None:
        query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
    del bounds["cache"]  # None, without use_cache

    def lse(key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return segmented_attention(
            query, key, value, backend=layer.backend, **bounds, **options
        ).lse.double()

    spans = {"segment_len": layer.segment_len, "window_size": layer.window_size}
    parts = {"tokens": lse(key, value, **spans)}
    if layer.persistent_key is not None and layer.persistent_value is not None:
        persistent = (layer.persistent_key, layer.persistent_value)
        shared = (x.expand(len(query), -1, -1, -1) for x in persistent)
        parts["persistent"] = lse(*shared, is_causal=False)
    total = torch.stack(list(parts.values())).logsumexp(0)
    masses = {name: (part - total).exp() for name, part in parts.items()}
    if None not in spans.values():
        segment = (lse(key, value, segment_len=layer.segment_len) - total).exp()
        window = (masses.pop("tokens") - segment).clamp(min=0.0)
        masses = {"segment": segment, "window": window, **masses}
    return masses


# kind of layer: its masses [B, H, T] by source, from the arguments of its forward
SOURCES: dict[type[nn.Module], Callable[..., dict[str, Tensor]]] = {
    SegmentedAttention: _segmented_sources
}


def plot_attention_mass(masses: Mapping[str, Tensor], path: str | Path, *, title: str = "") -> None:
    """Draw the masses into one picture, a heat map for each source.

    Args:
        masses: What ``attention_mass`` returned.
        path: Picture to write, ``.png``, ``.svg`` or ``.pdf``; it is whole or absent.
        title: Heading.

    Raises:
        ValueError: If the format is unknown.
    """
    figure = Figure(figsize=(1.5 + 3.0 * len(masses), 3.6), layout="constrained")
    axes = figure.subplots(1, len(masses), squeeze=False)[0]
    images = [draw_attention_mass(ax, *item) for ax, item in zip(axes, masses.items(), strict=True)]
    figure.colorbar(images[-1], ax=list(axes), label="share of attention", shrink=0.85)
    figure.suptitle(title)
    save_figure(figure, path)


def draw_attention_mass(axes: Axes, source: str, mass: Tensor) -> AxesImage:
    """Draw the mass ``[layers, heads]`` of one source into a pair of axes.

    Returns:
        The image, for a colour bar; its colours run from 0 to 1.
    """
    image = axes.imshow(mass.numpy(), vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
    if mass.numel() <= 128:  # more numbers could not be read
        for layer, heads in enumerate(mass.tolist()):
            for head, share in enumerate(heads):
                ink = "white" if share < 0.6 else "black"
                axes.text(head, layer, f"{share:.2f}", ha="center", va="center", color=ink)
    axes.set_title(source)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_xticks(range(mass.shape[1]))
    axes.set_yticks(range(mass.shape[0]))
    return image
