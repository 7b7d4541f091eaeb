"""Specialists: attentions added to that of a layer and weighted by a gate."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from memattn.checks import check_int, must
from memattn.nn import DomainGate
from memattn.nn.attention_specialist import AttentionSpecialist
from memattn.nn.base_attention import base_attention
from memattn.nn.causal_specialists import CausalSpecialists
from memattn.nn.domain_gate import ACTIVATIONS, check_new_name
from memattn.nn.gate_row import GateRow
from memattn.ops._dispatch import BACKENDS
from memattn.parts.base import (
    AddedPart,
    Cost,
    Exchange,
    PartConfig,
    PartOutput,
    Role,
    Sizes,
    View,
    register_part,
)
from memattn.parts.context import PartContext
from memattn.parts.gate_report import draw_gates, measure_gates
from memattn.parts.specialists_state import SpecialistsState

LOSSES = ("gate_entropy", "gate_sparsity", "gate_domain")
INPUTS = ("domain_prior", "domain_mask", "domain_weights")
TAUGHT = ("domain_labels", "domain_label_weights")  # inputs that only the loss uses
SCOPES = ("token", "prefix")


@register_part
@dataclass(frozen=True, kw_only=True)
class SpecialistsConfig(AddedPart):
    """Causal attentions in addition to that of the layer, initialised as its copies, and their
    gate.

    A new specialist is closed and does not change the output until it has a prior above 0.

    Attributes:
        num_specialists: Number of specialists; None means 1, or the number of names.
        names: Their names; None means ``specialist_0``, ``specialist_1``, ...
        prior: Prior of new specialists; 1 weighs as much as the base, 0 means closed.
        rank: Rank of their low-rank change of the base's weights; None means full weights.
        scope: Input of a token's gates: ``"token"``, the token itself, or ``"prefix"``, the mean
            over all tokens up to it.
        activation: ``"softmax"`` or ``"sigmoid"``, of the gate.
        temperature: Divisor of the gate's logits.
        top_k: Largest number of specialists that a token uses; None means all.
        gate_size: Hidden features of each specialist's row in the gate.
        entropy_coefficient: Coefficient of the loss ``gate_entropy`` in training.
        sparsity_coefficient: Coefficient of the loss ``gate_sparsity``.
        domain_coefficient: Coefficient of the loss ``gate_domain``, which teaches the gate the
            domain of a token if the caller passes ``domain_labels``.
        gate_lr: Learning rate of the gate in training; None means the rate of other weights.
        backend: Backend of the operator, ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.
        layers: Indices of its layers, from 0; None means all.
    """

    kind: ClassVar[str] = "specialists"
    place: ClassVar[str] = "beside_attention"
    reports: ClassVar[tuple[str, ...]] = LOSSES
    views: ClassVar[Mapping[str, View]] = {"gates": View(measure_gates, draw_gates)}
    inputs: ClassVar[tuple[str, ...]] = (*INPUTS, *TAUGHT)
    state_type: ClassVar[type[SpecialistsState]] = SpecialistsState

    num_specialists: int | None = None
    names: tuple[str, ...] | None = None
    prior: float = 0.0
    rank: int | None = None
    scope: str = "token"
    activation: str = "softmax"
    temperature: float = 1.0
    top_k: int | None = None
    gate_size: int = 64
    entropy_coefficient: float = 0.01
    sparsity_coefficient: float = 0.0
    domain_coefficient: float = 0.0
    gate_lr: float | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._name_specialists()
        for name in ("rank", "top_k"):
            if getattr(self, name) is not None:
                check_int(f"{self.path}.{name}", getattr(self, name), 1)
        check_int(f"{self.path}.gate_size", self.gate_size, 1)
        for name, choices in (
            ("scope", SCOPES),
            ("activation", ACTIVATIONS),
            ("backend", BACKENDS),
        ):
            if getattr(self, name) not in choices:
                must(
                    f"{self.path}.{name}",
                    f"be one of {', '.join(choices)}",
                    repr(getattr(self, name)),
                )
        if not 0.0 < self.temperature < float("inf"):
            must(f"{self.path}.temperature", "be positive and finite", self.temperature)
        coefficients = ("entropy_coefficient", "sparsity_coefficient", "domain_coefficient")
        if self.gate_lr is not None and not 0.0 < self.gate_lr < float("inf"):
            must(f"{self.path}.gate_lr", "be positive and finite", self.gate_lr)
        for name in ("prior", *coefficients):
            if not 0.0 <= getattr(self, name) < float("inf"):
                must(f"{self.path}.{name}", "be finite and at least 0", getattr(self, name))

    def _name_specialists(self) -> None:
        """Set names and number of the specialists."""
        n = self.num_specialists
        if n is not None:
            check_int(f"{self.path}.num_specialists", n, 0)
        names = self.names
        if names is None:
            names = [f"specialist_{i}" for i in range(1 if n is None else n)]
        if isinstance(names, str):
            must(f"{self.path}.names", "be a list of names", repr(names), TypeError)
        if n not in (None, len(names)):
            must(f"{self.path}.num_specialists", f"be None or {len(names)}, the number of names", n)
        for i, name in enumerate(names):
            check_new_name(name, names[:i])
        object.__setattr__(
            self, "names", tuple(names)
        )  # the dataclass is frozen; readers get the names
        object.__setattr__(self, "num_specialists", len(names))

    @property
    def losses(self) -> dict[str, float]:
        own = (self.entropy_coefficient, self.sparsity_coefficient, self.domain_coefficient)
        return dict(zip(LOSSES, own, strict=True))

    def role(self, name: str, parameter: Tensor) -> Role | None:
        if self.gate_lr is None or not name.startswith("gate."):
            return None
        return Role("weight" if parameter.dim() >= 2 else "norm", self.gate_lr)

    def check(self, sizes: Sizes, others: list[PartConfig]) -> None:
        super().check(sizes, others)
        if self.rank is None:
            return
        for part in (part for part in others if part.resolved_place == "attention"):
            with torch.device("meta"):
                attention = part.build(sizes, 0)
            if base_attention(attention) is None:
                must(
                    f"{self.path}.rank", f"be None beside {part.kind} without attention", self.rank
                )

    def build(self, sizes: Sizes, layer: int) -> CausalSpecialists:
        gate = DomainGate(
            sizes.hidden_size,
            scope=self.scope,
            activation=self.activation,
            temperature=self.temperature,
            top_k=self.top_k,
            gate_size=self.gate_size,
        )
        module = CausalSpecialists(
            sizes.hidden_size,
            sizes.num_heads,
            sizes.num_kv_heads,
            sizes.head_dim,
            gate,
            rank=self.rank,
            backend=self.backend,
        )
        assert self.names is not None
        for name in self.names:
            module.add_specialist(name, prior=self.prior)
        return module

    def begin(self, module: nn.Module, base: nn.Module) -> None:
        assert isinstance(module, CausalSpecialists)
        module.copy_base(base_attention(base))

    def run(self, module: nn.Module, hidden_states: Tensor, context: PartContext) -> PartOutput:
        assert context.attended is not None and context.base is not None
        prior, mask, weights = (context.inputs.get(name) for name in INPUTS)
        measured = context.measure_losses
        labels, label_weights = (context.inputs.get(n) if measured else None for n in TAUGHT)
        out, gates = module(
            hidden_states,
            context.attended,
            base_attention(context.base),
            positions=context.positions,
            present=context.present,
            prior=prior,
            mask=mask,
            override=weights,
            labels=labels,
            label_weights=label_weights,
            **context.attention_inputs(),
        )
        if not measured:
            return PartOutput(out)
        if gates is not None:
            return PartOutput(out, gates.losses)
        # only the base: no entropy, no shared work, nothing to select
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        zero = hidden_states.new_zeros((), dtype=wide)
        n = hidden_states.shape[0] * hidden_states.shape[1]
        count = zero + n if context.present is None else context.present.sum().to(zero)
        nothing = {**dict.fromkeys(LOSSES, (zero, count)), "gate_domain": (zero, zero)}
        return PartOutput(out, nothing)

    @staticmethod
    def init_weights(module: nn.Module, std: float) -> None:
        if isinstance(module, AttentionSpecialist):
            module.reset_parameters(std)
        if isinstance(module, GateRow):
            module.reset_parameters()

    def slots(self) -> int:
        """Largest number of specialists that a token uses."""
        assert self.num_specialists is not None
        n = self.num_specialists
        return n if self.top_k is None else min(self.top_k, n)

    def exchange(self, sizes: Sizes) -> Exchange:
        # a token may use any specialist, so keys and values of all are computed
        assert self.num_specialists is not None
        return Exchange(features=2 * self.num_specialists * sizes.num_kv_heads * sizes.head_dim)

    def operator_flops(self, sizes: Sizes, length: int) -> int:
        pairs = length * (length + 1) // 2
        return 4 * sizes.num_heads * sizes.head_dim * pairs * self.slots()

    def cost(self, sizes: Sizes, length: int, layer: int = 0) -> Cost:
        """Its cost with all specialists open; queries and outputs only for those a token uses."""
        with torch.device("meta"):
            module = self.build(sizes, layer)
        assert self.num_specialists is not None
        n, E = self.num_specialists, sizes.hidden_size
        inner, keys = (h * sizes.head_dim for h in (sizes.num_heads, sizes.num_kv_heads))
        gate = n * self.gate_size * (E + 1)
        token = 2 * inner * E * self.slots() + 2 * keys * E * n + gate
        flops = 2 * length * token + self.operator_flops(sizes, length)
        if self.rank is not None:  # products of the two low-rank matrices of each
            flops += 2 * n * self.rank * (2 * inner * E + 2 * keys * E)
        return Cost(sum(p.numel() for p in module.parameters()), flops)


def with_names(part: PartConfig, names: tuple[str, ...]) -> PartConfig:
    """The configuration with these specialists; other parts are returned unchanged."""
    if not isinstance(part, SpecialistsConfig):
        return part
    return replace(part, names=names, num_specialists=None)
