"""Routing by blocks: which tokens select chapters together, and the causal means they select by.

Positions ``t = 0, 1, ...`` count the tokens of one sequence or document. Block ``m`` starts at ``t0
= m R``. All its tokens use the chapters that the router selects for

- ``"sequence"``: the mean of the inputs at ``0 <= j <= t0``;
- ``"rolling"``: the mean at ``max(0, t0 - W + 1) <= j <= t0``;
- ``"hybrid"``: half of each;
- ``"token"``: the input itself, with ``R = 1``.

None of them depends on where a call ends, so decoding selects the same chapters as prefill.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn.nn._running_sums import running_sum, shift, window_sum

STRATEGIES = ("sequence", "rolling", "token", "hybrid")


class RoutingBlocks(NamedTuple):
    """The blocks of one call's tokens, int64 ``[B, N]`` each."""

    start: Tensor  # column of the first token, negative for a block that began in an earlier call
    number: Tensor  # of the block in its sequence or document
    aligned: bool  # whether block m of every row begins at column m R


class PooledBlocks(NamedTuple):
    """The inputs that blocks are routed by."""

    rows: Tensor  # [B, N, E], in the dtype of the inputs
    total: Tensor  # [B, N, E], sum of all inputs before the block, float64


def sequence_blocks(
    positions: Tensor, num_tokens: int, routing_block: int, *, with_past: bool, padded: bool
) -> RoutingBlocks:
    """Blocks of rows that hold one sequence each.

    Args:
        positions: int64 ``[B]``, position of the first column of each row, negative before it
            begins.
        num_tokens: Columns, ``T``.
        routing_block: Tokens in a block, ``R``.
        with_past: Whether a block may have begun in an earlier call; the first of the blocks is
            then the one that holds the first column.
        padded: Whether rows may begin at different columns.
    """
    R, T = routing_block, num_tokens
    N = (T + R - 2) // R + 1 if with_past else (T + R - 1) // R
    row = torch.arange(N, device=positions.device)
    first = positions.clamp(min=0)
    start = -positions + (first - first % R)
    # of an exported program the rest of the last block is not known
    aligned = not (with_past or padded or torch.compiler.is_exporting())
    return RoutingBlocks(start[:, None] + row * R, first[:, None] // R + row, aligned)


def document_blocks(cu_seqlens: Tensor, num_tokens: int, routing_block: int) -> RoutingBlocks:
    """Blocks of one row of packed documents, in the order of the documents."""
    R, T = routing_block, num_tokens
    cu = cu_seqlens.long()
    blocks = (cu.diff() + R - 1) // R
    # while a graph is traced, an upper bound; superfluous blocks are empty
    most = -(-T // R) + cu.numel() - 2 if T else 0
    N = most if torch.compiler.is_compiling() else int(blocks.sum())
    first = F.pad(blocks.cumsum(0), (1, 0))
    number = torch.arange(N, device=cu.device)
    document = torch.searchsorted(first[1:].contiguous(), number, right=True)
    over = document >= cu.numel() - 1
    document = document.clamp(max=cu.numel() - 2)
    index = number - first[document]
    start = torch.where(over, T, cu[document] + index * R)
    return RoutingBlocks(start[None], index[None], False)


def pool_blocks(
    inputs: Tensor,
    blocks: RoutingBlocks,
    *,
    strategy: str,
    routing_block: int,
    routing_window: int,
    past: Tensor | None = None,
    past_is_whole: Tensor | None = None,
    kept: int = 0,
) -> PooledBlocks:
    """Means by which blocks are routed.

    Sums within a block have a fixed order, whatever the batch and the call; sums over blocks are
    float64.

    Args:
        inputs: ``[B, kept + T, E]``, 0 for absent tokens.
        blocks: Blocks in columns of this call.
        strategy: One of ``STRATEGIES`` except ``"token"``.
        routing_block: Tokens in a block, ``R``.
        routing_window: Tokens in the rolling window, ``W``.
        past: float64 ``[B, E]``, sum of the inputs before the block that holds the last column
            before this call; None without earlier calls.
        past_is_whole: bool ``[B]``, whether that block is complete, so that this call starts with
            the next one. Given together with ``past``.
        kept: Columns of earlier calls before the inputs: all, or at least ``R`` and ``W - 1``.
    """
    R, W = routing_block, routing_window
    full, rest = divmod(W - 1, R)  # a window is one token, some full blocks and the end of one
    lead = full + 1 if kept else 0  # blocks before the first one
    before = torch.arange(-lead, 0, device=inputs.device)
    start = torch.cat([blocks.start[:, :1] + before * R, blocks.start], 1)
    index = torch.cat([blocks.number[:, :1] + before, blocks.number], 1)
    tokens = _gather_blocks(inputs, start + kept, index >= 0, R, blocks.aligned)
    sums = _fixed_sum(tokens).double()  # [B, lead + N, E]
    first = tokens[:, lead:, 0].double()

    # sums over all blocks from the first of this call on, and before each
    relative = blocks.number - blocks.number[:, :1]
    total = shift(running_sum(sums[:, lead:], relative), 1, relative)
    if past is not None and past_is_whole is not None:
        if lead:
            past = past + torch.where(past_is_whole[:, None], sums[:, lead - 1], 0.0)
        total = total + past[:, None]
    count = (blocks.number * R + 1)[..., None]
    pooled = {"sequence": lambda: (total + first) / count}

    def rolling() -> Tensor:
        window = shift(window_sum(sums, index, full), 1, index) if full else 0.0
        if rest:
            ends = _fixed_sum(tokens[:, :, R - rest :]).double()
            window = window + shift(ends, full + 1, index)
        window = window[:, lead:] if isinstance(window, Tensor) else window
        return (window + first) / count.clamp(max=W)

    pooled["rolling"] = rolling
    pooled["hybrid"] = lambda: 0.5 * (pooled["sequence"]() + pooled["rolling"]())
    return PooledBlocks(pooled[strategy]().to(inputs.dtype), total)


def _gather_blocks(inputs: Tensor, start: Tensor, exists: Tensor, R: int, aligned: bool) -> Tensor:
    """Tokens ``[B, N, R, E]`` of blocks that start at columns ``[B, N]``, 0 outside."""
    S, N = inputs.shape[1], start.shape[1]
    if aligned:
        return torch.unflatten(F.pad(inputs, (0, 0, 0, N * R - S)), 1, (N, R))
    column = start[..., None] + torch.arange(R, device=start.device)  # [B, N, R]
    inside = (column >= 0) & (column < S) & exists[..., None]
    row = torch.arange(inputs.shape[0], device=start.device)[:, None, None]
    tokens = inputs[row, column.clamp(0, max(S - 1, 0))]
    return torch.where(inside[..., None], tokens, 0.0)


def _fixed_sum(x: Tensor) -> Tensor:
    """Sum over axis 2 in an order that depends only on its length; half types in float32."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    while x.shape[2] > 1:
        half = -(-x.shape[2] // 2)
        high = x[:, :, half:]
        x = x[:, :, :half] + F.pad(high, (0, 0, 0, half - high.shape[2]))
    return x[:, :, 0]
