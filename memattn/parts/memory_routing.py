"""Routing of one call of chapter memory: blocks of tokens, also blocks begun in earlier calls."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memattn.checks import must
from memattn.nn import ChapterRouter
from memattn.nn.chapter_routing import (
    RoutingBlocks,
    document_blocks,
    pool_blocks,
    sequence_blocks,
)
from memattn.ops.chapter_router import RouterOutput
from memattn.parts.context import PartContext
from memattn.parts.routing_state import RoutingState, Slots


@dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """How tokens choose chapters.

    Attributes:
        strategy: One of ``memattn.nn.chapter_routing.STRATEGIES``.
        block: Tokens that are routed together.
        window: Tokens of the rolling window.
    """

    strategy: str
    block: int
    window: int


@dataclass(frozen=True, kw_only=True)
class RoutedTokens:
    """Chapters for the tokens of a call.

    Attributes:
        indices: int32 ``[B, N, K]``.
        weights: ``[B, N, K]``.
        options: Arguments of ``chapter_attention`` that place the rows of the indices.
        output: The router's output for the blocks that begin in this call.
    """

    indices: Tensor
    weights: Tensor
    options: dict[str, Any]
    output: RouterOutput


def route_tokens(
    rule: RoutingRule, router: ChapterRouter, hidden_states: Tensor, context: PartContext
) -> RoutedTokens:
    """Select chapters for ``hidden_states [B, T, E]``; store the state for later calls."""
    state = context.state
    assert state is None or isinstance(state, RoutingState)
    if rule.strategy == "token" or not hidden_states.shape[1]:
        output = router(hidden_states, context.present)
        # absent tokens get no chapter, so attention needs no bounds
        return RoutedTokens(
            indices=output.indices, weights=output.weights, options={}, output=output
        )
    R = rule.block
    B, T, _ = hidden_states.shape
    position = context.positions[:, 0].expand(B)
    blocks, options = context.once(("routing_blocks", R), lambda: _layout(position, T, R, context))
    inputs = hidden_states
    if context.present is not None:
        inputs = torch.where(context.present[..., None], inputs, 0.0)
    kept, past, past_is_whole = 0, None, None
    if state is not None:
        kept = state.kept
        inputs = state.append("input", inputs)
        if state.rows:
            past_is_whole = (position > 0) & (position % R == 0)
            past = torch.where((position > 0)[:, None], state.slots()[0][:, -1], 0.0)
    pooled = pool_blocks(
        inputs,
        blocks,
        strategy=rule.strategy,
        routing_block=R,
        routing_window=rule.window,
        past=past,
        past_is_whole=past_is_whole,
        kept=kept,
    )
    output = router(pooled.rows, _begin_here(blocks, T, context))
    indices, weights = output.indices, output.weights
    if state is not None:
        continues = (position > 0) & (position % R != 0)
        found = (pooled.total, indices, weights)
        if state.rows:
            found = _continue(state.slots(), found, continues)
        _, indices, weights = found
        end = T if context.present is None else _end(context.present)
        newest = torch.div(end - 1 - blocks.start[:, 0], R, rounding_mode="floor")
        state.keep_blocks(
            found, newest, length=position + end, continues=continues, began=position > 0
        )
    return RoutedTokens(indices=indices, weights=weights, options=options, output=output)


def _continue(old: Slots, new: Slots, continues: Tensor) -> Slots:
    """The blocks of a call; the first continues an open block of earlier calls, if there is one."""
    first = continues[:, None, None]
    total, indices, weights = (
        torch.cat([torch.where(first, a[:, -1:], b[:, :1]), b[:, 1:]], 1)
        for a, b in zip(old, new, strict=True)
    )
    return total, indices, weights


def _layout(
    position: Tensor, T: int, R: int, context: PartContext
) -> tuple[RoutingBlocks, dict[str, Any]]:
    """The blocks of a call, and the arguments of ``chapter_attention`` that place them."""
    options: dict[str, Any] = dict(routing_block=R)
    if context.cu_seqlens is not None:
        return document_blocks(context.cu_seqlens, T, R), {
            **options,
            "cu_seqlens": context.cu_seqlens,
        }
    with_past = context.state is not None
    padded = context.bounds.seq_start is not None
    blocks = sequence_blocks(position, T, R, with_past=with_past, padded=padded)
    start, end = context.bounds
    if with_past:
        # positions count from R columns before this call; the open block began there or later
        start = (blocks.start[:, 0] + R).int()
        end = None  # at least the start, also in a row without tokens
        if context.present is not None:
            end = (_end(context.present) + R).int().maximum(start)
        options["query_offset"] = R
    return blocks, {**options, "seq_start": start, "seq_end": end}


def call_bounds(context: PartContext) -> dict[str, Tensor | None]:
    """Bounds of the sequences in columns of this call, for parts without a state."""
    if context.cu_seqlens is not None or context.present is None:
        return {}
    if context.state is None:
        return dict(seq_start=context.bounds.seq_start, seq_end=context.bounds.seq_end)
    end = _end(context.present)
    start = end - context.present.sum(1)
    return dict(seq_start=start.int(), seq_end=end.int())


def _end(present: Tensor) -> Tensor:
    """Column after the last token of each row, int64 ``[B]``; 0 for a row without tokens."""
    column = torch.arange(1, present.shape[1] + 1, device=present.device)
    return torch.where(present, column, 0).amax(1)


def _begin_here(blocks: RoutingBlocks, T: int, context: PartContext) -> Tensor:
    """Which blocks have their first token in this call, bool ``[B, N]``."""
    begins = (blocks.start >= 0) & (blocks.start < T)
    if context.present is not None:
        begins = begins & context.present.gather(1, blocks.start.clamp(0, max(T - 1, 0)))
    return begins


def check_mode(rules: dict[bool, RoutingRule], training: bool, context: PartContext) -> RoutingRule:
    """The routing rule of training or evaluation; a cache works with the evaluation rule only."""
    if training and context.state is not None and rules[True] != rules[False]:
        same = "routing_strategy_train is routing_strategy_inference"
        must("past_key_values", f"be None in training mode, unless {same}", "a cache")
    return rules[training]
