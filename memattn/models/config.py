"""Configuration of the decoder: sizes, and one frozen dataclass for each part of a block."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from transformers import PreTrainedConfig

from memattn.checks import check_bool, check_int, must
from memattn.nn.future_attention import SOURCES
from memattn.ops._dispatch import BACKENDS
from memattn.ops.future_attention import LOSS_TYPES

ATTENTION_KINDS = ("causal", "segmented", "future")
POSITION_EMBEDDINGS = ("rope", "learned")
NORMS = ("rms", "layer")
MLPS = ("swiglu", "gelu")


@dataclass(frozen=True, kw_only=True)
class FutureConfig:
    """Which layers see learned keys for the positions ahead, and what trains these.

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
        loss_type: ``"mse"`` or ``"cosine"``, how the future part of each layer's output is
            compared with what the real keys would give, or None for no such loss.
        loss_coefficient: What the mean of the layers' losses is multiplied by before it is added
            to the loss in training mode. 0 measures it without training on it.
        detach_target: Whether the loss leaves the real keys, values and queries of its target
            alone.
    """

    future_dim: int = 64
    source: str = "table"
    source_rank: int = 16
    start_layer: int = 0
    end_layer: int | None = None
    loss_type: str | None = "mse"
    loss_coefficient: float = 1.0
    detach_target: bool = True

    def __post_init__(self) -> None:
        name = "attention.future"
        check_int(f"{name}.future_dim", self.future_dim, 1)
        if self.source not in SOURCES:
            must(f"{name}.source", f"be one of {', '.join(SOURCES)}", repr(self.source))
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

    def layers(self, num_hidden_layers: int) -> range:
        """The layers with future keys."""
        end = num_hidden_layers if self.end_layer is None else self.end_layer
        return range(self.start_layer, end)

    def check_sizes(self, num_hidden_layers: int, max_position_embeddings: int) -> None:
        """Raise ValueError unless layers and positions are within those of the model."""
        name, n = "attention.future", num_hidden_layers
        if self.start_layer >= n:
            must(f"{name}.start_layer", f"be below num_hidden_layers={n}", self.start_layer)
        if self.end_layer is not None and self.end_layer > n:
            must(f"{name}.end_layer", f"be at most num_hidden_layers={n}", self.end_layer)
        limit = max_position_embeddings - 1
        if self.source != "relative" and self.future_dim > limit:
            allowed = f"be at most max_position_embeddings - 1 = {limit}"
            must(f"{name}.future_dim", allowed, self.future_dim)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Which keys a token sees.

    Attributes:
        kind: ``"causal"``, all earlier tokens, ``"segmented"``, those of its own segment and of
            the sliding window, or ``"future"``, all earlier tokens and learned keys for the
            positions ahead.
        segment_len: Tokens in a segment; None means no segments. Only for ``"segmented"``.
        window_size: Keys in the sliding window, the query's own included; None means no window.
            Only for ``"segmented"``, which needs one of the two.
        num_persistent_tokens: Learned keys and values that every token sees. Not for
            ``"future"``.
        future: What a token sees ahead, a ``FutureConfig`` or its fields as a dict. Only for
            ``"future"``, where None means the fields' defaults.
        backend: Backend of the operator, ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.
    """

    kind: str = "causal"
    segment_len: int | None = None
    window_size: int | None = None
    num_persistent_tokens: int = 0
    future: FutureConfig | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.kind not in ATTENTION_KINDS:
            must("attention.kind", f"be one of {', '.join(ATTENTION_KINDS)}", repr(self.kind))
        for name in ("segment_len", "window_size"):
            value = getattr(self, name)
            if value is None:
                continue
            if self.kind != "segmented":
                must(f"attention.{name}", f'be None with attention.kind "{self.kind}"', value)
            check_int(f"attention.{name}", value, 1)
        if self.kind == "segmented" and self.segment_len is None and self.window_size is None:
            must("attention.segment_len", 'be given for kind "segmented", or window_size', None)
        check_int("attention.num_persistent_tokens", self.num_persistent_tokens, 0)
        self._check_future()
        if self.backend not in BACKENDS:
            must("attention.backend", f"be one of {', '.join(BACKENDS)}", repr(self.backend))

    def _check_future(self) -> None:
        future = self.future
        if self.kind == "future" and (future is None or isinstance(future, dict)):
            future = FutureConfig(**(future or {}))
            object.__setattr__(self, "future", future)  # frozen
        if self.kind == "future" and self.num_persistent_tokens:
            allowed = 'be 0 with attention.kind "future"'
            must("attention.num_persistent_tokens", allowed, self.num_persistent_tokens)
        if self.kind != "future" and future is not None:
            must("attention.future", f'be None with attention.kind "{self.kind}"', future)
        if future is not None and not isinstance(future, FutureConfig):
            kind = type(future).__name__
            must("attention.future", "be a FutureConfig or a dict", kind, TypeError)


