"""Configuration of the decoder: sizes, and the parts of its layers."""

import json
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from memattn.checks import check_int, must
from memattn.models.folder_code import with_auto_map, without_auto_map, write_code
from memattn.models.parallel_plans import DevicePlans
from memattn.nn import AxialPositions, ContinuousAxialPositions, RotaryEmbedding
from memattn.nn.mlp import MLPS
from memattn.nn.norm import NORMS
from memattn.nn.rope_scaling import check_rope, make_rotary
from memattn.parts import PARTS, PartConfig, Sizes, make_part
from memattn.parts.causal import CausalConfig
from memattn.parts.chapter_memory import ChapterMemoryConfig
from memattn.parts.future import FutureConfig
from memattn.parts.old_spellings import upgrade_attention
from memattn.parts.segmented import SegmentedConfig
from memattn.parts.specialists import SpecialistsConfig
from memattn.parts.titans import TitansConfig
from memattn.parts.together import (
    build_shared_parts,
    check_together,
    losses_of,
    name_parts,
    parts_of_layer,
)

POSITION_EMBEDDINGS = ("rope", "learned", "axial", "continuous_axial")


def _preset(part: type[PartConfig], summary: str, **defaults: Any) -> Any:
    """A class method that makes the configuration with one kind of attention, or one added part."""
    own = {part_field.name for part_field in fields(part)}

    def make(cls: "type[MemAttnConfig]", **options: Any) -> "MemAttnConfig":
        chosen = {name: options.pop(name) for name in own & options.keys()}
        made, sizes = part(**defaults | chosen), cls._check_sizes(options)
        if part.place == "attention":
            return cls(attention=made, **sizes)
        return cls(**{**sizes, "parts": [made, *sizes.get("parts", [])]})

    make.__doc__ = f"""{summary}

    Arguments are the fields of ``{part.__name__}``, and further fields of the configuration.
    """
    return classmethod(make)


