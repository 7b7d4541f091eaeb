"""Adds an attention part, such as Titans, to a layer that keeps its own attention."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memattn.checks import must
from memattn.nn import RotaryEmbedding
from memattn.nn.rope_scaling import check_rope, make_rotary
from memattn.parts.base import (
    PARTS,
    AddedPart,
    Exchange,
    PartConfig,
    PartOutput,
    Role,
    Sizes,
    make_part,
    register_part,
)
from memattn.parts.context import PartContext
from memattn.parts.state import PartState


class ScaledAttention(nn.Module):
    """An attention module and a scale of its output, which starts at zero.

    Args:
        attention: Module of the part.
        hidden_size: Features of its output.
        rotary: Makes rotary angles if the model passes none; None means no rotation then.
    """

    def __init__(
        self, attention: nn.Module, hidden_size: int, rotary: RotaryEmbedding | None
    ) -> None:
        super().__init__()
        self.attention = attention
        self.scale = nn.Parameter(torch.zeros(hidden_size))
        self.rotary = rotary


@register_part
@dataclass(frozen=True, kw_only=True)
class AttentionLayerConfig(AddedPart):
    """An attention part, such as Titans, added to layers that keep their own attention.

    Its output is scaled by a vector that starts at zero, so at first the model is unchanged.

    Attributes:
        attention: The part, or its kind and fields: ``{"kind": "titans", "variant": "mac"}``.
        at: Its place in the layer; any but those of attention.
        rope_theta: Base of the rotary angles of its queries and keys if the model passes none, as
            pretrained models do; None means no rotation.
        rope_parameters: Scaled frequencies of these angles, as ``MemAttnConfig`` has them, such as
            ``{"rope_type": "linear", "factor": 4.0}``; their base is ``rope_theta``.
        layers: Indices of its layers, from 0; None means all.
    """

    kind: ClassVar[str] = "attention_layer"
    place: ClassVar[str] = "before_attention"
    repeatable: ClassVar[bool] = True

    attention: PartConfig | Mapping[str, Any]
    at: str = "before_attention"
    rope_theta: float | None = 10000.0
    rope_parameters: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        part = make_part(self.attention, f"{self.path}.attention", attention=True)
        object.__setattr__(self, "attention", part)  # frozen
        if self.at == "beside_attention":
            must(f"{self.path}.at", "be a place of its own", repr(self.at))
        if self.rope_theta is not None and not self.rope_theta > 0:
            must(f"{self.path}.rope_theta", "be positive", self.rope_theta)
        if self.rope_parameters is not None:
            if self.rope_theta is None:
                must(f"{self.path}.rope_parameters", "be None without rope_theta", "parameters")
            if "rope_theta" in self.rope_parameters:
                must(f"{self.path}.rope_parameters", "leave rope_theta to its field", "a value")
            check_rope(self.rope_parameters, f"{self.path}.rope_parameters")

    @property
    def part(self) -> PartConfig:
        """The attention part."""
        assert isinstance(self.attention, PartConfig)
        return self.attention

    @property
    def resolved_place(self) -> str:
        return self.at

    @property
    def limits_length(self) -> bool:
        return self.part.limits_length

    @property
    def carries(self) -> tuple[str, ...]:
        return self.part.carries

    @property
    def needs_state(self) -> bool:
        return self.part.needs_state

    @property
    def reach(self) -> int:
        return self.part.reach

    @property
    def losses(self) -> dict[str, float]:
        return self.part.losses

    def check(self, sizes: Sizes, others: list[PartConfig]) -> None:
        super().check(sizes, others)
        self.part.check(sizes, others)
        for other in others:
            if both := set(self.carries) & set(other.carries):
                must(f"{self.path}.attention", f"carry nothing that {other.kind} does", min(both))

    def build(self, sizes: Sizes, layer: int) -> nn.Module:
        rotary = None
        if self.rope_theta is not None:
            rope = {**(self.rope_parameters or {}), "rope_theta": self.rope_theta}
            rotary = make_rotary(sizes.head_dim, rope, sizes.max_positions)
        return ScaledAttention(self.part.build(sizes, layer), sizes.hidden_size, rotary)

    def build_shared(self, sizes: Sizes) -> nn.Module | None:
        return self.part.build_shared(sizes)

    def run(self, module: nn.Module, hidden_states: Tensor, context: PartContext) -> PartOutput:
        assert isinstance(module, ScaledAttention)
        if context.rotary is None and module.rotary is not None:
            angles = module.rotary(context.positions, hidden_states.dtype)
            context = replace(context, rotary=angles, rotary_embedding=module.rotary)
        output = self.part.run(module.attention, hidden_states, context)
        return output._replace(hidden_states=module.scale * output.hidden_states)

    def chapter_layout(self, sizes: Sizes) -> Mapping[str, int]:
        return self.part.chapter_layout(sizes)

    def chapter_tensors(self, hidden_states: Tensor) -> Mapping[str, Tensor]:
        return self.part.chapter_tensors(hidden_states)

    def new_state(self) -> PartState:
        return self.part.new_state()

    @staticmethod
    def init_weights(module: nn.Module, std: float) -> None:
        if isinstance(module, ScaledAttention):
            nn.init.zeros_(module.scale)
        for part in PARTS.values():
            if part.place == "attention":
                part.init_weights(module, std)

    def role(self, name: str, parameter: Tensor) -> Role | None:
        return self.part.role(name.removeprefix("attention."), parameter)

    def exchange(self, sizes: Sizes) -> Exchange:
        return self.part.exchange(sizes)

    def operator_flops(self, sizes: Sizes, length: int) -> int:
        return self.part.operator_flops(sizes, length)

    def shared_cost(self, sizes: Sizes, length: int) -> Any:
        return self.part.shared_cost(sizes, length)

    def to_dict(self) -> dict[str, Any]:
        layers = None if self.layers is None else list(self.layers)
        fields: dict[str, Any] = {"at": self.at, "rope_theta": self.rope_theta, "layers": layers}
        if self.rope_parameters is not None:
            fields["rope_parameters"] = dict(self.rope_parameters)
        return {"kind": self.kind, "attention": self.part.to_dict(), **fields}
