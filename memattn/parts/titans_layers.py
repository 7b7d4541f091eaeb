"""Layers of Titans: a neural memory alone, beside attention as a gate, or before it."""

from typing import Any

import torch
from torch import Tensor, nn

from memattn.nn import NeuralMemory, SegmentedAttention
from memattn.parts.context import PartContext
from memattn.parts.memory_routing import call_bounds
from memattn.parts.titans_state import TitansState


class NormedGate(nn.Module):
    """``RMSNorm(u) * sigmoid(RMSNorm(w))``, each norm with weights of its own."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.value_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.gate_norm = nn.RMSNorm(hidden_size, eps=eps)

    def forward(self, value: Tensor, gate: Tensor) -> Tensor:
        """Gate ``value [..., E]`` by ``gate [..., E]``."""
        return self.value_norm(value) * self.gate_norm(gate).sigmoid()


class MemoryLayer(nn.Module):
    """LMM: the memory alone."""

    def __init__(self, memory: NeuralMemory) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, hidden_states: Tensor, context: PartContext) -> Tensor:
        """Map normed hidden states ``[B, T, E]`` to the layer's output ``[B, T, E]``."""
        return self.remember(hidden_states, context)

    def remember(self, hidden_states: Tensor, context: PartContext) -> Tensor:
        """Write the tokens into the memory and read it at each, from the layer's state on."""
        B, T, _ = hidden_states.shape
        if context.cu_seqlens is not None:
            return self.memory(hidden_states, cu_seqlens=context.cu_seqlens).out
        bounds: dict[str, Any] = call_bounds(context)
        cache = context.state
        if cache is None:
            return self.memory(hidden_states, **bounds).out
        assert isinstance(cache, TitansState)
        state = cache.read_memory(self.memory, B)
        found = self.memory(hidden_states, state=state, **bounds)
        cache.write_memory(found.state, all_present(hidden_states, context))
        return found.out


class MemoryAsGate(MemoryLayer):
    """MAG: attention within a window, gated by the memory."""

    def __init__(
        self, memory: NeuralMemory, attention: SegmentedAttention, hidden_size: int, eps: float
    ) -> None:
        super().__init__(memory)
        self.attention = attention
        self.gate = NormedGate(hidden_size, eps)

    def forward(self, hidden_states: Tensor, context: PartContext) -> Tensor:
        attended = self.attention(hidden_states, **context.attention_inputs())
        return self.gate(attended, self.remember(hidden_states, context))


class MemoryAsLayer(MemoryLayer):
    """MAL: attention within a window over what the memory gives."""

    def __init__(self, memory: NeuralMemory, attention: SegmentedAttention) -> None:
        super().__init__(memory)
        self.attention = attention

    def forward(self, hidden_states: Tensor, context: PartContext) -> Tensor:
        remembered = self.remember(hidden_states, context)
        return self.attention(remembered, **context.attention_inputs())


def all_present(hidden_states: Tensor, context: PartContext) -> Tensor:
    """bool ``[B, T]``, which tokens of the call are there."""
    if context.present is not None:
        return context.present
    shape, device = hidden_states.shape[:2], hidden_states.device
    return torch.ones(shape, dtype=torch.bool, device=device)