class MemAttnConfig(DevicePlans, PreTrainedConfig):  # pyright: ignore[reportIncompatibleVariableOverride]
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
        max_position_embeddings: Longest intended sequence. It is a limit only if positions have
            parameters: learned position embeddings, and parts with ``limits_length``. Otherwise
            only tokenizers and servers read it.
        position_embedding: ``"rope"``: rotary positions in every attention layer. Or embeddings
            added to the tokens: ``"learned"``, one per position; ``"axial"``, one per segment plus
            one per index in the segment; ``"continuous_axial"``, the same from networks, for any
            length.
        position_segment_len: Tokens in a segment of axial positions; None means the longest window
            or segment of the parts.
        norm: ``"rms"``, RMSNorm, or ``"layer"``, LayerNorm without bias.
        mlp: ``"swiglu"``, or ``"gelu"``, two projections around a GELU; both without biases.
        rope_parameters: ``{"rope_type": "default", "rope_theta": 10000.0}``, or the ``rope_type``
            ``"linear"``, ``"yarn"``, ``"llama3"`` or ``"proportional"`` with transformers'
            parameters for it; ``rope_theta`` may also be given as a separate argument.
        rms_norm_eps: Epsilon of the norms, of either kind.
        tie_word_embeddings: Whether the output layer shares the weights of the embedding.
        initializer_range: Standard deviation of new weights.
        use_cache: Whether inference uses a cache.
        attention: The attention part, which decides the keys that a token sees, such as ``{"kind":
            "segmented", "segment_len": 128}``.
        parts: Further parts, in their order; each a ``PartConfig``, or its kind and fields as a
            dict.
    """

    model_type = "memattn"
    keys_to_ignore_at_inference = ["past_key_values", "lm_loss", "losses", "loss_counts"]

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int = 4096
    position_embedding: str = "rope"
    position_segment_len: int | None = None
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
    attention: Any = field(default_factory=CausalConfig)
    parts: Any = field(default_factory=list)

    def __post_init__(self, **kwargs: Any) -> None:
        # transformers keeps unknown fields, so a misspelled field of a part would be ignored
        places = _part_fields()
        for name in kwargs.keys() & places.keys():
            must(name, f"be given as a field of {places[name]}", kwargs[name], TypeError)
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
        self._make_parts()
        self._check_position_segment()
        # before transformers reads them, and with the values that it adds
        check_rope(kwargs.get("rope_scaling") or self.rope_parameters or {})
        super().__post_init__(**kwargs)
        rope = self.rope_parameters or {}
        check_rope(rope)
        if self.position_embedding != "rope" and rope.get("rope_type") != "default":
            positions = f'have rope_type "default" with {self.position_embedding} positions'
            must("rope_parameters", positions, repr(rope.get("rope_type")))

    def _make_parts(self) -> None:
        """Convert parts given as plain values to configurations, and check them together."""
        self.attention = make_part(upgrade_attention(self.attention), "attention", attention=True)
        if not isinstance(self.parts, list | tuple):
            must("parts", "be a list", type(self.parts).__name__, TypeError)
        self.parts = [
            make_part(part, f"parts[{i}]", attention=False) for i, part in enumerate(self.parts)
        ]
        check_together([self.attention, *self.parts], self.sizes)

    def _check_position_segment(self) -> None:
        """Set the segment length of axial positions; other positions have none."""
        length = self.position_segment_len
        if "axial" in self.position_embedding:
            length = self.reach if length is None else length
            if not length:
                must("position_segment_len", "be given where no part has segments", length)
            check_int("position_segment_len", length, 1)
            self.position_segment_len = length
        elif length is not None:
            kind = repr(self.position_embedding)
            must("position_segment_len", f"be None with position_embedding {kind}", length)

    @property
    def sizes(self) -> Sizes:
        """The model's sizes, as parts need them."""
        assert self.head_dim is not None and self.num_key_value_heads is not None
        return Sizes(
            hidden_size=self.hidden_size,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            num_layers=self.num_hidden_layers,
            max_positions=self.max_position_embeddings,
            intermediate_size=self.intermediate_size,
            mlp=self.mlp,
            norm=self.norm,
            norm_eps=self.rms_norm_eps,
        )

    def named_parts(self) -> dict[str, PartConfig]:
        """All parts by the names of their modules and states."""
        return name_parts([self.attention, *self.parts])

    def layer_parts(self, layer: int) -> dict[str, PartConfig]:
        """The parts of one layer by name."""
        return parts_of_layer(self.named_parts(), layer, self.sizes)

    def build_shared_parts(self) -> dict[str, nn.Module]:
        """The modules that layers of a part share, by the part's name."""
        return build_shared_parts(self.named_parts(), self.sizes)

    @property
    def losses(self) -> dict[str, float]:
        """Losses that parts add to the cross-entropy, with their coefficients."""
        return losses_of(self.named_parts())

    @property
    def reach(self) -> int:
        """Tokens in the longest window or segment of a part; 0 if there is none."""
        return max(part.reach for part in self.named_parts().values())

    @property
    def position_limit(self) -> int | None:
        """Longest sequence for which the model has parameters; None means no limit."""
        limits = any(part.limits_length for part in self.named_parts().values())
        limits = limits or self.position_embedding in ("learned", "axial")
        return self.max_position_embeddings if limits else None

    def build_positions(self) -> nn.Module | None:
        """The position embeddings added to the tokens; None for rotary positions."""
        length, segment = self.max_position_embeddings, self.position_segment_len
        if self.position_embedding == "learned":
            return nn.Embedding(length, self.hidden_size)
        if segment is None:
            return None
        if self.position_embedding == "axial":
            return AxialPositions(self.hidden_size, segment, length)
        return ContinuousAxialPositions(self.hidden_size, segment)

    def build_rotary(self) -> RotaryEmbedding | None:
        """The rotary embedding of all layers; None for other positions."""
        if self.position_embedding != "rope":
            return None
        assert self.head_dim is not None and self.rope_parameters is not None
        return make_rotary(self.head_dim, self.rope_parameters, self.max_position_embeddings)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values that JSON can hold."""
        return _plain(super().to_dict())

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read the values of ``to_dict``; keyword arguments override fields and are checked."""
        own = {config_field.name for config_field in fields(cls)} | _part_fields().keys()
        own -= {
            base.name for base in fields(PreTrainedConfig)
        }  # without fields that transformers handles
        given = {name: kwargs.pop(name) for name in (own | _ROPE_KEYWORDS) & kwargs.keys()}
        if "rope_theta" in given and "rope_parameters" not in given:
            rope = config_dict.get("rope_parameters") or {}
            given["rope_parameters"] = rope | {"rope_theta": given.pop("rope_theta")}
        elif (scaling := given.get("rope_scaling")) and "rope_theta" not in scaling:
            saved = {
                k: v for k, v in config_dict.get("rope_parameters", {}).items() if "theta" in k
            }
            given["rope_scaling"] = saved | scaling
        return super().from_dict(without_auto_map(config_dict) | given, **kwargs)

    def check(self) -> None:
        """Check the fields again as at construction, since they may have been set later."""
        type(self).from_dict(self.to_dict())

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write ``config.json``, and a Python file through which transformers finds this package.

        A configuration that could not be loaded again is not saved.
        """
        self.check()
        if not Path(save_directory).is_file():  # a file: transformers raises the error
            write_code(Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        """Write the values as JSON, with the location of the classes."""
        values = with_auto_map(json.loads(self.to_json_string(use_diff=use_diff)))
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        Path(json_file_path).write_text(text, encoding="utf-8")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """As in transformers, except for this package's classes, which folders name anyway."""
        if not cls.__module__.startswith("memattn."):
            super().register_for_auto_class(auto_class)

    vanilla = _preset(CausalConfig, "A plain causal decoder.")
    segmented = _preset(
        SegmentedConfig,
        "A decoder with attention within segments and a sliding window.",
        segment_len=128,
        window_size=128,
        num_persistent_tokens=4,
    )
    future = _preset(FutureConfig, "A causal decoder with learned keys for future positions.")
    memory_transformer = _preset(
        ChapterMemoryConfig,
        "A causal decoder whose layers attend to chapters of learned memory tokens.",
        use_chapters=True,
        num_chapters=16,
        top_k_chapters=4,
    )
    titans = _preset(
        TitansConfig, "A decoder with a neural memory, alone or combined with attention."
    )
    shiftable = _preset(
        SpecialistsConfig,
        "A causal decoder with gated specialists, open from the start.",
        prior=1.0,
    )

    @classmethod
    def _check_sizes(cls, sizes: dict[str, Any]) -> dict[str, Any]:
        """Raise TypeError for an argument that is not a field of the configuration."""
        known = {size.name for size in fields(cls)} | _KEYWORDS
        for name in sizes.keys() - known:
            must(name, f"be a field of {cls.__name__}", repr(sizes[name]), TypeError)
        return sizes


