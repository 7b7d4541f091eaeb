"""Configuration of the decoder: sizes, and one frozen dataclass for each part of a block."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from transformers import PreTrainedConfig

from memattn.ops._checks import check_int, must
from memattn.ops._dispatch import BACKENDS

ATTENTION_KINDS = ("causal", "segmented")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Which keys a token sees.

    Attributes:
        kind: ``"causal"``, all earlier tokens, or ``"segmented"``, those of its own segment and
            of the sliding window.
        segment_len: Tokens in a segment; None means no segments. Only for ``"segmented"``.
        window_size: Keys in the sliding window, the query's own included; None means no window.
            Only for ``"segmented"``, which needs one of the two.
        num_persistent_tokens: Learned keys and values that every token sees.
        backend: Backend of the operator, ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.
    """

    kind: str = "causal"
    segment_len: int | None = None
    window_size: int | None = None
    num_persistent_tokens: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.kind not in ATTENTION_KINDS:
            must("attention.kind", f"be one of {', '.join(ATTENTION_KINDS)}", repr(self.kind))
        for name in ("segment_len", "window_size"):
            value = getattr(self, name)
            if value is None:
                continue
            if self.kind == "causal":
                must(f"attention.{name}", 'be None with attention.kind "causal"', value)
            check_int(f"attention.{name}", value, 1)
        if self.kind == "segmented" and self.segment_len is None and self.window_size is None:
            must("attention.segment_len", 'be given for kind "segmented", or window_size', None)
        check_int("attention.num_persistent_tokens", self.num_persistent_tokens, 0)
        if self.backend not in BACKENDS:
            must("attention.backend", f"be one of {', '.join(BACKENDS)}", repr(self.backend))


class MemAttnConfig(PreTrainedConfig):
    """Configuration of ``MemAttnModel`` and ``MemAttnForCausalLM``.

    Attributes:
        vocab_size: Tokens of the vocabulary.
        hidden_size: Features of the hidden states.
        num_hidden_layers: Blocks.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads, a divisor of the query heads; None means equal.
        head_dim: Features of a head, even; None means ``hidden_size / num_attention_heads``.
        intermediate_size: Features inside the MLP; None means 8/3 of ``hidden_size``, rounded up
            to a multiple of 64.
        max_position_embeddings: Longest sequence that the model is meant for. Nothing in the
            model depends on it; tokenizers and servers read it.
        rope_parameters: ``{"rope_type": "default", "rope_theta": 10000.0}``; ``rope_theta`` may
            also be given as a keyword of its own.
        rms_norm_eps: Epsilon of the norms.
        tie_word_embeddings: Whether the output layer shares the weights of the embedding.
        initializer_range: Standard deviation of new weights.
        use_cache: Whether inference keeps the state of the sequences.
        attention: Which keys a token sees, an ``AttentionConfig`` or its fields as a dict.
    """

    model_type = "memattn"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int = 4096
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
        for name in kwargs.keys() & {part.name for part in fields(AttentionConfig)}:
            must(name, "be given as a field of attention", kwargs[name], TypeError)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            check_int(name, getattr(self, name), 1)
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
        if self.head_dim % 2:
            must("head_dim", "be even", self.head_dim)
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // (3 * 64)) * 64
        check_int("intermediate_size", self.intermediate_size, 1)
        check_int("max_position_embeddings", self.max_position_embeddings, 1)
        if not self.rms_norm_eps > 0:
            must("rms_norm_eps", "be positive", self.rms_norm_eps)
        if isinstance(self.attention, dict):
            self.attention = AttentionConfig(**self.attention)
        if not isinstance(self.attention, AttentionConfig):
            kind = type(self.attention).__name__
            must("attention", "be an AttentionConfig or a dict", kind, TypeError)
        super().__post_init__(**kwargs)
        rope = self.rope_parameters or {}
        if rope.get("rope_type") != "default":
            must("rope_parameters", 'have rope_type "default"', rope.get("rope_type"))
        if not rope["rope_theta"] > 0:
            must("rope_theta", "be positive", rope["rope_theta"])

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values that JSON can hold."""
        return {
            name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            for name, value in super().to_dict().items()
        }

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read the values of ``to_dict``; ``attention`` may be replaced by a keyword, as a dict."""
        if "attention" in kwargs:
            config_dict = config_dict | {"attention": kwargs.pop("attention")}
        return super().from_dict(config_dict, **kwargs)

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
    def _check_sizes(cls, sizes: dict[str, Any]) -> dict[str, Any]:
        """Raise TypeError for a keyword that is no field of the configuration."""
        known = {size.name for size in fields(cls)} | {"rope_theta"}
        for name in sizes.keys() - known:
            must(name, f"be a field of {cls.__name__}", repr(sizes[name]), TypeError)
        return sizes


PRESETS: dict[str, Callable[..., MemAttnConfig]] = {
    "vanilla": MemAttnConfig.vanilla,
    "segmented": MemAttnConfig.segmented,
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
