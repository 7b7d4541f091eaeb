"""Keys of tokens and of memory outputs, arranged for attention within segments."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn.checks import plain_values
from memattn.parts.context import PartContext


class ContextKeys(NamedTuple):
    """Keys and values of tokens and of memory outputs, ``[B, Hkv, S, D]`` each."""

    key: Tensor
    value: Tensor
    memory_key: Tensor
    memory_value: Tensor


def behind(
    front: ContextKeys | None, keys: ContextKeys, start: Tensor | None = None
) -> ContextKeys:
    """Keys with the ``M`` keys ``front`` before the first one, or before the segment at ``start
    [B]``.

    All columns move by ``M``; columns before the segment are overwritten.
    """
    if front is None:
        return keys
    if start is None:
        return ContextKeys(*(torch.cat(pair, 2) for pair in zip(front, keys, strict=True)))
    M = front.key.shape[2]
    place = torch.arange(M + keys.key.shape[2], device=start.device) - start.long()[:, None]
    inside, place = ((place >= 0) & (place < M))[:, None, :, None], place.clamp(0, M - 1)

    def put(x: Tensor, y: Tensor) -> Tensor:
        at = place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return torch.where(inside, x.gather(2, at), F.pad(y, (0, 0, M, 0)))

    return ContextKeys(*(put(x, y) for x, y in zip(front, keys, strict=True)))


def by_segments(keys: ContextKeys, L: int, index: Tensor | None = None) -> ContextKeys:
    """The memory's keys ``[B, Hkv, S, D]`` as ``[B, Hkv, n_segments, L, D]``.

    ``index`` int64 ``[B, n_segments * L]`` gives their columns; None: from the first column on.
    """

    def cut(x: Tensor) -> Tensor:
        if index is None:
            x = F.pad(x, (0, 0, 0, -x.shape[2] % L))
        else:
            x = x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        return torch.unflatten(x, 2, (x.shape[2] // L, L))

    return keys._replace(memory_key=cut(keys.memory_key), memory_value=cut(keys.memory_value))


def columns_from(start: Tensor, n: int, S: int) -> Tensor:
    """The ``n`` columns from ``start [B]`` on, int64 ``[B, n]``, clamped to existing columns."""
    columns = start.long()[:, None] + torch.arange(n, device=start.device)
    return columns.clamp(0, max(S - 1, 0))


def segment_columns(
    context: PartContext, B: int, S: int, L: int
) -> tuple[Tensor | None, Tensor | None]:
    """Where ``B`` sequences start in ``S`` columns, and the columns of their segments."""
    if context.cu_seqlens is not None:
        device = context.cu_seqlens.device
        bounds: list[int] = plain_values(context.cu_seqlens)
        columns = [
            torch.arange(a, a + (b - a + L - 1) // L * L, device=device)
            for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        return None, torch.cat(columns).clamp(max=max(S - 1, 0))[None]
    start = context.bounds.seq_start
    if start is None:
        if not torch.compiler.is_exporting():
            return None, None
        # with columns as an index, one compiled program serves any number of segments
        start = context.positions.new_zeros(B, dtype=torch.int32)
    # whole segments before the first column are not seen
    start = torch.where(start < 0, -(-start % L), start)
    # at least two segments in an exported program: one would need another program
    more = (L - 1) * (context.state is not None) + L * torch.compiler.is_exporting()
    return start, columns_from(start, (S + more + L - 1) // L * L, S)
