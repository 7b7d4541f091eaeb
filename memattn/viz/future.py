"""What future attention does: the mass on future keys, and how well they foresee the real ones."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from memattn.checks import check_rank, must
from memattn.nn import FutureAttention
from memattn.ops import future_attention, segmented_attention
from memattn.viz.attention import SOURCES, draw_attention_mass, visit_layers
from memattn.viz.curves import save_figure


class FutureMeasures(NamedTuple):
    """What ``measure_future`` returns, float64, one row for each layer with future keys."""

    layers: list[int]  # their numbers among all attention layers
    mass: Tensor  # [layers, H], share of attention on future keys, averaged over the positions
    cosine: Tensor  # [layers, T], predicted against true future output; NaN where none is defined


@torch.no_grad()
def measure_future(model: nn.Module, input_ids: Tensor) -> FutureMeasures:
    """Mass on future keys, and the cosine between predicted and true future output.

    The mass is exact: one minus ``exp(lse of the past - lse of both)``. The predicted output is
    ``out_future`` of the operator; the true one is what the operator gives when the real keys and
    values of the next positions stand in the table, which is the target of its loss. Positions
    that the loss leaves out, since their band leaves the sequence, have no cosine.

    Args:
        model: A model with ``FutureAttention`` layers, called with ``input_ids`` and
            ``use_cache=False``. It is put into its evaluation mode meanwhile.
        input_ids: ``[B, T]``, without padding, with at least one whole band.

    Returns:
        Mass and cosine, averaged over the batch, and over positions or heads.

    Raises:
        TypeError: If the model has no such layer.
        ValueError: If the text is shorter than a band.
    """
    check_rank("input_ids", input_ids, "B T")
    everything = [module for module in model.modules() if isinstance(module, tuple(SOURCES))]
    numbers = [i for i, layer in enumerate(everything) if isinstance(layer, FutureAttention)]
    layers: list[Any] = [everything[i] for i in numbers]
    if not layers:
        must("model", "have layers of kind FutureAttention", type(model).__name__, TypeError)
    least = 1 + min(layers[0].future_dim, _last_row(layers[0]))
    if input_ids.shape[1] < least:
        must("input_ids", f"have at least {least} tokens, one whole band", input_ids.shape[1])
    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def measure(layer: Any, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        mass = _future_sources(layer, *args, **options)["future"]
        cosine = _cosine(layer, *args, **options)
        found[layer] = mass.mean((0, 2)).cpu(), cosine.mean((0, 1)).cpu()

    visit_layers(model, input_ids, layers, measure)
    masses, cosines = zip(*(found[layer] for layer in layers), strict=True)
    return FutureMeasures(numbers, torch.stack(masses), torch.stack(cosines))


def plot_future(measures: FutureMeasures, path: str | Path, *, title: str = "") -> None:
    """Draw mass and cosine into one picture, a heat map each.

    Args:
        measures: What ``measure_future`` returned.
        path: Picture to write, ``.png``, ``.svg`` or ``.pdf``; it is whole or absent.
        title: Heading.

    Raises:
        ValueError: If the format is unknown.
    """
    layers, mass, cosine = measures
    figure = Figure(figsize=(12.0, 1.8 + 0.3 * max(8, len(mass))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    image = draw_attention_mass(left, "share of attention on future keys", mass)
    left.set_yticks(range(len(layers)), map(str, layers))
    figure.colorbar(image, ax=left, shrink=0.85)
    image = right.imshow(
        cosine.numpy(), vmin=-1.0, vmax=1.0, cmap="RdBu", aspect="auto", interpolation="nearest"
    )
    figure.colorbar(image, ax=right, shrink=0.85)
    right.set(title="cosine of predicted and true future output", xlabel="position")
    means = zip(layers, cosine.nanmean(1).tolist(), strict=True)
    right.set_yticks(range(len(layers)), [f"{i}: {mean:+.2f}" for i, mean in means])
    right.set_ylabel("layer: mean")
    figure.suptitle(title)
    save_figure(figure, path)


def _future_sources(
    layer: FutureAttention, hidden_states: Tensor, *, output_loss: bool | None = None, **tokens: Any
) -> dict[str, Tensor]:
    """Masses ``[B, H, T]`` of tokens and future keys."""
    inputs, options = layer.operands(hidden_states, **tokens)
    shared = ("cu_seqlens", "seq_start", "seq_end", "query_offset", "backend")
    past = segmented_attention(*inputs[:3], **{name: options[name] for name in shared}).lse
    both = future_attention(*inputs, **options).lse
    future = -torch.expm1((past - both).double()).clamp(max=0.0)
    return {"tokens": 1.0 - future, "future": future}


def _cosine(
    layer: FutureAttention, hidden_states: Tensor, *, output_loss: bool | None = None, **tokens: Any
) -> Tensor:
    """Cosine ``[B, H, T]`` of predicted and true future output, NaN without a whole band."""
    inputs, options = layer.operands(hidden_states, **tokens)
    query, key, value = inputs[:3]
    T = query.shape[2]
    predicted = future_attention(*inputs, **options).out_future
    real = {
        **options,
        "future_dim": min(layer.future_dim, T - 1),
        "future_index": "position",
        "future_query": None,
    }
    true = future_attention(query, key, value, key[:, :, 1:], value[:, :, 1:], **real).out_future
    cosine = torch.cosine_similarity(predicted.double(), true.double(), dim=-1)
    position = torch.arange(T, device=query.device)
    last = (position + layer.future_dim).clamp(max=_last_row(layer))
    return cosine.masked_fill((last >= T) | (last <= position), torch.nan)


def _last_row(layer: FutureAttention) -> int:
    """The last position that has a future key; by distance there is no last one."""
    by_distance = layer.future.future_index == "distance"
    return 2**62 if by_distance else layer.future.num_positions - 1


SOURCES[FutureAttention] = _future_sources
