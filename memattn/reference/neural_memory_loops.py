"""Definition of the neural memory, token by token; what ``neural_memory`` must equal.

Slow and short: two loops, and gradients of the inner loss by autograd.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn.reference.neural_memory import memory_sizes, pack, unpack
from memattn_kernels.signatures import NeuralMemoryArgs


class LoopResults(NamedTuple):
    """What the loops find; weights and momentum ``[R, H, P]`` at two places."""

    out: Tensor
    surprise: Tensor
    chunk_weights: Tensor  # at the start of the open chunk
    chunk_momentum: Tensor
    weights: Tensor  # after the last token
    momentum: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    skipped: Tensor


def memory(args: NeuralMemoryArgs, layers: list[Tensor], x: Tensor) -> Tensor:
    """``f(W; x)`` of one vector."""
    h = x
    for n, layer in enumerate(layers):
        h = layer @ h
        if n < len(layers) - 1:
            h = F.silu(h) if args.is_silu else F.gelu(h)
    return x + h if args.residual else h


def inner_loss(args: NeuralMemoryArgs, layers: list[Tensor], key: Tensor, value: Tensor) -> Tensor:
    """``l(W; k, v)``."""
    error = memory(args, layers, key) - value
    if args.is_huber:
        d = args.huber_delta
        return torch.where(error.abs() <= d, 0.5 * error**2, d * (error.abs() - 0.5 * d)).sum()
    return 0.5 * error.square().sum()


def neural_memory_loops(args: NeuralMemoryArgs) -> LoopResults:
    """The recurrence for each row, head and token."""
    B, H, _, _ = args.query.shape
    R = next((x.shape[0] for x in (args.count, args.row_start) if x is not None), B)
    outs, norms, ends = {}, {}, []
    counts, skips = [], []
    for r in range(R):
        skipped = 0 if args.skipped is None else int(args.skipped[r])
        count = 0
        for head in range(H):
            ends_of_head, count, missed = _row(args, r, r if R == B else 0, head, outs, norms)
            ends.append(ends_of_head)
            skipped += missed
        counts.append(count)
        skips.append(skipped)
    stack = lambda x: torch.stack(x).unflatten(0, (R, H))
    states = (stack([end[i] for end in ends]) for i in range(4))
    none = torch.zeros_like(args.value[0, 0, 0]), torch.zeros_like(args.lr[0, 0, 0])
    found = [
        torch.stack(
            [
                table.get((batch, head, t), zero)
                for batch in range(B)
                for head in range(H)
                for t in range(args.query.shape[2])
            ]
        ).unflatten(0, (B, H, -1))
        for table, zero in zip((outs, norms), none, strict=True)
    ]
    out, surprise = found
    return LoopResults(
        out, surprise, *states, count=torch.tensor(counts).int(), skipped=torch.tensor(skips)
    )


def _row(args: NeuralMemoryArgs, r: int, batch: int, head: int, out: dict, norms: dict):
    """One head of one row: fills ``out`` and ``norms``, returns states, count and skipped."""
    sizes = memory_sizes(args)
    shared = args.start_weights.shape[0] == 1
    start = list(unpack(args.start_weights[0 if shared else r, head], sizes))  # A
    momentum = [torch.zeros_like(layer) for layer in start]
    if args.start_momentum is not None:
        momentum = list(unpack(args.start_momentum[r, head], sizes))
    chunk_momentum, weights = momentum, start
    count, missed = 0, 0

    def update(gradient, eta, alpha):
        """Steps 4 and 5, and the fold of a chunk that is full."""
        nonlocal start, chunk_momentum, momentum, weights, count
        if args.momentum is None:
            momentum = [-u for u in gradient]
        else:
            momentum = [eta * s - u for s, u in zip(momentum, gradient, strict=True)]
        weights = [(1 - alpha) * w + s for w, s in zip(weights, momentum, strict=True)]
        count += 1
        if count == args.chunk_size:
            start, chunk_momentum, count = weights, momentum, 0

    for i in range(0 if args.count is None else int(args.count[r])):
        assert args.pending_h is not None and args.pending_delta is not None
        assert args.pending_momentum is not None and args.pending_decay is not None
        h = args.pending_h[r, head, i].split(sizes[:-1])
        delta = args.pending_delta[r, head, i].split(sizes[1:])
        gradient = [torch.outer(d, x) for d, x in zip(delta, h, strict=True)]
        update(gradient, args.pending_momentum[r, head, i], args.pending_decay[r, head, i])

    first = 0 if args.row_start is None else int(args.row_start[r])
    last = args.query.shape[2] if args.row_end is None else int(args.row_end[r])
    for t in range(first, last):
        q, k, v = (x[batch, head, t] for x in (args.query, args.key, args.value))
        theta = args.lr[batch, head, t]
        eta = 0.0 if args.momentum is None else args.momentum[batch, head, t]
        alpha = 0.0 if args.decay is None else args.decay[batch, head, t]
        before = start
        with torch.enable_grad():
            at = [w if w.requires_grad else w.detach().requires_grad_() for w in start]
            loss = inner_loss(args, at, k, v)
            gradient = torch.autograd.grad(loss, at, create_graph=True)
        square = torch.stack([u.square().sum() for u in gradient]).sum()
        norm = square.sqrt() if square != 0 else 0 * square
        norms[batch, head, t] = norm.detach()
        if args.skip_nonfinite and not norm.isfinite():
            missed += 1
            gradient = [torch.zeros_like(u) for u in gradient]
        elif args.max_norm is not None and norm != 0:
            share = norm.reciprocal() * args.max_norm
            soft = share * torch.tanh(norm / args.max_norm)
            factor = soft if args.clamp_soft else share.clamp(max=1)
            gradient = [factor * u for u in gradient]
        update([theta * u for u in gradient], eta, alpha)
        out[batch, head, t] = memory(args, before if args.read_chunk else weights, q)
    if args.momentum is None:
        momentum = chunk_momentum = [torch.zeros_like(layer) for layer in start]
    ends = [pack(layers) for layers in (start, chunk_momentum, weights, momentum)]
    return ends, count, missed
