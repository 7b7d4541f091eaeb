"""Helpers of the definitions: a masked softmax, and where sequences begin and end."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

Bound = Callable[[Tensor], Tensor]


def scaled_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """``query key^T * scale`` in the dtype of the query.

    In half precision the product may overflow where the score does not, so it is formed in float32.
    """
    if query.dtype not in (torch.float16, torch.bfloat16):
        return (query @ key.mT) * scale
    device = query.device.type
    can_autocast = torch.amp.is_autocast_available(device)
    # autocast would form the product in half precision all the same
    with torch.autocast(device, enabled=False) if can_autocast else nullcontext():
        return ((query.float() @ key.float().mT) * scale).to(query.dtype)


def masked_softmax(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of ``scores [B, H, T, S]`` under a boolean mask that broadcasts, and their lse.

    A row without a key gives weights 0, ``lse = -inf`` and no gradient.
    """
    mask = mask.expand(scores.shape)
    empty = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask & ~empty, -torch.inf).masked_fill(empty, 0.0)
    weights = scores.softmax(-1).masked_fill(empty, 0.0)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return weights, wide.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)


def hide_unseen(rows: Tensor, mask: Tensor) -> Tensor:
    """Keys or values ``[B, H, S, D]`` with 0 where no query sees them: they may hold NaN."""
    return rows.masked_fill(~mask.any(-2)[..., None], 0.0)


def documents(
    query: Tensor,
    cu_seqlens: Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    segment_len: int | None = None,
) -> tuple[Bound, Bound, Bound]:
    """Functions from positions ``[T, 1]`` to the start, end and first segment of their document.

    Without ``segment_len`` the last one gives the document's number. They return
    ``[B or 1, T or 1, 1]``.
    """
    if cu_seqlens is not None:
        cu = cu_seqlens.long()
        lengths = cu[1:] - cu[:-1]
        segments = (lengths + segment_len - 1) // segment_len if segment_len else lengths * 0 + 1
        first = torch.cat([segments.new_zeros(1), segments.cumsum(0)])

        def document(i: Tensor) -> Tensor:
            return torch.searchsorted(cu[1:], i, right=True).clamp(max=cu.numel() - 2)

        return (
            lambda i: cu[document(i)][None],
            lambda i: cu[document(i) + 1][None],
            lambda i: first[document(i)][None],
        )
    zero = torch.zeros(1, 1, 1, dtype=torch.long, device=query.device)
    start = zero if seq_start is None else seq_start.long()[:, None, None]
    end = zero + torch.iinfo(torch.int32).max if seq_end is None else seq_end.long()[:, None, None]
    return (lambda i: start), (lambda i: end), (lambda i: zero)
