"""Configuration fields of chapter memory, their checks and derived values."""

from dataclasses import dataclass

from memattn.checks import check_bool, check_int, must
from memattn.nn.chapter_routing import STRATEGIES
from memattn.ops._dispatch import BACKENDS
from memattn.ops.chapter_attention import COMBINE
from memattn.ops.chapter_router import NORMALISATIONS
from memattn.parts.base import PartConfig, Sizes

PLACEMENTS = ("all", "first_k", "last_k", "every_n", "custom", "none")
SHARING = ("shared", "per_layer", "every_k_layers")
LOW_RANK_MODES = ("factorized", "reduced_dim")
VARIANTS = {"A": "after_attention", "B": "after_mlp"}
LOSSES = {  # loss name: its switch and its coefficient
    "load_balance_loss": ("use_load_balance_loss", "load_balance_coefficient"),
    "auxiliary_loss": ("use_auxiliary_loss", "auxiliary_loss_coefficient"),
    "z_loss": ("use_z_loss", "z_loss_coefficient"),
}


@dataclass(frozen=True, kw_only=True)
class MemoryFields(PartConfig):
    """Cross-attention to a bank of learned memory tokens: the whole bank, or routed chapters.

    Names and defaults follow the Memory project for the fields that it has.

    Attributes:
        num_memory_tokens: Memory tokens in a bank.
        memory_dim: Features of a memory token; None means ``hidden_size``.
        memory_layer_placement: Layers with memory: ``"all"``, ``"first_k"``, ``"last_k"``,
            ``"every_n"`` (layers 0, n, 2n, ...), ``"custom"`` or ``"none"``.
        memory_layer_k: Number of layers for ``"first_k"`` and ``"last_k"``, at most all.
        memory_layer_n: Distance between layers for ``"every_n"``.
        memory_layer_custom: Indices of the layers, from 0, for ``"custom"``.
        memory_sharing: ``"shared"``, one bank for all layers; ``"per_layer"``, one for each;
            ``"every_k_layers"``, one for every ``memory_sharing_k`` memory layers.
        memory_sharing_k: Number of layers that share a bank, for ``"every_k_layers"``.
        use_low_rank_memory: Whether a bank is stored with rank ``memory_rank``.
        memory_rank: Rank of a low-rank bank.
        low_rank_mode: ``"factorized"``, a product of two matrices, or ``"reduced_dim"``: attention
            runs in ``memory_rank`` features.
        use_low_rank_projections: Whether the four projections are products of two matrices.
        projection_rank: Rank of these products.
        memory_block_variant: ``"A"``, memory after attention, or ``"B"``, memory after the MLP,
            followed by a second MLP.
        use_chapters: Whether a router selects chapters; otherwise every token sees the whole bank.
        num_chapters: Chapters of a bank.
        tokens_per_chapter: None, or ``num_memory_tokens / num_chapters``, to be checked.
        top_k_chapters: Routed chapters that a token reads.
        routing_strategy_train: ``"sequence"``, ``"rolling"``, ``"token"`` or ``"hybrid"``: the
            tokens that chapters are selected by in training. All are causal, see
            ``memattn.nn.chapter_routing``.
        routing_strategy_inference: The same in evaluation mode.
        routing_block_size: Tokens that are routed together; unused for ``"token"``.
        routing_window_size: Tokens of the rolling window.
        router_temperature: Divisor of the router's logits.
        num_shared_chapters: Number of first chapters that every token reads in addition; the router
            does not route them.
        routed_scaling_factor: Factor of the weights of routed chapters.
        combine: ``"joint"``: one softmax over all selected chapters. ``"independent"``: one softmax
            for each chapter, summed with the router's weights.
        use_load_balance_loss: Whether training adds the load-balance loss.
        load_balance_coefficient: Its coefficient.
        load_balance_normalisation: ``"mean"``: the loss is 1 at balance; ``"sum"``: it is
            ``top_k_chapters`` at balance.
        use_auxiliary_loss: Whether training adds the auxiliary loss.
        auxiliary_loss_coefficient: Its coefficient.
        use_z_loss: Whether training adds the z-loss.
        z_loss_coefficient: Its coefficient.
        quantize_memory: Whether banks are stored in 8 or 4 bits.
        memory_quant_bits: 8 or 4.
        memory_quant_training: Quantisation-aware training: banks stay float parameters and the
            forward pass quantises them. Otherwise quantised banks are not trained.
        memory_num_heads: Query heads of the memory; None means as many as the model.
        memory_num_kv_heads: Its key and value heads; None means ``memory_num_heads``.
        wo_init_zero: Whether the output projection starts at zero, so that at first the memory has
            no effect.
        memory_init_std: Standard deviation of new memory tokens.
        vanilla_mode: Remove the memory, for comparisons.
        backend: Backend of the operators, ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.
    """

    num_memory_tokens: int = 1024
    memory_dim: int | None = None
    memory_layer_placement: str = "all"
    memory_layer_k: int = 5
    memory_layer_n: int = 3
    memory_layer_custom: tuple[int, ...] | None = None
    memory_sharing: str = "shared"
    memory_sharing_k: int = 2
    use_low_rank_memory: bool = False
    memory_rank: int = 64
    low_rank_mode: str = "factorized"
    use_low_rank_projections: bool = False
    projection_rank: int = 64
    memory_block_variant: str = "A"
    use_chapters: bool = False
    num_chapters: int = 100
    tokens_per_chapter: int | None = None
    top_k_chapters: int = 20
    routing_strategy_train: str = "sequence"
    routing_strategy_inference: str = "sequence"
    routing_block_size: int = 64
    routing_window_size: int = 128
    router_temperature: float = 1.0
    num_shared_chapters: int = 0
    routed_scaling_factor: float = 1.0
    combine: str = "joint"
    use_load_balance_loss: bool = True
    load_balance_coefficient: float = 0.01
    load_balance_normalisation: str = "mean"
    use_auxiliary_loss: bool = False
    auxiliary_loss_coefficient: float = 0.01
    use_z_loss: bool = False
    z_loss_coefficient: float = 0.001
    quantize_memory: bool = False
    memory_quant_bits: int = 8
    memory_quant_training: bool = False
    memory_num_heads: int | None = None
    memory_num_kv_heads: int | None = None
    wo_init_zero: bool = True
    memory_init_std: float = 0.02
    vanilla_mode: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        strategies = dict.fromkeys(
            ("routing_strategy_train", "routing_strategy_inference"), STRATEGIES
        )
        choices = {
            "memory_layer_placement": PLACEMENTS,
            "memory_sharing": SHARING,
            "low_rank_mode": LOW_RANK_MODES,
            "memory_block_variant": VARIANTS,
            "combine": COMBINE,
            "load_balance_normalisation": NORMALISATIONS,
            "memory_quant_bits": (8, 4),
            "backend": BACKENDS,
            **strategies,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value == "bidirectional" and name in strategies:
                must(self._path(name), "be causal: the model predicts what it would see", value)
            if value not in allowed:
                known = ", ".join(map(str, allowed))
                must(self._path(name), f"be one of {known}", repr(value))
        for name, value in vars(self).items():
            if isinstance(type(self).__dataclass_fields__[name].default, bool):
                check_bool(self._path(name), value)
        for name, least in (
            *dict.fromkeys(("num_memory_tokens", "memory_layer_k", "memory_layer_n"), 1).items(),
            *dict.fromkeys(("memory_sharing_k", "memory_rank", "projection_rank"), 1).items(),
            *dict.fromkeys(("num_chapters", "top_k_chapters", "routing_block_size"), 1).items(),
            ("routing_window_size", 1),
            ("num_shared_chapters", 0),
        ):
            check_int(self._path(name), getattr(self, name), least)
        for name in ("memory_dim", "tokens_per_chapter", "memory_num_heads", "memory_num_kv_heads"):
            if getattr(self, name) is not None:
                check_int(self._path(name), getattr(self, name), 1)
        for name in ("router_temperature", "routed_scaling_factor"):
            if not 0.0 < getattr(self, name) < float("inf"):
                must(self._path(name), "be positive and finite", getattr(self, name))
        for name in (*(coefficient for _, coefficient in LOSSES.values()), "memory_init_std"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                must(self._path(name), "be finite and at least 0", getattr(self, name))
        self._check_layers()
        if self.use_chapters:
            self._check_chapters()

    def _path(self, name: str) -> str:
        return f"{self.path}.{name}"

    def _check_layers(self) -> None:
        custom, placement = self.memory_layer_custom, self.memory_layer_placement
        if (custom is None) == (placement == "custom"):
            allowed = "be given for" if custom is None else "be None without"
            must(
                self._path("memory_layer_custom"),
                f'{allowed} memory_layer_placement="custom"',
                custom,
            )
        if custom is not None:
            for layer in custom:
                check_int(self._path("memory_layer_custom"), layer, 0)
            object.__setattr__(self, "memory_layer_custom", tuple(sorted(set(custom))))

    def _check_chapters(self) -> None:
        N, C = self.num_memory_tokens, self.num_chapters
        if N % C:
            must(self._path("num_memory_tokens"), f"be divisible by num_chapters={C}", N)
        if self.tokens_per_chapter not in (None, N // C):
            allowed = f"be None or num_memory_tokens / num_chapters = {N // C}"
            must(self._path("tokens_per_chapter"), allowed, self.tokens_per_chapter)
        routed = C - self.num_shared_chapters
        if routed < 1:
            must(self._path("num_shared_chapters"), f"be below num_chapters={C}", C - routed)
        if self.top_k_chapters > routed:
            allowed = f"be at most num_chapters - num_shared_chapters = {routed}"
            must(self._path("top_k_chapters"), allowed, self.top_k_chapters)

    def layers(self, num_layers: int) -> list[int]:
        """The layers with memory in a model with ``num_layers``."""
        everything = list(range(num_layers))
        match "none" if self.vanilla_mode else self.memory_layer_placement:
            case "all":
                return everything
            case "first_k":
                return everything[: self.memory_layer_k]
            case "last_k":
                return everything[-self.memory_layer_k :]
            case "every_n":
                return everything[:: self.memory_layer_n]
            case "custom":
                return list(self.memory_layer_custom or ())
            case _:
                return []

    def bank_of(self, layer: int, num_layers: int) -> int:
        """The index of the bank that a layer reads."""
        number = self.layers(num_layers).index(layer)
        shared = {"shared": num_layers, "per_layer": 1, "every_k_layers": self.memory_sharing_k}
        return number // shared[self.memory_sharing]

    def check(self, sizes: Sizes, others: list[PartConfig]) -> None:
        layers, n = self.layers(sizes.num_layers), sizes.num_layers
        custom = self.memory_layer_placement == "custom" and not self.vanilla_mode
        if custom and (not layers or max(layers) >= n):
            must(self._path("memory_layer_custom"), f"name layers from 0 to {n - 1}", layers)
        if self.vanilla_mode:
            return
        heads, kv_heads, inner = self.heads(sizes)
        if inner % heads:
            what = "memory_rank" if self.is_reduced else "hidden_size"
            must(self._path("memory_num_heads"), f"divide {what}={inner}", heads)
        if heads % kv_heads:
            must(self._path("memory_num_kv_heads"), f"divide memory_num_heads={heads}", kv_heads)
        if self.quantize_memory and self.memory_quant_bits == 4 and self._stored(sizes) % 2:
            what = "memory_rank" if self.use_low_rank_memory else "memory_dim"
            must(self._path(what), "be even for memory_quant_bits=4", self._stored(sizes))

    @property
    def is_reduced(self) -> bool:
        return self.use_low_rank_memory and self.low_rank_mode == "reduced_dim"

    def width(self, sizes: Sizes) -> int:
        """Features of a memory token as the layers read it."""
        return self.memory_rank if self.is_reduced else self.memory_dim or sizes.hidden_size

    def _stored(self, sizes: Sizes) -> int:
        """Features of a memory token as it is stored."""
        return self.memory_rank if self.use_low_rank_memory else self.width(sizes)

    def heads(self, sizes: Sizes) -> tuple[int, int, int]:
        """Query heads, key heads, and the features of all query heads."""
        heads = self.memory_num_heads or sizes.num_heads
        inner = self.memory_rank if self.is_reduced else sizes.hidden_size
        return heads, self.memory_num_kv_heads or heads, inner
