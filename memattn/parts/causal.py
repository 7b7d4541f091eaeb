"""Causal attention: a token sees all earlier tokens and persistent keys."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memattn.checks import check_int, must
from memattn.nn import PersistentAttention, SegmentedAttention
from memattn.nn.rotary import apply_rotary
from memattn.ops import segmented_attention
from memattn.ops._dispatch import BACKENDS
from memattn.parts.base import (
    Exchange,
    PartConfig,
    PartOutput,
    Role,
    Sizes,
    StepSources,
    register_part,
)
from memattn.parts.context import PartContext
from memattn.parts.state import PartState
from memattn.parts.views import MASSES_BY_SOURCE

STEP_BACKENDS = ("auto", "cpp")


@dataclass(frozen=True, kw_only=True)
class AttentionPart(PartConfig):
    """Base of parts that replace attention and run one of the operators.

    Attributes:
        backend: Backend of the operator, ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.
    """

    place: ClassVar[str] = "attention"
    backends: ClassVar[tuple[str, ...]] = BACKENDS

    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.backend not in self.backends:
            must("attention.backend", f"be one of {', '.join(self.backends)}", repr(self.backend))

    def heads(self, sizes: Sizes) -> dict[str, Any]:
        """Arguments for ``MultiHeadAttention``, and the backend."""
        return dict(
            hidden_size=sizes.hidden_size,
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            backend=self.backend,
        )

    def visible(self, position: int, sizes: Sizes) -> int:
        """Keys that the query at a position sees."""
        return position + 1

    def exchange(self, sizes: Sizes) -> Exchange:
        return Exchange(features=2 * sizes.num_kv_heads * sizes.head_dim)

    def operator_flops(self, sizes: Sizes, length: int) -> int:
        pairs = sum(self.visible(i, sizes) for i in range(length))
        return 4 * sizes.num_heads * sizes.head_dim * pairs


@register_part
@dataclass(frozen=True, kw_only=True)
class CausalConfig(AttentionPart):
    """A token sees all earlier tokens.

    Attributes:
        num_persistent_tokens: Learned keys and values that every token sees.
        backend: Backend of the operator, ``"auto"``, ``"triton"``, ``"cpp"``, ``"reference"`` or
            ``"flex"``.
    """

    kind: ClassVar[str] = "causal"
    backends: ClassVar[tuple[str, ...]] = (*BACKENDS, "flex")

    num_persistent_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("attention.num_persistent_tokens", self.num_persistent_tokens, 0)

    @property
    def spans(self) -> tuple[int | None, int | None]:
        """Segment length and window; None if there is none."""
        return None, None

    @property
    def sinks(self) -> int:
        """Sink tokens: first tokens that all later ones see, besides segment and window."""
        return 0

    def visible(self, position: int, sizes: Sizes) -> int:
        return position + 1 + self.num_persistent_tokens

    def exchange(self, sizes: Sizes) -> Exchange:
        return super().exchange(sizes)._replace(spans=self.spans, first=self.sinks)

    def build(self, sizes: Sizes, layer: int) -> nn.Module:
        segment_len, window_size = self.spans
        return SegmentedAttention(
            **self.heads(sizes),
            segment_len=segment_len,
            window_size=window_size,
            num_sink_tokens=self.sinks,
            num_persistent_tokens=self.num_persistent_tokens,
        )

    def run(self, module: nn.Module, hidden_states: Tensor, context: PartContext) -> PartOutput:
        return PartOutput(module(hidden_states, **context.attention_inputs()))

    def step_sources(self, module: nn.Module) -> StepSources | None:
        if type(self).run is not CausalConfig.run or type(module) is not SegmentedAttention:
            return None
        if module.backend not in STEP_BACKENDS or module.num_sink_tokens or module.softcap:
            return None
        persistent = (module.persistent_key, module.persistent_value)
        return StepSources(module.segment_len, module.window_size, *persistent)

    def attend_rows(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, context: PartContext
    ) -> Tensor:
        layer: Any = module
        return layer.attend(query, key, value, **context.sequence_bounds())

    def new_state(self) -> PartState:
        return self.state_type(self.kind, *self.spans)

    @staticmethod
    def init_weights(module: nn.Module, std: float) -> None:
        if isinstance(module, PersistentAttention):
            for persistent in (module.persistent_key, module.persistent_value):
                if persistent is not None:
                    nn.init.normal_(persistent, std=std)

    def role(self, name: str, parameter: Tensor) -> Role | None:
        return Role("memory") if name.startswith("persistent_") else None


def _sources(
    layer: SegmentedAttention,
    hidden_states: Tensor,
    *,
    rotary: tuple[Tensor, Tensor] | None,
    cache: None = None,
    change_value: Any = None,
    **bounds: Any,
) -> dict[str, Tensor]:
    """Attention mass ``[B, H, T]`` on tokens and on persistent keys."""
    query, key, value = layer.split_heads(hidden_states)
    if rotary is not None:
        query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)

    def lse(key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return segmented_attention(
            query, key, value, softcap=layer.softcap, backend=layer.backend, **bounds, **options
        ).lse.double()

    spans = {"segment_len": layer.segment_len, "window_size": layer.window_size}
    parts = {"tokens": lse(key, value, **spans)}
    if layer.num_sink_tokens and any(spans.values()):
        whole = lse(key, value, **spans, num_sink_tokens=layer.num_sink_tokens)
        beside = (parts["tokens"] - whole).exp().clamp(max=1.0)  # -inf for a row without keys
        parts["sinks"] = whole + torch.log1p(-beside).nan_to_num(nan=-torch.inf)
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


MASSES_BY_SOURCE[SegmentedAttention] = _sources
