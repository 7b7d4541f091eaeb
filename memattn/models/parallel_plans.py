"""How devices share a model: what transformers and servers read of its configuration.

Heads and the features inside of MLPs lie on several devices, as those of Llama do. Attention that
more than its own heads work on, and what stands beside it, every device computes as a whole.
"""

from typing import Any

from memattn.checks import must
from memattn.parts.causal import CausalConfig
from memattn.parts.segmented import SegmentedConfig

HEADS = ("num_attention_heads", "num_key_value_heads")
LAYER = "layers.*"
PLAIN = (CausalConfig, SegmentedConfig)  # attention that computes each head by itself


class DevicePlans:
    """The part of ``MemAttnConfig`` that says how devices share a model."""

    attention: Any
    parts: Any
    mlp: str
    position_embedding: str
    num_hidden_layers: int

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Which weights of the decoder devices share, and how."""
        own, plan = f"{LAYER}.attention", {}
        if type(self.attention) in PLAIN and not self._attention_is_read:
            plan |= {f"{own}.{name}_proj": "colwise" for name in "qkv"}
            plan[f"{own}.o_proj"] = "rowwise"
            if self.attention.num_persistent_tokens:
                # of one key head each; the style is that of a table whose rows are shared
                for name in ("persistent_key", "persistent_value"):
                    plan[f"{own}.{name}"] = "embedding_rowwise"
                plan[own] = "local_params"
        inside = ("gate_proj", "up_proj") if self.mlp == "swiglu" else ("up_proj",)
        plan |= {f"{LAYER}.mlp.{name}": "colwise" for name in inside}
        return plan | {f"{LAYER}.mlp.down_proj": "rowwise"}

    @property
    def base_model_pp_plan(self) -> dict[str, tuple[list[str], list[str]]] | None:
        """Which modules processes have one behind the other; None where servers cannot."""
        if self.lacks_for_servers is not None:
            return None
        states = ["hidden_states"]
        return {
            "embed_tokens": (["input_ids"], ["inputs_embeds"]),
            "layers": ([*states, "attention_mask"], states),
            "norm": (states, states),
        }

    @property
    def layer_types(self) -> list[str]:
        """What servers call the attention of each layer; no attribute where they lack it."""
        if (lacked := self.lacks_for_servers) is not None:
            raise AttributeError(f"no server has the layers of a model with {lacked}")
        kind = "full_attention" if self.sliding_window is None else "sliding_attention"
        return [kind] * self.num_hidden_layers

    @property
    def sliding_window(self) -> int | None:
        """Keys in the window that servers keep, the query's own included; None is all."""
        return None if self.lacks_for_servers else self.attention.spans[1]

    @property
    def lacks_for_servers(self) -> str | None:
        """What a model has that attention and cache of a server do not compute, or None."""
        if self.parts:
            return f"the part {self.parts[0].kind!r}"
        if type(self.attention) not in PLAIN:
            return f"attention of kind {self.attention.kind!r}"
        for name in ("num_persistent_tokens", "segment_len", "num_sink_tokens"):
            if getattr(self.attention, name, None):
                return name
        kind = self.position_embedding
        return None if kind == "rope" else f"{kind} positions"

    @property
    def _attention_is_read(self) -> bool:
        """Whether a part looks at the weights of attention."""
        return any(part.stands == "beside_attention" for part in self.parts)


def check_devices(config: Any, plan: dict[str, str], tp_size: int, pp_size: int) -> None:
    """Raise unless devices can share a model in this way.

    Args:
        config: Of the model.
        plan: How ``tp_size`` devices share the weights, by the names of modules.
        tp_size: Devices that share the weights of a layer.
        pp_size: Devices that have layers of their own, one behind the other.

    Raises:
        ValueError: If the heads of the plan are not shared evenly.
        NotImplementedError: If ``pp_size`` is not 1.
    """
    if (
        pp_size > 1
    ):  # their call hands on hidden states alone, and keywords that are not the model's
        must("pp_size", "be 1 (tp_size shares any model)", pp_size, NotImplementedError)
    if not any(n.endswith(".attention.k_proj") and plan[n] == "colwise" for n in plan):
        return
    for name in HEADS:
        if getattr(config, name) % tp_size:
            must(name, f"be divisible by tp_size={tp_size}", getattr(config, name))
