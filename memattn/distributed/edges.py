"""Keys and values of the edge from the processes before, and their gradients back."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from memattn.distributed.shards import Edges, Piece


def extend_by_edge(
    key: Tensor, value: Tensor, edges: Edges, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Put the edge before the keys and values of this process.

    Communication is point to point: each process sends only the tokens that later processes need.
    All processes of the group call it, and all run the backward pass, in the same order.

    Args:
        key: ``[B, Hkv, T, D]``, this process's.
        value: ``[B, Hkv, T, Dv]``.
        edges: Which tokens each process needs from the others.
        group: The processes, in the order of their tokens.

    Returns:
        Keys and values ``[B, Hkv, edge + T, D or Dv]``. Differentiable once.
    """
    if not any(edges.edge_len(rank) for rank in range(edges.shards.num_shards)):
        return key, value
    tokens = torch.cat((key, value), -1)  # one message for both
    edge = _Edge.apply(tokens, edges, group)
    edge_key, edge_value = edge.split((key.shape[-1], value.shape[-1]), -1)
    return torch.cat((edge_key, key), 2), torch.cat((edge_value, value), 2)


class _Edge(torch.autograd.Function):
    """``[B, Hkv, T, D + Dv]`` of each process to the edge ``[B, Hkv, E, D + Dv]`` of each."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, edges: Edges, group: dist.ProcessGroup) -> Tensor:
        rank = dist.get_rank(group)
        ctx.edges, ctx.group, ctx.rank, ctx.shape = edges, group, rank, tokens.shape
        start, _ = edges.shards.bounds(rank)
        sent = [(p, _part(tokens, p, start)) for p in edges.sent(rank)]
        received = [(p, _empty(tokens, p)) for p in edges.received(rank)]
        _exchange([(p.target, t) for p, t in sent], [(p.source, t) for p, t in received], group)
        return torch.cat([tokens[:, :, :0], *(t for _, t in received)], 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_edge: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        edges, rank = ctx.edges, ctx.rank
        first, (start, _) = edges.first_key(rank), edges.shards.bounds(rank)
        sent = [(p, _part(d_edge, p, first)) for p in edges.received(rank)]
        received = [(p, _empty(d_edge, p)) for p in edges.sent(rank)]
        _exchange([(p.source, t) for p, t in sent], [(p.target, t) for p, t in received], ctx.group)
        d_tokens = d_edge.new_zeros(ctx.shape)
        for piece, gradient in received:  # in the order of ranks: sums repeat bit for bit
            d_tokens[:, :, piece.start - start : piece.end - start] += gradient
        return d_tokens, None, None


def _part(tensor: Tensor, piece: Piece, start: int) -> Tensor:
    """A piece of a tensor whose first token is ``start``."""
    return tensor[:, :, piece.start - start : piece.end - start].contiguous()


def _empty(tensor: Tensor, piece: Piece) -> Tensor:
    B, Hkv, _, features = tensor.shape
    return tensor.new_empty(B, Hkv, piece.end - piece.start, features)


def _exchange(
    sent: list[tuple[int, Tensor]], received: list[tuple[int, Tensor]], group: dist.ProcessGroup
) -> None:
    """Send and receive everything at once, and wait for it."""
    operations = [
        *(dist.P2POp(dist.isend, t, group=group, group_peer=peer) for peer, t in sent),
        *(dist.P2POp(dist.irecv, t, group=group, group_peer=peer) for peer, t in received),
    ]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
