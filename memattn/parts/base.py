"""Base class of the parts of a decoder layer; the decoder itself knows no part by name.

A part is a frozen dataclass: its fields are its configuration, its methods build its module, run
it, and describe its losses, state, parameters, views and cost. ``register_part`` registers it; a
configuration then names it by ``kind``. ``docs/architecture.md`` shows a whole part.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from memattn.checks import check_int, must
from memattn.parts.context import PartContext
from memattn.parts.state import PartState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLACES = ("before_attention", "attention", "beside_attention", "after_attention", "after_mlp")
ROLES = ("weight", "memory", "table", "norm")
Part = TypeVar("Part", bound="type[PartConfig]")


class Sizes(NamedTuple):
    """Sizes of the model that a part belongs to."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    max_positions: int
    intermediate_size: int | None = None  # of the MLP; None if unknown
    mlp: str = "swiglu"
    norm: str = "rms"
    norm_eps: float = 1e-6


class Role(NamedTuple):
    """The role of a parameter, which decides its learning rate and weight decay.

    ``kind`` is one of ``ROLES``: only a ``"weight"`` decays, and ``"memory"`` has the rate
    ``memory_lr``. ``learning_rate`` overrides the rate.
    """

    kind: str
    learning_rate: float | None = None


class PartOutput(NamedTuple):
    """What a part returns for hidden states ``[B, T, E]``."""

    hidden_states: (
        Tensor  # [B, T, E], added to the residual; for "beside_attention" it replaces attended
    )
    losses: Mapping[str, tuple[Tensor, Tensor]] = {}  # by name: sum and count
    carry: Mapping[str, Tensor] = {}  # by name: tensors for the next layer


class StepSources(NamedTuple):
    """Keys that a new token sees: earlier tokens, persistent keys, rows of a table by position."""

    segment_len: int | None = None
    window_size: int | None = None
    persistent_key: Tensor | None = None  # [Hkv, P, D]
    persistent_value: Tensor | None = None
    table_key: Tensor | None = None  # [H, R, D], row c stands for position c + 1
    table_value: Tensor | None = None
    future_dim: int = 0  # rows of the table that it sees


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_bare(module: nn.Module) -> bool:
    """Whether a call of the module only runs the ``forward`` of its class, without hooks."""
    own = module.__dict__
    return "forward" not in own and not any(own[hooks] for hooks in HOOKS)


class View(NamedTuple):
    """A picture of a part on a text: ``memattn plot <view> MODEL --text TEXT``."""

    measure: Callable[[nn.Module, Tensor], Any]  # of a model and tokens [B, T]
    draw: Callable[["Figure", Any], None]  # draws what ``measure`` returned into an empty figure


class Cost(NamedTuple):
    """Parameters and forward FLOPs of a part in one layer."""

    parameters: int
    flops: int


