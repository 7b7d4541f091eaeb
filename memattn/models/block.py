"""One block of the decoder, assembled from the parts its configuration names."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from memattn.models.cache_layer import MemAttnCacheLayer
from memattn.models.config import MemAttnConfig
from memattn.nn import make_mlp, make_norm
from memattn.parts import PartContext
from memattn.parts.losses import check_output

Losses = dict[str, tuple[Tensor, Tensor]]


class BlockOutput(NamedTuple):
    """Hidden states, the losses of the parts, and what goes on to the next block."""

    hidden_states: Tensor  # [B, T, E]
    losses: Losses  # by name: sum and count
    carry: dict[str, Tensor]  # by name


class MemAttnBlock(GradientCheckpointingLayer):
    """Attention, MLP and further parts, each behind a norm and around a residual.

    Args:
        config: Configuration of the model.
        layer_idx: Number of the block, from 0; not all need have the same parts.
    """

    def __init__(self, config: MemAttnConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        norm = lambda: make_norm(config.norm, config.hidden_size, config.rms_norm_eps)
        self.layer_idx = layer_idx
        self.part_configs = config.layer_parts(layer_idx)
        build = lambda name: self.part_configs[name].build(config.sizes, layer_idx)
        added = [name for name in self.part_configs if name != "attention"]
        self.attention_norm = norm()
        self.attention = build("attention")
        self.mlp_norm = norm()
        self.mlp = make_mlp(config.mlp, config.hidden_size, config.intermediate_size)
        self.part_norms = nn.ModuleDict({name: norm() for name in added})
        self.parts = nn.ModuleDict({name: build(name) for name in added})
        configs = self.part_configs.values()
        self.loss_names = tuple(dict.fromkeys(name for part in configs for name in part.losses))
        self.carry_names = tuple(dict.fromkeys(name for part in configs for name in part.carries))

    def module_of(self, name: str) -> nn.Module:
        """The module of a part of this block."""
        return self.attention if name == "attention" else self.parts[name]

    def call(
        self,
        hidden_states: Tensor,
        carry: Mapping[str, Tensor],
        context: PartContext,
        cache: MemAttnCacheLayer | None,
        shared_parts: Mapping[str, nn.Module],
    ) -> BlockOutput:
        """Run the block; under checkpointing only tensors go in and out, one by one."""
        names = tuple(carry)
        outputs = self(
            hidden_states,
            *carry.values(),
            names=names,
            context=context,
            cache=cache,
            shared_parts=shared_parts,
        )
        hidden_states, rest = outputs[0], list(outputs[1:])
        losses = {}
        for name in self.loss_names if context.measure_losses else ():
            losses[name] = (rest.pop(0), rest.pop(0))
        names = dict.fromkeys((*names, *self.carry_names))
        return BlockOutput(hidden_states, losses, dict(zip(names, rest, strict=True)))

    def forward(
        self,
        hidden_states: Tensor,
        *carried: Tensor,
        names: tuple[str, ...],
        context: PartContext,
        cache: MemAttnCacheLayer | None = None,
        shared_parts: Mapping[str, nn.Module] | None = None,
    ) -> tuple[Tensor, ...]:
        """Map ``[B, T, E]`` to ``[B, T, E]``, the losses' sums and counts, and what goes on."""
        carry = dict(zip(names, carried, strict=True))
        losses: Losses = {}
        for place in ("before_attention", "attention", "after_attention", "mlp", "after_mlp"):
            if place == "mlp":
                hidden_states = hidden_states + self.mlp(self.mlp_norm(hidden_states))
            for name, part in self.part_configs.items():
                if part.stands == place:
                    shared = (shared_parts or {}).get(name)
                    opened = ()
                    if context.library is not None:
                        device = hidden_states.device
                        opened = context.library.opened(self.layer_idx, name, device)
                    state = None if cache is None else cache.parts[name]
                    own = context.of_part(state, carry, hidden_states, shared, opened)
                    hidden_states = self._run(name, hidden_states, carry, losses, own)
        flat = [hidden_states]
        if context.measure_losses:
            for name in self.loss_names:
                flat += losses[name]
        return (*flat, *(carry[name] for name in dict.fromkeys((*names, *self.carry_names))))

    def _run(
        self,
        name: str,
        hidden_states: Tensor,
        carry: dict[str, Tensor],
        losses: Losses,
        context: PartContext,
    ) -> Tensor:
        """Add the output of one part to the residual, its losses and carry to those there are."""
        part = self.part_configs[name]
        norm = self.attention_norm if name == "attention" else self.part_norms[name]
        normed = norm(hidden_states)
        if context.library is not None and context.library.is_recording:
            context.library.record(self.layer_idx, name, part.chapter_tensors(normed[0]))
        output = part.run(self.module_of(name), normed, context)
        check_output(part, output, measured=context.measure_losses)
        for loss, (total, count) in output.losses.items():
            before = losses.get(loss)
            losses[loss] = (
                (total, count) if before is None else (before[0] + total, before[1] + count)
            )
        carry |= output.carry
        return hidden_states + output.hidden_states
