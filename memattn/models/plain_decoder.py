"""Inference on the CPU: one call for all layers of a decoder, where all are plain.

``memattn.models.plain_step`` says which layers are plain, and has the calls for one layer.
"""

from typing import Any

import torch
from torch import Tensor, nn

from memattn.models.cache import MemAttnCache
from memattn.models.plain_operands import collect_operands, is_plain_block
from memattn.models.plain_step import MAX_ROWS, fits, may_step, mlp_operands, nothing_watches
from memattn.parts import PartContext
from memattn.parts.base import is_bare


def decoder_step(
    layers: nn.ModuleList, hidden_states: Tensor, context: PartContext, cache: MemAttnCache | None
) -> Tensor | None:
    """Run one new token ``[B, 1, E]`` through all layers in one call; None if that is not possible.

    The angles of ``context.rotary`` are not needed.
    """
    if cache is None or not may_step(hidden_states, context):
        return None
    B, T, _ = hidden_states.shape
    if T != 1 or B > MAX_ROWS or context.measure_losses or context.library is not None:
        return None
    turns = context.rotary_embedding
    if turns is not None and not is_bare(turns):
        return None
    states = [layer.parts["attention"] for layer in cache.layers]
    found = cache.operands
    if found is None or not found.hold(layers):
        found = cache.operands = collect_operands(layers, context)
    if found is None:
        return None
    empty = hidden_states.new_empty(B, found.heads[0], 0, found.heads[1])
    if not all(fits(state, empty) for state in states):
        return None
    bounds = [bound for state in states for bound in state.bounds]
    cos = sin = None
    if turns is not None:
        cos, sin = turns.table(context.offset + 2 + found.ahead)
    kept = [state.extend(name, 1, empty) for state in states for name in ("key", "value")]
    return torch.ops.memattn_cpp.decoder_step(
        hidden_states,
        found.weights,
        kept,
        found.given,
        cos,
        sin,
        context.positions,
        bounds,
        found.spans,
        found.eps,
    )


def newest_of(n: int, block: Any, norm: Any, context: PartContext) -> int | None:
    """``PartContext.newest`` for the last block of a model with a norm behind it.

    It is ``n`` if only this block and the norm read the hidden states, else None.
    """
    if context.measure_losses or context.library is not None or context.cu_seqlens is not None:
        return None
    if not is_plain_block(block) or type(norm) is not nn.RMSNorm or not is_bare(norm):
        return None
    is_plain = mlp_operands(block.mlp_norm, block.mlp) is not None
    return n if is_plain and context.once("may step", nothing_watches) else None