class MemAttnConfig(PreTrainedConfig):
    """Configuration of ``MemAttnModel`` and ``MemAttnForCausalLM``.

    Attributes:
        vocab_size: Tokens of the vocabulary.
        hidden_size: Features of the hidden states.
        num_hidden_layers: Blocks.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads, a divisor of the query heads; None means equal.
        head_dim: Features of a head, even for ``"rope"``; None means ``hidden_size /
            num_attention_heads``.
        intermediate_size: Features inside the MLP; None means 8/3 of ``hidden_size``, rounded up
            to a multiple of 64, for ``"swiglu"``, and 4 times ``hidden_size`` for ``"gelu"``.
        max_position_embeddings: Longest sequence that the model is meant for. It is a limit where
            positions have parameters: learned position embeddings and future keys, unless these
            are relative. Otherwise only tokenizers and servers read it.
        position_embedding: ``"rope"``, rotary positions in every attention layer, or
            ``"learned"``, parameters added to the embedded tokens.
        norm: ``"rms"``, RMSNorm, or ``"layer"``, LayerNorm without bias.
        mlp: ``"swiglu"``, or ``"gelu"``, two projections around a GELU; both without biases.
        rope_parameters: ``{"rope_type": "default", "rope_theta": 10000.0}``; ``rope_theta`` may
            also be given as a keyword of its own.
        rms_norm_eps: Epsilon of the norms, of either kind.
        tie_word_embeddings: Whether the output layer shares the weights of the embedding.
        initializer_range: Standard deviation of new weights.
        use_cache: Whether inference keeps the state of the sequences.
        attention: Which keys a token sees, an ``AttentionConfig`` or its fields as a dict.
    """

    model_type = "memattn"
    keys_to_ignore_at_inference = ["past_key_values", "lm_loss", "future_loss"]

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int = 4096
    position_embedding: str = "rope"
    norm: str = "rms"
    mlp: str = "swiglu"
    rope_parameters: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    def __post_init__(self, **kwargs: Any) -> None:
        # transformers keeps unknown fields; those of a part would be ignored silently
        for part, path in ((AttentionConfig, "attention"), (FutureConfig, "attention.future")):
            for name in kwargs.keys() & {part_field.name for part_field in fields(part)}:
                must(name, f"be given as a field of {path}", kwargs[name], TypeError)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            check_int(name, getattr(self, name), 1)
        for name, choices in (
            ("position_embedding", POSITION_EMBEDDINGS),
            ("norm", NORMS),
            ("mlp", MLPS),
        ):
            if getattr(self, name) not in choices:
                must(name, f"be one of {', '.join(choices)}", repr(getattr(self, name)))
        heads = self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads
        check_int("num_key_value_heads", self.num_key_value_heads, 1)
        if heads % self.num_key_value_heads:
            must(
                "num_key_value_heads",
                f"divide num_attention_heads={heads}",
                self.num_key_value_heads,
            )
        if self.head_dim is None:
            if self.hidden_size % heads:
                must(
                    "hidden_size", f"be divisible by num_attention_heads={heads}", self.hidden_size
                )
            self.head_dim = self.hidden_size // heads
        check_int("head_dim", self.head_dim, 2)
        if self.head_dim % 2 and self.position_embedding == "rope":
            must("head_dim", "be even", self.head_dim)
        if self.intermediate_size is None:
            wide = 4 * self.hidden_size
            self.intermediate_size = wide if self.mlp == "gelu" else -(-wide * 2 // (3 * 64)) * 64
        check_int("intermediate_size", self.intermediate_size, 1)
        check_int("max_position_embeddings", self.max_position_embeddings, 1)
        if not self.rms_norm_eps > 0:
            must("rms_norm_eps", "be positive", self.rms_norm_eps)
        if isinstance(self.attention, dict):
            self.attention = AttentionConfig(**self.attention)
        if not isinstance(self.attention, AttentionConfig):
            kind = type(self.attention).__name__
            must("attention", "be an AttentionConfig or a dict", kind, TypeError)
        if self.attention.future is not None:
            self.attention.future.check_sizes(self.num_hidden_layers, self.max_position_embeddings)
        super().__post_init__(**kwargs)
        _check_rope(self.rope_parameters or {})

    @property
    def position_limit(self) -> int | None:
        """Tokens of the longest sequence that the model has parameters for; None means no limit."""
        future = self.attention.future
        absolute = future is not None and future.source != "relative"
        if absolute or self.position_embedding == "learned":
            return self.max_position_embeddings
        return None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values that JSON can hold."""
        return {
            name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            for name, value in super().to_dict().items()
        }

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read the values of ``to_dict``; keywords replace fields, and are checked as these are."""
        own = {part.name for kind in (cls, AttentionConfig, FutureConfig) for part in fields(kind)}
        own -= {part.name for part in fields(PreTrainedConfig)}  # those transformers sees to
        given = {name: kwargs.pop(name) for name in (own | _ROPE_KEYWORDS) & kwargs.keys()}
        if "rope_theta" in given and "rope_parameters" not in given:
            rope = config_dict.get("rope_parameters") or {}
            given["rope_parameters"] = rope | {"rope_theta": given.pop("rope_theta")}
        return super().from_dict(config_dict | given, **kwargs)

    def check(self) -> None:
        """Raise what construction raises for these values: fields may be set at any time."""
        type(self).from_dict(self.to_dict())

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write ``config.json``; what could not be loaded is not saved."""
        self.check()
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def vanilla(cls, **sizes: Any) -> "MemAttnConfig":
        """A plain causal decoder; ``sizes`` are further fields."""
        return cls(attention=AttentionConfig(), **cls._check_sizes(sizes))

    @classmethod
    def segmented(
        cls,
        *,
        segment_len: int | None = 128,
        window_size: int | None = 128,
        num_persistent_tokens: int = 4,
        backend: str = "auto",
        **sizes: Any,
    ) -> "MemAttnConfig":
        """A decoder that attends within segments and a window; ``sizes`` are further fields."""
        attention = AttentionConfig(
            kind="segmented",
            segment_len=segment_len,
            window_size=window_size,
            num_persistent_tokens=num_persistent_tokens,
            backend=backend,
        )
        return cls(attention=attention, **cls._check_sizes(sizes))

    @classmethod
    def future(
        cls,
        *,
        future_dim: int = 64,
        source: str = "table",
        source_rank: int = 16,
        start_layer: int = 0,
        end_layer: int | None = None,
        loss_type: str | None = "mse",
        loss_coefficient: float = 1.0,
        detach_target: bool = True,
        backend: str = "auto",
        **sizes: Any,
    ) -> "MemAttnConfig":
        """A causal decoder that also sees learned keys for the positions ahead.

        The arguments are the fields of ``FutureConfig``; ``sizes`` are further fields.
        """
        future = FutureConfig(
            future_dim=future_dim,
            source=source,
            source_rank=source_rank,
            start_layer=start_layer,
            end_layer=end_layer,
            loss_type=loss_type,
            loss_coefficient=loss_coefficient,
            detach_target=detach_target,
        )
        attention = AttentionConfig(kind="future", future=future, backend=backend)
        return cls(attention=attention, **cls._check_sizes(sizes))

    @classmethod
    def _check_sizes(cls, sizes: dict[str, Any]) -> dict[str, Any]:
        """Raise TypeError for a keyword that is no field of the configuration."""
        known = {size.name for size in fields(cls)} | {"rope_theta"}
        for name in sizes.keys() - known:
            must(name, f"be a field of {cls.__name__}", repr(sizes[name]), TypeError)
        return sizes


_ROPE_KEYWORDS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}


def _check_rope(rope: dict[str, Any]) -> None:
    """Raise ValueError for what the rotary embedding would not do."""
    if rope.get("rope_type") != "default":
        must("rope_parameters", 'have rope_type "default"', rope.get("rope_type"))
    unknown = sorted(rope.keys() - {"rope_type", "rope_theta", "type"})
    if unknown:
        must("rope_parameters", "have rope_type and rope_theta alone", ", ".join(unknown))
    if not rope["rope_theta"] > 0:
        must("rope_theta", "be positive", rope["rope_theta"])


PRESETS: dict[str, Callable[..., MemAttnConfig]] = {
    "vanilla": MemAttnConfig.vanilla,
    "segmented": MemAttnConfig.segmented,
    "future": MemAttnConfig.future,
}


def register_preset(name: str, factory: Callable[..., MemAttnConfig]) -> None:
    """Add a system to ``PRESETS``, for commands that go through all of them.

    Args:
        name: Its name, not yet in ``PRESETS``.
        factory: Makes the configuration from sizes given as keywords.

    Raises:
        ValueError: If the name is taken.
    """
    if name in PRESETS:
        must("name", f"not be one of {', '.join(PRESETS)}", repr(name))
    PRESETS[name] = factory
