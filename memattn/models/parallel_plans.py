"""Tensor and pipeline parallelism: the plans that transformers and servers read from the config.

Attention heads and the inner features of MLPs are split over the devices, as in Llama. Every device
computes the whole of other kinds of attention, and of the parts beside attention.
"""

from typing import Any

from memattn.checks import must
from memattn.parts.causal import CausalConfig
from memattn.parts.segmented import SegmentedConfig

HEADS = ("num_attention_heads", "num_key_value_heads")
LAYER = "layers.*"
PLAIN = (CausalConfig, SegmentedConfig)  # attention whose heads can be split over devices


class DevicePlans:
    """Properties of ``MemAttnConfig`` for models on several devices and in servers."""

    attention: Any
    parts: Any
    mlp: str
    position_embedding: str
    num_hidden_layers: int

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How each weight of the decoder is split over devices, by module name."""
        own, plan = f"{LAYER}.attention", {}
        if type(self.attention) in PLAIN and not self._attention_is_read:
            plan |= {f"{own}.{name}_proj": "colwise" for name in "qkv"}
            plan[f"{own}.o_proj"] = "rowwise"
            if self.attention.num_persistent_tokens:
                # split along the first dimension, the key heads
                for name in ("persistent_key", "persistent_value"):
                    plan[f"{own}.{name}"] = "embedding_rowwise"
                plan[own] = "local_params"
        inside = ("gate_proj", "up_proj") if self.mlp == "swiglu" else ("up_proj",)
        plan |= {f"{LAYER}.mlp.{name}": "colwise" for name in inside}
        return plan | {f"{LAYER}.mlp.down_proj": "rowwise"}

    @property
    def base_model_pp_plan(self) -> dict[str, tuple[list[str], list[str]]] | None:
        """Modules of a pipeline in order, with inputs and outputs; None if no server can run it."""
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
        """Kind of attention of each layer, for servers; AttributeError if no server can run it."""
        if (lacked := self.lacks_for_servers) is not None:
            raise AttributeError(f"no server has the layers of a model with {lacked}")
        kind = "full_attention" if self.sliding_window is None else "sliding_attention"
        return [kind] * self.num_hidden_layers

    @property
    def sliding_window(self) -> int | None:
        """Keys in the window, the query's own included, for servers; None means no window."""
        return None if self.lacks_for_servers else self.attention.spans[1]

    @property
    def lacks_for_servers(self) -> str | None:
        """The first option of the model that a server's attention cannot compute, or None."""
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
        """Whether a part reads the weights of attention."""
        return any(part.resolved_place == "beside_attention" for part in self.parts)


def check_devices(config: Any, plan: dict[str, str], tp_size: int, pp_size: int) -> None:
    """Raise unless the model can be split in this way.

    Args:
        config: Configuration of the model.
        plan: How each weight is split over ``tp_size`` devices, by module name.
        tp_size: Devices that split the weights of each layer.
        pp_size: Devices that split the layers.

    Raises:
        ValueError: If the plan splits heads whose number ``tp_size`` does not divide.
        NotImplementedError: If ``pp_size`` is not 1.
    """
    if pp_size > 1:  # transformers' pipeline passes keywords that the decoder does not take
        must("pp_size", "be 1 (tp_size shares any model)", pp_size, NotImplementedError)
    if not any(n.endswith(".attention.k_proj") and plan[n] == "colwise" for n in plan):
        return
    for name in HEADS:
        if getattr(config, name) % tp_size:
            must(name, f"be divisible by tp_size={tp_size}", getattr(config, name))