def _part_fields() -> dict[str, str]:
    """The fields of all parts, and the place of each part in a configuration."""
    return {
        part_field.name: "attention" if part.place == "attention" else "parts"
        for part in PARTS.values()
        for part_field in fields(part)
        if part_field.name not in _ROPE_KEYWORDS | {"rope_parameters"}  # the model's own
    }


def _plain(value: Any) -> Any:
    """The value with all parts converted to plain values."""
    if isinstance(value, PartConfig):
        return value.to_dict()
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


_ROPE_KEYWORDS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
_KEYWORDS = {"rope_theta", "num_labels", "classifier_dropout"}  # arguments that are not fields


PRESETS: dict[str, Callable[..., MemAttnConfig]] = {
    "vanilla": MemAttnConfig.vanilla,
    "segmented": MemAttnConfig.segmented,
    "future": MemAttnConfig.future,
    "memory_transformer": MemAttnConfig.memory_transformer,
    "titans": MemAttnConfig.titans,
    "shiftable": MemAttnConfig.shiftable,
}


def register_preset(name: str, factory: Callable[..., MemAttnConfig]) -> None:
    """Add a preset to ``PRESETS``, which commands such as the demo run through.

    Args:
        name: Its name, not yet in ``PRESETS``.
        factory: Function that makes the configuration from sizes given as keyword arguments.

    Raises:
        ValueError: If the name is taken.
    """
    if name in PRESETS:
        must("name", f"not be one of {', '.join(PRESETS)}", repr(name))
    PRESETS[name] = factory