class Exchange(NamedTuple):
    """What a process must receive in one layer if processes share the tokens of a sequence."""

    features: int = 0  # numbers per token: its keys and values
    spans: tuple[int | None, int | None] = (
        None,
        None,
    )  # segment and window; both None: all earlier tokens
    first: int = 0  # first tokens of the sequence, in addition
    ahead: int = 0  # tokens after its own tokens
    state: int = 0  # float32 numbers of a state passed from process to process


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """Base of all parts.

    Class attributes:
        kind: Its name in a configuration, an identifier.
        place: Its place in a layer, one of ``PLACES``. A part at ``"attention"`` replaces
            attention. A part at ``"beside_attention"`` gets the normed hidden states that attention
            gets, attention's output in ``context.attended`` and its module in ``context.base``; its
            own output replaces that output. All other parts get hidden states after their own norm,
            and their output is added to the residual. A part whose fields decide between places
            other than attention's overrides ``resolved_place``.
        repeatable: Whether ``MemAttnConfig.parts`` may contain it more than once.
        reports: Names of the losses and measures that it may return.
        inputs: Names of extra tensors that a caller of the model may pass, such as sample weights;
            ``run`` finds them in ``context.inputs``. A tensor of one dimension is for all samples;
            others have the batch first.
        views: Its pictures by name.
        state_type: Class of its state in the cache.
        limits_length: Whether it has parameters for ``max_position_embeddings`` positions only.
    """

    kind: ClassVar[str]
    place: ClassVar[str]
    repeatable: ClassVar[bool] = False
    reports: ClassVar[tuple[str, ...]] = ()
    inputs: ClassVar[tuple[str, ...]] = ()
    views: ClassVar[Mapping[str, View]] = {}
    state_type: ClassVar[type[PartState]] = PartState

    @property
    def path(self) -> str:
        """Its name in error messages."""
        return "attention" if self.place == "attention" else f"parts.{self.kind}"

    @property
    def resolved_place(self) -> str:
        """Its place with these fields, one of ``PLACES``."""
        return self.place

    @property
    def limits_length(self) -> bool:
        return False

    @property
    def carries(self) -> tuple[str, ...]:
        """Names of the tensors that it may pass to the next layer."""
        return ()

    @property
    def needs_state(self) -> bool:
        """Whether ``run`` needs its state to be right for tokens after cached ones.

        If False, a state may still save work.
        """
        return True

    @property
    def reach(self) -> int:
        """Tokens in its longest window or segment; 0 without one. The audit uses longer texts."""
        return 0

    @property
    def losses(self) -> dict[str, float]:
        """Losses that it returns if they are measured, with their coefficients in training."""
        return {}

    def check(self, sizes: Sizes, others: "list[PartConfig]") -> None:
        """Raise ValueError unless it fits the model and the model's other parts."""

    def in_layer(self, layer: int, sizes: Sizes) -> "PartConfig | None":
        """The part for a layer: this one, a replacement, or None."""
        return self

    def build(self, sizes: Sizes, layer: int) -> nn.Module:
        """Its module for a layer."""
        raise NotImplementedError(f"{type(self).__name__} must define build")

    def build_shared(self, sizes: Sizes) -> nn.Module | None:
        """A module that all its layers share, or None.

        The model holds it once, as ``shared_parts.<name>``; ``run`` finds it in
        ``context.shared_module``.
        """
        return None

    def run(self, module: nn.Module, hidden_states: Tensor, context: PartContext) -> PartOutput:
        """Call its module with ``hidden_states [B, T, E]``."""
        return module(hidden_states, context)

    def chapter_layout(self, sizes: Sizes) -> Mapping[str, int]:
        """The tensors that it keeps per token, in one layer, of a text that becomes a chapter.

        Number of features by tensor name; empty if it takes no chapters. ``run`` finds the tensors
        of open chapters in ``context.chapters``, each with a weight (1 by default).
        """
        return {}

    def chapter_tensors(self, hidden_states: Tensor) -> Mapping[str, Tensor]:
        """The tensors ``[n, features]`` of a text with these normed hidden states ``[n, E]``."""
        return {}

    def new_state(self) -> PartState:
        """The empty state of one layer."""
        return self.state_type(self.kind)

    def step_sources(self, module: nn.Module) -> StepSources | None:
        """The keys that a new token sees, for a part that replaces attention.

        None if one operator call cannot compute its attention (see ``memattn.models.plain_step``).
        """
        return None

    def attend_rows(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, context: PartContext
    ) -> Tensor:
        """Head outputs ``[B, H, T, D]`` for the newest queries, if ``step_sources`` is not None.

        Queries and keys are rotated; keys and values are the cached ones followed by the new ones.
        """
        raise NotImplementedError(f"{type(self).__name__} must define attend_rows")

    @staticmethod
    def init_weights(module: nn.Module, std: float) -> None:
        """Initialise one module of the model, if its class belongs to this part.

        Called for every module of the model after transformers' own rules, which know layers of
        torch; use functions of ``torch.nn.init``.
        """

    def begin(self, module: nn.Module, base: nn.Module) -> None:
        """Copy weights of attention into its new module, for a part beside attention.

        Called after ``init_weights`` with the attention module. Weights that transformers has
        loaded (``_is_hf_initialized``) are kept.
        """

    def role(self, name: str, parameter: Tensor) -> Role | None:
        """The role of a parameter of its module or of its shared module.

        None lets shape and module decide.
        """
        return None

    def operator_flops(self, sizes: Sizes, length: int) -> int:
        """FLOPs of its operator for one sequence, without products with weight matrices."""
        return 0

    def cost(self, sizes: Sizes, length: int, layer: int = 0) -> Cost:
        """Its cost for one sequence of ``length`` tokens in one layer."""
        with torch.device("meta"):
            parameters = dict(self.build(sizes, layer).named_parameters())
        matrices = sum(
            p.numel()
            for name, p in parameters.items()
            if p.dim() == 2 and (self.role(name, p) or Role("weight")).kind == "weight"
        )
        flops = 2 * length * matrices + self.operator_flops(sizes, length)
        return Cost(sum(p.numel() for p in parameters.values()), flops)

    def shared_cost(self, sizes: Sizes, length: int) -> Cost:
        """The cost of the shared module, counted once for all layers."""
        with torch.device("meta"):
            shared = self.build_shared(sizes)
        return Cost(0 if shared is None else sum(p.numel() for p in shared.parameters()), 0)

    def exchange(self, sizes: Sizes) -> Exchange:
        """What a process that holds some tokens of a sequence must receive from the others."""
        return Exchange()

    def to_dict(self) -> dict[str, Any]:
        """Kind and fields as values that JSON can hold."""
        values = {k: list(v) if _is_tuple(v) else v for k, v in asdict(self).items()}
        return {"kind": self.kind, **values}


