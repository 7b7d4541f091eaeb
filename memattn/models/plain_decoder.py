"""Inference on the CPU: what spans the layers of a decoder, where all of them are plain.

``memattn.models.plain_step`` says which layers are, and has one layer alone.
"""

from typing import Any

import torch
from torch import Tensor, nn

from memattn.models.block import MemAttnBlock
from memattn.models.cache import MemAttnCache
from memattn.models.plain_step import (
    MAX_ROWS,
    attention_operands,
    fits,
    may_step,
    mlp_operands,
    nothing_watches,
)
from memattn.parts import PartContext
from memattn.parts.base import is_bare


def decoder_step(
    layers: nn.ModuleList, hidden_states: Tensor, context: PartContext, cache: MemAttnCache | None
) -> Tensor | None:
    """Hidden states of one more token ``[B, 1, E]`` behind all layers, by one call, or None.

    The angles of ``context.rotary`` are not needed.
    """
    if cache is None or not may_step(hidden_states, context):
        return None
    B, T, E = hidden_states.shape
    if T != 1 or B > MAX_ROWS or context.measure_losses:
        return None
    weights: list[Tensor] = []
    given: list[Tensor | None] = []
    bounds: list[Tensor | None] = []
    spans: list[int] = []
    eps: list[float] = []
    states, ahead = [], 0
    empty: Tensor | None = None
    blocks: Any = layers._modules.values()
    for block, layer_cache in zip(blocks, cache.layers, strict=True):
        if not _is_plain(block):
            return None
        own: Any = block._modules
        attention, part = own["attention"], block.part_configs["attention"]
        found = attention_operands(own["attention_norm"], attention, part, context)
        mlp = None if found is None else mlp_operands(own["mlp_norm"], own["mlp"])
        if found is None or mlp is None:
            return None
        state = layer_cache.parts["attention"]
        if empty is None:
            empty = hidden_states.new_empty(B, attention.num_kv_heads, 0, attention.head_dim)
        if not fits(state, empty):
            return None
        tensors, sources, more = found
        weights += tensors
        weights += mlp
        given += more
        bounds += state.bounds
        for span in (sources.segment_len, sources.window_size, sources.future_dim):
            spans.append(-1 if span is None else span)
        ahead = max(ahead, sources.future_dim)
        eps += (own["attention_norm"].eps, own["mlp_norm"].eps)
        states.append(state)
    cos = sin = None
    if context.rotary_embedding is not None:
        cos, sin = context.rotary_embedding.table(context.offset + 2 + ahead)
    kept = [state.extend(name, 1, empty) for state in states for name in ("key", "value")]
    return torch.ops.memattn_cpp.decoder_step(
        hidden_states, weights, kept, given, cos, sin, context.positions, bounds, spans, eps
    )


def newest_of(n: int, block: Any, norm: Any, context: PartContext) -> int | None:
    """``PartContext.newest`` for the last block of a model with a norm behind it.

    It is ``n`` where nothing but these would see that there are fewer hidden states, and else None.
    """
    if context.measure_losses or context.library is not None or context.cu_seqlens is not None:
        return None
    if not _is_plain(block) or type(norm) is not nn.RMSNorm or not is_bare(norm):
        return None
    is_plain = mlp_operands(block.mlp_norm, block.mlp) is not None
    return n if is_plain and context.once("may step", nothing_watches) else None


def _is_plain(block: Any) -> bool:
    """Whether it is a block of attention and an MLP alone, which nobody watches."""
    return type(block) is MemAttnBlock and is_bare(block) and len(block.part_configs) == 1
