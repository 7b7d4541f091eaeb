"""One forward call of an attached model: the context of its parts, and their losses."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memattn.adapters.attachment import Attachment
from memattn.adapters.cache import carry_states
from memattn.checks import check_tensor
from memattn.nn import make_norm, sequence_positions
from memattn.parts import PartContext, SequenceBounds, SequenceStates, Sizes
from memattn.parts.losses import LossSums, check_output
from memattn.parts.packing import PackedRows, rows_where_positions_jump
from memattn.parts.padding import check_lengths, check_mask, mask_bounds
from memattn.parts.token_order import TokenOrder

Carry = dict[str, dict[str, Tensor]]  # by adapter, then by name


class Entry(NamedTuple):
    """The inputs of a layer's parts in its first run, reused when checkpointing repeats it."""

    carry: Carry
    shared: dict[Any, Any]


class Beside(NamedTuple):
    """Inputs of parts beside attention other than its own input."""

    attended: Tensor  # [B, T, E], its output, or that of the part before
    base: nn.Module  # attention
    rotary: tuple[Tensor, Tensor] | None  # cosines and sines that it turned queries and keys by


class Call:
    """Collects losses while it is open, that is during the model's forward. Layers that activation
    checkpointing repeats in the backward pass find the same inputs in it, and add no losses.

    Args:
        attachment: What is attached to the model.
        attention_mask: ``[B, S]`` with the cached columns, or None.
        position_ids: As given to the model, or None.
        packing: The other arguments of the model that describe documents in its rows.
        measure_losses: Whether parts are to return their losses.
        inputs: Tensors for parts, by the names in their ``inputs``.
    """

    def __init__(
        self,
        attachment: Attachment,
        attention_mask: Any,
        position_ids: Tensor | None,
        packing: Mapping[str, Any],
        measure_losses: bool,
        inputs: Mapping[str, Tensor],
    ) -> None:
        if attention_mask is not None:
            check_tensor("attention_mask", attention_mask)
        self.attachment = attachment
        self.attention_mask: Tensor | None = attention_mask
        self.position_ids = position_ids
        self.packing = packing
        self.measure_losses = measure_losses
        self.inputs = inputs
        self.losses = LossSums()
        self.is_open = True
        self.carry: Carry = {}
        self.entries: dict[int, Entry] = {}
        self.states: SequenceStates | None = None
        self.contexts: dict[torch.device, PartContext] = {}

    def context(self, index: int, hidden_states: Tensor, cache: Any) -> PartContext:
        """The context of the tokens for parts, on the device of a layer."""
        if not self.contexts:
            self.contexts[hidden_states.device] = self._first_context(index, hidden_states, cache)
        if hidden_states.device not in self.contexts:
            first = next(iter(self.contexts.values()))
            self.contexts[hidden_states.device] = _moved(first, hidden_states.device)
        return self.contexts[hidden_states.device]

    def _first_context(self, index: int, hidden_states: Tensor, cache: Any) -> PartContext:
        B, T, _ = hidden_states.shape
        device, mask = hidden_states.device, self.attention_mask
        offset = 0 if cache is None else int(cache.get_seq_length(index))
        limit = self.attachment.position_limit
        cu_seqlens = seq_start = None
        order: TokenOrder | PackedRows | None = None
        bounds = SequenceBounds(None, None)
        states = None
        if cache is not None:
            attachment = self.attachment
            states = carry_states(cache, attachment.empty_states, attachment.needs_state, index)
            self.states = states
        if states is not None:
            states.append_columns(B, T, mask, device, max_length=limit)
            if states.seq_start is not None and states.seq_start.any():
                seq_start = states.seq_start.to(device)
            order = states.order
        elif mask is not None:
            check_mask(mask, B, (T, offset + T))
            new = mask.shape[1] - T
            bounds, order = mask_bounds(mask[:, new:], B, T, None)
            seq_start = offset - (mask[:, :new] != 0).sum(1)
            if bounds.seq_start is not None:
                seq_start = seq_start + bounds.seq_start
            if not torch.compiler.is_compiling() and not seq_start.any():
                seq_start = None
        elif cache is None:
            order = rows_where_positions_jump((B, T), self.position_ids, self.packing)
            if order is not None:
                cu_seqlens, hidden_states = order.cu_seqlens, order.put(hidden_states)
        positions = sequence_positions(
            hidden_states, offset=offset, seq_start=seq_start, cu_seqlens=cu_seqlens
        )
        present = None if mask is None else mask[:, mask.shape[1] - T :] != 0
        if order is not None and cu_seqlens is None:
            present = order.put(order.present)
        if self.states is None:
            check_lengths(positions, present, limit)
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        if order is not None:
            inputs = {name: order.put_input(name, value) for name, value in inputs.items()}
        return PartContext(
            positions=positions,
            present=present,
            bounds=bounds,
            cu_seqlens=cu_seqlens,
            offset=offset,
            measure_losses=self.measure_losses,
            inputs=inputs,
            order=order,
        )

    def close(self) -> None:
        """End the call; later losses are not collected."""
        self.is_open = False


