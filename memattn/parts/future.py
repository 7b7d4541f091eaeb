"""Future attention: a token sees all earlier tokens and learned keys for the positions ahead."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from memattn.checks import check_bool, check_int, check_rank, must, plain_values
from memattn.nn import FutureAttention, FutureTable
from memattn.nn.future_attention import KEY_SOURCES
from memattn.ops import future_attention, segmented_attention
from memattn.ops.future_attention import LOSS_TYPES
from memattn.parts.base import (
    Exchange,
    PartConfig,
    PartOutput,
    Role,
    Sizes,
    StepSources,
    View,
    is_bare,
    register_part,
)
from memattn.parts.causal import STEP_BACKENDS, AttentionPart, CausalConfig
from memattn.parts.context import PartContext
from memattn.parts.views import (
    MASSES_BY_SOURCE,
    attention_layers,
    draw_attention_mass,
    visit_layers,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS = "future_loss"


class FutureMeasures(NamedTuple):
    """Result of ``measure_future``, float64; one row for each layer with future keys."""

    layers: list[int]  # their numbers among all attention layers
    mass: Tensor  # [layers, H], share of attention on future keys, averaged over the positions
    cosine: Tensor  # [layers, T], predicted against true future output; NaN where none is defined


def measure_future(model: nn.Module, input_ids: Tensor) -> FutureMeasures:
    """Attention mass on future keys, and cosine of predicted and true future output.

    The mass is exact: ``1 - exp(lse of the past - lse of both)``. The predicted output is
    ``out_future`` of the operator. The true output is the target of its loss: the same with the
    real keys and values of the next positions. Positions whose band leaves the sequence are not in
    the loss and have no cosine.

    Args:
        model: A model with ``FutureAttention`` layers, called with ``input_ids`` and
            ``use_cache=False``. It is in evaluation mode during the call.
        input_ids: ``[B, T]``, without padding, with at least one whole band.

    Returns:
        Mass and cosine, averaged over the batch, and over positions or heads.

    Raises:
        TypeError: If the model has no such layer.
        ValueError: If the text is shorter than a band.
    """
    check_rank("input_ids", input_ids, "B T")
    everything = attention_layers(model)
    numbers = [i for i, layer in enumerate(everything) if isinstance(layer, FutureAttention)]
    layers: list[Any] = [everything[i] for i in numbers]
    if not layers:
        must("model", "have layers of kind FutureAttention", type(model).__name__, TypeError)
    least = 1 + min(layers[0].future_dim, _last_row(layers[0]))
    if input_ids.shape[1] < least:
        must("input_ids", f"have at least {least} tokens, one whole band", input_ids.shape[1])
    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def measure(layer: Any, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        mass = _sources(layer, *args, **options)["future"]
        cosine = _cosine(layer, *args, **options)
        found[layer] = mass.mean((0, 2)).cpu(), cosine.mean((0, 1)).cpu()

    visit_layers(model, input_ids, layers, measure)
    masses, cosines = zip(*(found[layer] for layer in layers), strict=True)
    return FutureMeasures(numbers, torch.stack(masses), torch.stack(cosines))


def draw_future(figure: "Figure", measures: FutureMeasures) -> None:
    """Draw mass and cosine as two heat maps."""
    layers, mass, cosine = measures
    figure.set_size_inches(12.0, 1.8 + 0.3 * max(8, len(mass)))
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    image = draw_attention_mass(left, "share of attention on future keys", mass)
    left.set_yticks(range(len(layers)), map(str, layers))
    figure.colorbar(image, ax=left, shrink=0.85)  # pyright: ignore[reportUnknownMemberType]
    image = right.imshow(
        cosine.numpy(), vmin=-1.0, vmax=1.0, cmap="RdBu", aspect="auto", interpolation="nearest"
    )
    figure.colorbar(image, ax=right, shrink=0.85)  # pyright: ignore[reportUnknownMemberType]
    right.set(title="cosine of predicted and true future output", xlabel="position")
    means = zip(layers, plain_values(cosine.nanmean(1)), strict=True)
    right.set_yticks(range(len(layers)), [f"{i}: {mean:+.2f}" for i, mean in means])
    right.set_ylabel("layer: mean")


@register_part
@dataclass(frozen=True, kw_only=True)
class FutureConfig(AttentionPart):
    """A token sees all earlier tokens, and learned keys for the positions ahead.

    Attributes:
        future_dim: Positions that a token sees ahead, at most ``max_position_embeddings - 1``
            unless ``source`` is ``"relative"``.
        source: Where future keys come from: ``"table"``, parameters at absolute positions,
            ``"relative"``, parameters by distance, or ``"computed"``, the table plus a low-rank
            projection of the token ``future_dim`` positions earlier.
        source_rank: Rank of that projection. Only for ``"computed"``.
        start_layer: The first layer with future keys, counted from 0.
        end_layer: The layer after the last one with future keys; None means all from
            ``start_layer`` on. The other layers are plain causal attention.
        loss_type: ``"mse"`` or ``"cosine"``: the loss between the future part of each layer's
            output and the output of the real future keys. None means no such loss.
        loss_coefficient: Factor of the mean over layers when it is added to the training loss. 0
            measures the loss without training on it.
        detach_target: Whether the loss gives no gradient to the real keys, values and queries of
            its target.
        backend: Backend of the operator, ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.
    """

    kind: ClassVar[str] = "future"
    reports: ClassVar[tuple[str, ...]] = (LOSS,)
    views: ClassVar[dict[str, View]] = {"future": View(measure_future, draw_future)}

    future_dim: int = 64
    source: str = "table"
    source_rank: int = 16
    start_layer: int = 0
    end_layer: int | None = None
    loss_type: str | None = "mse"
    loss_coefficient: float = 1.0
    detach_target: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.path
        check_int(f"{name}.future_dim", self.future_dim, 1)
        if self.source not in KEY_SOURCES:
            must(f"{name}.source", f"be one of {', '.join(KEY_SOURCES)}", repr(self.source))
        check_int(f"{name}.source_rank", self.source_rank, 1)
        check_int(f"{name}.start_layer", self.start_layer, 0)
        if self.end_layer is not None:
            check_int(f"{name}.end_layer", self.end_layer, self.start_layer + 1)
        if self.loss_type is not None and self.loss_type not in LOSS_TYPES:
            allowed = f"be None or one of {', '.join(LOSS_TYPES)}"
            must(f"{name}.loss_type", allowed, repr(self.loss_type))
        if not 0.0 <= self.loss_coefficient < float("inf"):
            must(f"{name}.loss_coefficient", "be finite and at least 0", self.loss_coefficient)
        check_bool(f"{name}.detach_target", self.detach_target)

    @property
    def limits_length(self) -> bool:
        return self.source != "relative"

    @property
    def reach(self) -> int:
        return self.future_dim

    @property
    def losses(self) -> dict[str, float]:
        return {} if self.loss_type is None else {LOSS: self.loss_coefficient}

    def layers(self, num_hidden_layers: int) -> range:
        """The layers with future keys."""
        end = num_hidden_layers if self.end_layer is None else self.end_layer
        return range(self.start_layer, end)

    def check(self, sizes: Sizes, others: list[PartConfig]) -> None:
        name, n = self.path, sizes.num_layers
        if self.start_layer >= n:
            must(f"{name}.start_layer", f"be below num_hidden_layers={n}", self.start_layer)
        if self.end_layer is not None and self.end_layer > n:
            must(f"{name}.end_layer", f"be at most num_hidden_layers={n}", self.end_layer)
        limit = sizes.max_positions - 1
        if self.limits_length and self.future_dim > limit:
            allowed = f"be at most max_position_embeddings - 1 = {limit}"
            must(f"{name}.future_dim", allowed, self.future_dim)

    def exchange(self, sizes: Sizes) -> Exchange:
        # the loss compares with the real keys and values of the positions ahead
        ahead = 0 if self.loss_type is None else self.future_dim
        return super().exchange(sizes)._replace(ahead=ahead)

    def in_layer(self, layer: int, sizes: Sizes) -> PartConfig:
        inside = layer in self.layers(sizes.num_layers)
        return self if inside else CausalConfig(backend=self.backend)

    def build(self, sizes: Sizes, layer: int) -> nn.Module:
        return FutureAttention(
            **self.heads(sizes),
            future_dim=self.future_dim,
            num_positions=sizes.max_positions,
            source=self.source,
            source_rank=self.source_rank,
            loss_type=self.loss_type,
            detach_target=self.detach_target,
        )

    def run(self, module: nn.Module, hidden_states: Tensor, context: PartContext) -> PartOutput:
        layer: Any = module
        future_angles, rotary = None, context.rotary_embedding
        if rotary is not None:
            rows = layer.future_positions(hidden_states, offset=context.offset)
            angles = lambda: rotary(rows, hidden_states.dtype)
            # keyed by what decides the rows, not by their number, which compilation would make a
            # constant
            future_angles = context.once((self.kind, self.source, self.future_dim), angles)
        out, loss = layer(
            hidden_states,
            future_rotary=future_angles,
            output_loss=context.measure_losses,
            **context.attention_inputs(),
        )
        if loss is None:
            return PartOutput(out)
        count = self._count(layer, context, hidden_states.shape[0]).to(loss.dtype)
        return PartOutput(out, {LOSS: (loss * count, count)})

    def step_sources(self, module: nn.Module) -> StepSources | None:
        layer: Any = module
        if type(self).run is not FutureConfig.run or type(module) is not FutureAttention:
            return None
        if layer.backend not in STEP_BACKENDS:
            return None
        if type(layer.future) is not FutureTable or not is_bare(layer.future):
            return None
        table = (layer.future.key, layer.future.value)
        return StepSources(None, None, None, None, *table, layer.future_dim)

    def attend_rows(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, context: PartContext
    ) -> Tensor:
        layer: Any = module
        future_angles, rotary = None, context.rotary_embedding
        if rotary is not None:
            rows = layer.future.num_rows(key.shape[2])
            cos, sin = rotary.table(rows + 1)
            future_angles = cos[None, None, 1 : rows + 1], sin[None, None, 1 : rows + 1]
        bounds = context.sequence_bounds()
        return layer.attend(query, key, value, future_rotary=future_angles, **bounds)

    def _count(self, layer: FutureAttention, context: PartContext, B: int) -> Tensor:
        """Number of positions in the loss: those whose whole band is in the sequence."""
        positions = context.positions
        last = (positions + self.future_dim).clamp(max=_last_row(layer))
        counted = (last > positions) & (last < context.lengths()) & (positions >= 0)
        counted = counted.expand(B, -1)
        return (counted if context.present is None else counted & context.present).sum()

    @staticmethod
    def init_weights(module: nn.Module, std: float) -> None:
        if isinstance(module, FutureTable):
            nn.init.normal_(module.key, std=std)
            nn.init.normal_(module.value, std=std)

    def role(self, name: str, parameter: Tensor) -> Role | None:
        return Role("table") if name in ("future.key", "future.value") else None

    def visible(self, position: int, sizes: Sizes) -> int:
        ahead = self.future_dim
        if self.limits_length:
            ahead = min(ahead, sizes.max_positions - 1 - position)
        return position + 1 + ahead


def _sources(
    layer: FutureAttention, hidden_states: Tensor, *, output_loss: bool | None = None, **tokens: Any
) -> dict[str, Tensor]:
    """Attention mass ``[B, H, T]`` on tokens and on future keys."""
    inputs, options = layer.operands(hidden_states, **tokens)
    shared = ("cu_seqlens", "seq_start", "seq_end", "query_offset", "backend")
    past = segmented_attention(*inputs[:3], **{name: options[name] for name in shared}).lse
    both = future_attention(*inputs, **options).lse
    future = -torch.expm1((past - both).double()).clamp(max=0.0)
    return {"tokens": 1.0 - future, "future": future}


def _cosine(
    layer: FutureAttention, hidden_states: Tensor, *, output_loss: bool | None = None, **tokens: Any
) -> Tensor:
    """Cosine ``[B, H, T]`` of predicted and true future output; NaN without a whole band."""
    inputs, options = layer.operands(hidden_states, **tokens)
    query, key, value = inputs[:3]
    T = query.shape[2]
    predicted = future_attention(*inputs, **options).out_future
    real: dict[str, Any] = {
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


MASSES_BY_SOURCE[FutureAttention] = _sources
