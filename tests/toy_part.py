"""A part of our own: a gated causal running mean. The package knows nothing of it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.checks import check_int
from memattn.parts import (
    AddedPart,
    PartContext,
    PartOutput,
    PartState,
    Role,
    Sizes,
    View,
    register_part,
)
from memattn.parts.views import visit_layers

LOSS, CARRY = "toy_loss", "toy_mean"


class RunningMean(nn.Module):
    """``gate(x_t) * (mean of v(x_j), j <= t, + v(x_{t-1}) + table row of t) + mean one layer up``.

    Its state is a sum and a count for each row, and the last value: recurrent tensors and a window.
    Its loss is the squared distance of a value and the mean before the gate.
    """

    def __init__(self, hidden_size: int, num_rows: int) -> None:
        super().__init__()
        self.value_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.gate_proj = nn.Linear(hidden_size, 1)
        self.table = nn.Parameter(torch.empty(num_rows, hidden_size))

    def gate(self, hidden_states: Tensor) -> Tensor:
        """How open the gate is, ``[B, T, 1]``."""
        return self.gate_proj(hidden_states).sigmoid()

    def forward(self, hidden_states: Tensor, context: PartContext) -> PartOutput:
        value, positions = self.value_proj(hidden_states), context.positions
        B, T, _ = value.shape
        positions = positions.expand(B, T)
        present = torch.ones_like(positions, dtype=torch.bool)
        if context.present is not None:
            present = context.present
            value = value.masked_fill(~present[..., None], 0.0)
        column = torch.arange(T, device=value.device)
        start = column - positions  # the same for two tokens of one document
        seen = (column <= column[:, None]) & (start[:, None] == start[..., None])
        seen = (seen & present[:, None]).to(value.dtype)  # [B, T, T]
        total, count = seen @ value, seen.sum(-1, keepdim=True)
        values = value
        if context.state is not None:
            state, zeros = context.state, value.new_zeros(B, value.shape[-1])
            total = total + state.read("sum", zeros)[:, None]
            count = count + state.read("count", zeros[:, :1])[:, None]
            state.write("sum", total[:, -1], history=total)
            state.write("count", count[:, -1], history=count)
            values = state.append("value", value)
        mean = total / count.clamp(min=1.0)
        previous = F.pad(values, (0, 0, 1, 0))[:, -1 - T : -1]
        previous = previous.masked_fill((positions <= 0)[..., None], 0.0)
        row = self.table[positions.clamp(0, len(self.table) - 1)]
        out = self.gate(hidden_states) * (mean + previous + row)
        if CARRY in context.carry:
            out = out + 0.5 * context.carry[CARRY]
        losses = {}
        if context.measure_losses:
            distance = (value - mean).square().mean(-1)
            losses[LOSS] = (distance.masked_fill(~present, 0.0).sum(), present.sum().to(mean.dtype))
        return PartOutput(out, losses, {CARRY: mean})


def measure_gates(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The gates of all layers, ``[layers, T]``."""
    layers = [module for module in model.modules() if isinstance(module, RunningMean)]
    found: dict[nn.Module, Tensor] = {}

    def measure(layer: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        found[layer] = layer.gate(args[0]).mean((0, 2)).cpu()

    visit_layers(model, input_ids, layers, measure)
    return torch.stack([found[layer] for layer in layers])


def draw_gates(figure: Any, gates: Tensor) -> None:
    """A heat map, layers over positions."""
    axes = figure.subplots()
    axes.imshow(gates.numpy(), vmin=0.0, vmax=1.0, aspect="auto")
    axes.set(title="gates of the running mean", xlabel="position", ylabel="layer")


@register_part
@dataclass(frozen=True, kw_only=True)
class ToyConfig(AddedPart):
    """Where the running mean stands, and what it learns with."""

    kind: ClassVar[str] = "toy"
    place: ClassVar[str] = "after_attention"
    reports: ClassVar[tuple[str, ...]] = (LOSS,)
    carries: ClassVar[tuple[str, ...]] = (CARRY,)
    views: ClassVar[dict[str, View]] = {"running_mean": View(measure_gates, draw_gates)}

    where: str = "after_attention"
    num_rows: int = 4
    coefficient: float = 0.1
    table_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int(f"{self.path}.num_rows", self.num_rows, 1)

    @property
    def resolved_place(self) -> str:
        return self.where

    def run(self, module: nn.Module, hidden_states: Tensor, context: PartContext) -> PartOutput:
        output = super().run(module, hidden_states, context)
        if context.attended is None:
            return output
        return output._replace(hidden_states=output.hidden_states - 0.5 * context.attended)

    @property
    def losses(self) -> dict[str, float]:
        return {LOSS: self.coefficient}

    @property
    def reach(self) -> int:
        return self.num_rows

    def build(self, sizes: Sizes, layer: int) -> nn.Module:
        return RunningMean(sizes.hidden_size, self.num_rows)

    def new_state(self) -> PartState:
        return PartState(self.kind, window_size=2)

    @staticmethod
    def init_weights(module: nn.Module, std: float) -> None:
        if isinstance(module, RunningMean):
            nn.init.normal_(module.table, std=std)

    def role(self, name: str, parameter: Tensor) -> Role | None:
        return Role("table", self.table_lr) if name == "table" else None
