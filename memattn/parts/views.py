"""Shared by the pictures of parts: visiting the layers of a model, and heat maps."""

# matplotlib's own types are partly unknown
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memattn.checks import plain_values
from memattn.parts.base import PARTS, View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

Visit = Callable[[nn.Module, tuple[Tensor, ...], dict[str, Any]], None]
# kind of attention layer: function from its forward arguments to masses [B, H, T] by key source
MASSES_BY_SOURCE: dict[type[nn.Module], Callable[..., dict[str, Tensor]]] = {}


def part_views() -> dict[str, View]:
    """The pictures of all registered parts, by name."""
    return {name: view for part in PARTS.values() for name, view in part.views.items()}


@torch.no_grad()
def visit_layers(
    model: nn.Module, input_ids: Tensor, layers: Iterable[nn.Module], visit: Visit
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


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The attention layers of known kinds, in order."""
    return [module for module in model.modules() if isinstance(module, tuple(MASSES_BY_SOURCE))]


def draw_attention_mass(axes: "Axes", source: str, mass: Tensor) -> "AxesImage":
    """Draw the mass ``[layers, heads]`` of one source.

    Returns:
        The image, for a colour bar; its colours run from 0 to 1.
    """
    image = axes.imshow(mass.numpy(), vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
    if mass.numel() <= 128:  # more numbers could not be read
        for layer, heads in enumerate(plain_values(mass)):
            for head, share in enumerate(heads):
                ink = "white" if share < 0.6 else "black"
                axes.text(head, layer, f"{share:.2f}", ha="center", va="center", color=ink)
    axes.set_title(source)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_xticks(range(mass.shape[1]))
    axes.set_yticks(range(mass.shape[0]))
    return image


def short_name(layer: str) -> str:
    """Short name of a module: ``layer 3`` if it is in layer 3."""
    numbers: Sequence[str] = [part for part in layer.split(".") if part.isdigit()]
    return f"layer {numbers[0]}" if numbers else layer
