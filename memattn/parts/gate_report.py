"""Gates of the base and of each specialist for the tokens of a text, layer by layer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from memattn.checks import must, plain_values
from memattn.nn._modules import modules_of
from memattn.nn.causal_specialists import CausalSpecialists
from memattn.parts.specialist_set import mean_gates, recording_gates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASE = "base"


class LayerGates(NamedTuple):
    """The gates of one layer."""

    layer: int
    names: tuple[str, ...]  # the base and the specialists
    gates: Tensor  # [B, T, 1 + N], 0 for absent tokens

    def means(self) -> Tensor:
        """The mean gates of each row over its present tokens, ``[B, 1 + N]``."""
        return mean_gates(self.gates)


@torch.no_grad()
def measure_gates(model: nn.Module, input_ids: Tensor, **inputs: Any) -> list[LayerGates]:
    """Run a model once and return the gates of its layers with specialists, in order.

    Args:
        model: A model with specialists, in its layers or attached to them.
        input_ids: Tokens ``[B, T]``.
        inputs: More arguments of the model, such as ``attention_mask`` and ``domain_weights``.

    Raises:
        ValueError: If the model has no specialists.
    """
    layers = [
        (_number(name), (BASE, *module.gate.specialists))
        for name, module in modules_of(model, CausalSpecialists).items()
    ]
    if not any(len(names) > 1 for _, names in layers):
        must("model", "have specialists", "one without")
    was_training = model.training
    try:
        with recording_gates(model) as record:
            model.eval()(input_ids, use_cache=False, **inputs)
    finally:
        model.train(was_training)
    return [
        LayerGates(number, names, gates.float().cpu())
        for (number, names), gates in zip(layers, record.tokens, strict=True)
    ]


def gate_lines(layers: Sequence[LayerGates]) -> list[str]:
    """``Layer 0: [0.91 base, 0.09 specialist_0]`` for each layer, means over rows."""
    lines: list[str] = []
    for layer in layers:
        means = plain_values(layer.means().mean(0))
        shares = (f"{mean:.2f} {name}" for mean, name in zip(means, layer.names, strict=True))
        lines.append(f"Layer {layer.layer}: [{', '.join(shares)}]")
    return lines


def draw_gates(figure: "Figure", layers: Sequence[LayerGates]) -> None:
    """Draw a heat map of layers and tokens for the base and for each specialist, of the first row.

    Args:
        figure: An empty figure.
        layers: The result of ``measure_gates``.
    """
    names = list(dict.fromkeys(name for layer in layers for name in layer.names))
    tokens = layers[0].gates.shape[1]
    figure.set_size_inches(min(16.0, 4.0 + 0.12 * tokens), 1.2 + 1.5 * len(names))
    panels = figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        rows = [
            layer.gates[0, :, layer.names.index(name)]
            if name in layer.names
            else torch.full((tokens,), torch.nan)
            for layer in layers
        ]
        axes.imshow(
            torch.stack(rows).numpy(),
            vmin=0.0,
            vmax=1.0,
            cmap="viridis",
            aspect="auto",
            interpolation="nearest",
        )
        axes.set_title(name)
        axes.set_ylabel("layer")
        axes.set_yticks(range(len(layers)), [str(layer.layer) for layer in layers])
    panels[-1].set_xlabel("token")
    image = panels[0].images[0]
    figure.colorbar(image, ax=list(panels), label="gate")  # pyright: ignore[reportUnknownMemberType]


def _number(name: str) -> int:
    """The index of the layer that contains a module."""
    return next(int(word) for word in name.split(".") if word.isdigit())
