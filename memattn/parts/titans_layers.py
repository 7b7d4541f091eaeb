"""Titans layers: a neural memory alone, as a gate of attention, or before attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memattn.nn import NeuralMemory, SegmentedAttention
from memattn.nn.base_attention import BASES, BaseAttention, base_attention
from memattn.parts.context import PartContext
from memattn.parts.memory_routing import call_bounds
from memattn.parts.segment_pieces import SegmentPieces
from memattn.parts.titans_options import REMEMBERED, VALUES, LongTermTokens, ValueMix
from memattn.parts.titans_state import TitansState


class NormedGate(nn.Module):
    """``RMSNorm(u) * sigmoid(RMSNorm(w))``; each norm has its own weights."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.value_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.gate_norm = nn.RMSNorm(hidden_size, eps=eps)

    def forward(self, value: Tensor, gate: Tensor) -> Tensor:
        """Gate ``value [..., E]`` by ``gate [..., E]``."""
        # autocast does not convert the inputs of norms
        value, gate = (x.to(self.value_norm.weight.dtype) for x in (value, gate))
        return self.value_norm(value) * self.gate_norm(gate).sigmoid()


class MemoryLayer(nn.Module):
    """LMM: the memory alone."""

    def __init__(self, memory: NeuralMemory) -> None:
        super().__init__()
        self.memory = memory
        # set by TitansOptions
        self.weight_residual = self.value_residual = False
        self.value_mix: ValueMix | None = None
        self.longterm: LongTermTokens | None = None

    def forward(self, hidden_states: Tensor, context: PartContext) -> Tensor:
        """Map normed hidden states ``[B, T, E]`` to the layer's output ``[B, T, E]``."""
        return self.remember(hidden_states, context)

    def remember(self, hidden_states: Tensor, context: PartContext) -> Tensor:
        """Write the tokens into the memory and read it at each, starting from the layer's state."""
        B = hidden_states.shape[0]
        options: dict[str, Any] = dict(cu_seqlens=context.cu_seqlens, **call_bounds(context))
        before = self.remembered_before(context)
        if before is not None:
            options["kv_states"] = hidden_states + before
        cache = context.state
        if cache is not None:
            assert isinstance(cache, TitansState)
            options["state"] = cache.read_memory(self.memory, B)
        found = self.memory(hidden_states, **options)
        if isinstance(cache, TitansState):
            cache.write_memory(found.state, all_present(hidden_states, context))
        if self.weight_residual:
            context.handed[REMEMBERED] = found.out
        return found.out

    def remembered_before(self, context: PartContext) -> Tensor | None:
        """Output ``[B, T, E]`` of the previous layer's memory; None if it is not used."""
        return context.carry.get(REMEMBERED) if self.weight_residual else None

    def change_value(
        self, hidden_states: Tensor, context: PartContext, cut: SegmentPieces | None = None
    ) -> Callable[[Tensor], Tensor] | None:
        """A function that changes the values of attention over ``hidden_states [B, T, E]``, or
        None.

        The first layer passes its values on; the other layers mix them into theirs. With ``cut``,
        tokens are in the order of its pieces.
        """
        if not self.value_residual:
            return None

        def change(value: Tensor) -> Tensor:
            if self.value_mix is None:
                context.handed[VALUES] = value if cut is None else cut.columns(value)
                return value
            first = context.carry[VALUES]
            return self.value_mix(hidden_states, value, first if cut is None else cut.flat(first))

        return change


class MemoryAsGate(MemoryLayer):
    """MAG: attention within a window, gated by the memory."""

    def __init__(
        self, memory: NeuralMemory, attention: SegmentedAttention, hidden_size: int, eps: float
    ) -> None:
        super().__init__(memory)
        self.attention = attention
        self.gate = NormedGate(hidden_size, eps)

    def forward(self, hidden_states: Tensor, context: PartContext) -> Tensor:
        change = self.change_value(hidden_states, context)
        inputs = context.attention_inputs()
        attended = self.attention(hidden_states, **inputs, change_value=change)
        return self.gate(attended, self.remember(hidden_states, context))


class MemoryAsLayer(MemoryLayer):
    """MAL: attention within a window over the memory's output."""

    def __init__(self, memory: NeuralMemory, attention: SegmentedAttention) -> None:
        super().__init__(memory)
        self.attention = attention

    def forward(self, hidden_states: Tensor, context: PartContext) -> Tensor:
        remembered = self.remember(hidden_states, context)
        change = self.change_value(remembered, context)
        return self.attention(remembered, **context.attention_inputs(), change_value=change)


def all_present(hidden_states: Tensor, context: PartContext) -> Tensor:
    """bool ``[B, T]``, which tokens of the call are present."""
    if context.present is not None:
        return context.present
    shape, device = hidden_states.shape[:2], hidden_states.device
    return torch.ones(shape, dtype=torch.bool, device=device)


def _attention_of(layer: MemoryLayer) -> BaseAttention | None:
    """Description of a layer's attention for specialists; a memory alone has none."""
    attention = getattr(layer, "attention", None)
    return None if attention is None else base_attention(attention)


BASES[MemoryLayer] = _attention_of
