"""One block of the decoder, built from the parts in its configuration."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from memattn.models.cache_layer import MemAttnCacheLayer
from memattn.models.config import MemAttnConfig
from memattn.models.plain_step import attention_step, mlp_step
from memattn.models.plain_training import attention_sublayer, mlp_sublayer
from memattn.nn import make_mlp, make_norm
from memattn.parts import PartContext
from memattn.parts.losses import check_output

Losses = dict[str, tuple[Tensor, Tensor]]


class BlockOutput(NamedTuple):
    """Hidden states, the losses of the parts, and tensors for the next block."""

    hidden_states: Tensor  # [B, T, E]
    losses: Losses  # by name: sum and count
    carry: dict[str, Tensor]  # by name


class BlockCall(NamedTuple):
    """Data that the parts share in one call of a block; each part adds its losses and carry."""

    context: PartContext
    cache: MemAttnCacheLayer | None
    shared_parts: Mapping[str, nn.Module]
    carry: dict[str, Tensor]
    losses: Losses


class MemAttnBlock(GradientCheckpointingLayer):
    """Attention, MLP and further parts, each with its own norm and a residual connection.

    Parts beside attention share its norm and residual.

    Args:
        config: Configuration of the model.
        layer_idx: Index of the block, from 0; blocks may have different parts.
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
        attention: Any = build("attention")
        attention.layer_idx = layer_idx  # the key by which a server finds the layer's cache
        self.attention = attention
        self.mlp_norm = norm()
        self.mlp = make_mlp(config.mlp, config.hidden_size, config.intermediate_size)
        own_norm = [n for n in added if self.part_configs[n].resolved_place != "beside_attention"]
        self.part_norms = nn.ModuleDict({name: norm() for name in own_norm})
        self.parts = nn.ModuleDict({name: build(name) for name in added})
        configs = self.part_configs.values()
        self.has_beside = any(part.resolved_place == "beside_attention" for part in configs)
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
        """Run the block; under checkpointing its inputs and outputs are separate tensors."""
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
        """Map ``[B, T, E]`` to the output of all or of the newest tokens, losses, and carry."""
        carry = dict(zip(names, carried, strict=True))
        losses: Losses = {}
        call = BlockCall(context, cache, shared_parts or {}, carry, losses)
        own: Any = self._modules  # faster than attribute access of modules
        for place in ("before_attention", "attention", "after_attention", "mlp", "after_mlp"):
            if place == "mlp":
                modules = own["mlp_norm"], own["mlp"]
                stepped = None
                if self.training:  # also without gradients: checkpointing starts that way
                    stepped = mlp_sublayer(hidden_states, *modules, own["attention"], context)
                if stepped is None:
                    stepped = mlp_step(hidden_states, *modules, context)
                if stepped is None:
                    stepped = hidden_states + self.mlp(self.mlp_norm(hidden_states))
                hidden_states = stepped
            elif place == "attention":
                modules = own["attention_norm"], own["attention"], self.part_configs["attention"]
                stepped = None
                if self.training and not self.has_beside:
                    stepped = attention_sublayer(hidden_states, *modules, context, cache)
                if stepped is None and not self.has_beside:
                    stepped = attention_step(hidden_states, *modules, context, cache)
                if stepped is not None:
                    hidden_states = stepped
                    continue
                normed = self.attention_norm(hidden_states)
                attended = self._run("attention", normed, hidden_states, call)
                for name in self._standing("beside_attention"):
                    attended = self._run(name, normed, hidden_states, call, attended)
                hidden_states = hidden_states + attended
            else:
                for name in self._standing(place):
                    normed = self.part_norms[name](hidden_states)
                    hidden_states = hidden_states + self._run(name, normed, hidden_states, call)
        flat = [hidden_states]
        if context.measure_losses:
            for name in self.loss_names:
                flat += losses[name]
        return (*flat, *(carry[name] for name in dict.fromkeys((*names, *self.carry_names))))

    def _standing(self, place: str) -> list[str]:
        """The parts in a place."""
        return [name for name, part in self.part_configs.items() if part.resolved_place == place]

    def _run(
        self,
        name: str,
        normed: Tensor,
        residual: Tensor,
        call: BlockCall,
        attended: Tensor | None = None,
    ) -> Tensor:
        """The output of one part; its losses and carry are added to those of the call."""
        part, library = self.part_configs[name], call.context.library
        opened = ()
        if library is not None:
            opened = library.opened(self.layer_idx, name, residual.device)
            if library.is_recording:
                library.record(self.layer_idx, name, part.chapter_tensors(normed[0]))
        context = call.context.of_part(
            None if call.cache is None else call.cache.parts[name],
            call.carry,
            residual,
            call.shared_parts.get(name),
            opened,
            attended,
            None if attended is None else self.attention,
        )
        output = part.run(self.module_of(name), normed, context)
        check_output(part, output, measured=context.measure_losses)
        for loss, (total, count) in output.losses.items():
            before = call.losses.get(loss)
            call.losses[loss] = (
                (total, count) if before is None else (before[0] + total, before[1] + count)
            )
        call.carry.update(output.carry)
        return output.hidden_states
