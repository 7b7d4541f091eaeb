"""Definition of task-masked attention: one softmax over an explicit mask."""

import torch
from torch import Tensor

from memattn.reference._softmax import hide_unseen, masked_softmax, scaled_scores
from memattn_kernels.signatures import TaskMaskedAttentionArgs


def task_masked_attention(args: TaskMaskedAttentionArgs, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``out [B, H, T, Dv]`` and ``lse [B, H, T]``.

    ``mask`` is bool ``[B, H or 1, T, S]``, the mask of each sequence's task, whose positions count
    from ``seq_start``.
    """
    query, key, value = args.query, args.key, args.value
    seq_start, seq_end = args.seq_start, args.seq_end
    B, H, T, _ = query.shape
    S = key.shape[2]
    device = query.device
    zero = torch.zeros(B, dtype=torch.long, device=device)
    start = zero if seq_start is None else seq_start.long()
    end = zero + max(T, S) if seq_end is None else seq_end.long()
    i, j = (torch.arange(n, device=device) - start[:, None] for n in (T, S))  # [B, T], [B, S]
    inside_i, inside_j = ((x >= 0) & (x < (end - start)[:, None]) for x in (i, j))
    # places outside the sequence are masked below, so any row of the mask will do for them
    i_at, j_at = (x.clamp(0, n - 1) for x, n in ((i, T), (j, S)))
    allowed = mask.gather(2, i_at[:, None, :, None].expand(-1, mask.shape[1], -1, S))
    allowed = allowed.gather(3, j_at[:, None, None].expand(-1, mask.shape[1], T, -1))
    allowed = allowed & inside_i[:, None, :, None] & inside_j[:, None, None]
    if args.is_causal:
        allowed = allowed & (j[:, None, None] <= i[:, None, :, None])
    allowed = allowed.expand(B, H, T, S)
    key, value = (
        hide_unseen(t.repeat_interleave(H // max(t.shape[1], 1), 1), allowed) for t in (key, value)
    )
    query = query.masked_fill(~allowed.any(-1, keepdim=True), 0.0)  # an empty row may hold anything
    weights, lse = masked_softmax(scaled_scores(query, key, args.scale), allowed)
    return weights @ value, lse