class LayerRun:
    """One run of one layer in a call; its parts run place by place.

    Args:
        call: The call.
        layer: The layer, whose ``memory_adapters`` hold its parts by adapter.
        index: Its number.
        hidden_states: The input of the layer, ``[B, T, E]``.
        cache: The cache of the call, or None.
    """

    def __init__(
        self, call: Call, layer: Any, index: int, hidden_states: Tensor, cache: Any
    ) -> None:
        self.call, self.layer, self.index = call, layer, index
        self.residual = hidden_states  # what attention's output is added to
        context = call.context(index, hidden_states, cache)
        if call.is_open:
            self.carry = dict(call.carry)
            if layer.training:
                call.entries[index] = Entry(call.carry, dict(context.shared))
        else:
            entry = call.entries[index]
            self.carry = dict(entry.carry)
            context = copy.copy(context)
            context.shared = dict(entry.shared)
        self.context = context

    def has_parts(self, place: str) -> bool:
        """Whether an active part has this place."""
        adapters = self.layer.memory_adapters
        active = self.call.attachment.active
        return any(adapters[name].at(place) for name in active if name in adapters)

    def add_parts(
        self, place: str, hidden_states: Tensor, output: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Add what the parts of one place return to the hidden states, and to ``output`` too."""
        for name in self.call.attachment.active:
            if name in self.layer.memory_adapters:
                for part in self.layer.memory_adapters[name].at(place):
                    change = self._run(name, part, hidden_states).to(hidden_states.dtype)
                    hidden_states = hidden_states + change
                    output = None if output is None else output + change
        return hidden_states, output

    def beside_attention(self, normed: Tensor, beside: Beside) -> Tensor:
        """The output ``[B, T, E]`` that replaces attention's."""
        for name in self.call.attachment.active:
            if name in self.layer.memory_adapters:
                for part in self.layer.memory_adapters[name].at("beside_attention"):
                    attended = self._run(name, part, normed, beside)
                    beside = beside._replace(attended=attended.to(beside.attended.dtype))
        return beside.attended

    def _run(
        self, adapter: str, name: str, hidden_states: Tensor, beside: Beside | None = None
    ) -> Tensor:
        """The output of one part for hidden states, or for attention's input if it is beside it."""
        call, parts = self.call, self.layer.memory_adapters[adapter]
        part, module = parts.configs[name], parts.parts[name]
        state = None
        if call.states is not None:
            state = call.states.layers[self.index].parts[f"{adapter}.{name}"]
        chapters = call.attachment.adapters[adapter].chapters
        residual = self.residual if beside else hidden_states
        order = self.context.order
        if order is not None:
            hidden_states, residual = order.put(hidden_states), order.put(residual)
        dtype = parts.dtype_of(name) or hidden_states.dtype
        context = self.context.of_part(
            state,
            self.carry.get(adapter, {}),
            residual.to(dtype),
            call.attachment.shared_module(adapter, name),
            chapters.opened(self.index, name, hidden_states.device),
        )
        normed = hidden_states.to(dtype)
        if beside is None:
            normed = parts.norms[name](normed)
        else:
            context.attended, context.base, context.rotary = beside
            if order is not None:
                context.attended = order.put(beside.attended)
                if beside.rotary is not None:
                    cos, sin = map(order.put_keys, beside.rotary)
                    context.rotary = cos, sin
        if chapters.is_recording:
            chapters.record(self.index, name, part.chapter_tensors(normed[0]))
        output = part.run(module, normed, context)
        check_output(part, output, measured=call.measure_losses)
        if output.carry:
            self.carry[adapter] = {**self.carry.get(adapter, {}), **output.carry}
        if call.is_open:
            call.losses.add(output.losses)
        return output.hidden_states if order is None else order.columns(output.hidden_states)

    def leave(self) -> None:
        """Pass the carried tensors on to the next layer."""
        if self.call.is_open:
            self.call.carry = self.carry


def _moved(context: PartContext, device: torch.device) -> PartContext:
    """A copy of the context on another device."""
    moved = copy.copy(context)
    move = lambda tensor: None if tensor is None else tensor.to(device)
    moved.positions = context.positions.to(device)
    moved.present, moved.cu_seqlens = move(context.present), move(context.cu_seqlens)
    moved.bounds = SequenceBounds(*map(move, context.bounds))
    moved.order = None if context.order is None else context.order.to(device)
    moved.inputs = {name: value.to(device) for name, value in context.inputs.items()}
    return moved


class AdapterLayer(nn.Module):
    """The parts of one adapter in one layer, each after a norm of its own or beside attention.

    Args:
        configs: The parts by name.
        sizes: Sizes of the model.
        layer: Number of the layer.
    """

    def __init__(self, configs: dict[str, Any], sizes: Sizes, layer: int) -> None:
        super().__init__()
        self.configs = configs
        norm = lambda: make_norm(sizes.norm, sizes.hidden_size, sizes.norm_eps)
        own_norm = [n for n, part in configs.items() if part.resolved_place != "beside_attention"]
        self.norms = nn.ModuleDict({name: norm() for name in own_norm})
        self.parts = nn.ModuleDict({name: p.build(sizes, layer) for name, p in configs.items()})

    def dtype_of(self, name: str) -> torch.dtype | None:
        """The dtype that a part computes in, or None where it has no weights."""
        weights = (self.norms[name] if name in self.norms else self.parts[name]).parameters()
        return next((p.dtype for p in weights if p.is_floating_point()), None)

    def at(self, place: str) -> list[str]:
        """Names of the parts in one place."""
        return [name for name, part in self.configs.items() if part.resolved_place == place]