@dataclass(frozen=True, kw_only=True)
class AddedPart(PartConfig):
    """Base of parts in addition to attention, in all or some layers.

    Attributes:
        layers: Indices of its layers, from 0; None means all.
    """

    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.layers is not None:
            for layer in self.layers:
                check_int(f"{self.path}.layers", layer, 0)
            object.__setattr__(
                self, "layers", tuple(self.layers)
            )  # the dataclass is frozen; JSON gives lists

    def check(self, sizes: Sizes, others: list[PartConfig]) -> None:
        if self.layers is not None and (not self.layers or max(self.layers) >= sizes.num_layers):
            allowed = f"name layers from 0 to {sizes.num_layers - 1}"
            must(f"{self.path}.layers", allowed, list(self.layers))

    def in_layer(self, layer: int, sizes: Sizes) -> PartConfig | None:
        return self if self.layers is None or layer in self.layers else None


PARTS: dict[str, type[PartConfig]] = {}


def register_part(part: Part) -> Part:
    """Register a part under its kind, so that configurations and saved files can name it.

    Used as a decorator of a ``PartConfig`` subclass, in the package or outside.

    Raises:
        ValueError: If another part has the kind, or ``kind`` or ``place`` is invalid.
    """
    taken = PARTS.get(part.kind)
    if taken is not None and taken.__qualname__ != part.__qualname__:
        must("kind", f"not be one of {', '.join(PARTS)}", repr(part.kind))
    if not part.kind.isidentifier():
        must("kind", "be an identifier", repr(part.kind))
    if part.place not in PLACES:
        must("place", f"be one of {', '.join(PLACES)}", repr(part.place))
    PARTS[part.kind] = part
    return part


def part_type(kind: Any, name: str, *, attention: bool | None = None) -> type[PartConfig]:
    """The registered part of a kind; ``attention`` says whether it must replace attention."""
    known = [
        known
        for known, part in PARTS.items()
        if attention is None or (part.place == "attention") == attention
    ]
    if kind not in known:
        must(name, f"be one of {', '.join(known) or 'none (see register_part)'}", repr(kind))
    return PARTS[kind]


def is_record(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value is a mapping, as JSON's objects are."""
    return isinstance(value, Mapping)


def _is_tuple(value: object) -> TypeGuard[tuple[Any, ...]]:
    return isinstance(value, tuple)


def make_part(value: Any, name: str, *, attention: bool) -> PartConfig:
    """A part from its configuration, or from the values of ``PartConfig.to_dict``.

    Raises:
        TypeError: If ``value`` is neither.
        ValueError: If there is no such part for that place, or a field is unknown or wrong.
    """
    if isinstance(value, PartConfig):
        part_type(value.kind, f"{name}.kind", attention=attention)
        return value
    if not is_record(value):
        what = "an AttentionConfig" if attention else "a PartConfig"
        must(name, f"be {what} or a dict", type(value).__name__, TypeError)
    values = dict(value)
    part = part_type(values.pop("kind", None), f"{name}.kind", attention=attention)
    known = [part_field.name for part_field in fields(part)]
    for unknown in values.keys() - set(known):
        allowed = f"be a field of {part.kind} ({', '.join(known)})"
        must(f"{name}.{unknown}", allowed, values[unknown])
    return part(**values)
