"""Definition of attention in branches: every slot scored against all branches, others hidden."""

import torch
from einops import rearrange
from torch import Tensor

from memattn.reference._softmax import documents, masked_softmax, scaled_scores
from memattn_kernels.signatures import BranchAttentionArgs


def branch_attention(args: BranchAttentionArgs) -> tuple[Tensor, Tensor]:
    """Return ``out [B, A, H, T, Dv]`` and ``lse [B, A, H, T]``."""
    query, key, value = args.query, args.key, args.value
    B, A, H, T, _ = query.shape
    F, Hkv, S = key.shape[1:4]
    gates = rearrange(args.gates, "b t a -> b a t")
    chosen = (gates != 0)[..., None]  # [B, A, T, F]; NaN is a gate that is open
    if args.indices is None:
        # slot a is branch a: the same as a batch of B * A sequences with one branch each
        query, key, value, chosen = (x.flatten(0, 1)[:, None] for x in (query, key, value, chosen))
        A, F = 1, 1
    else:
        branch = rearrange(args.indices, "b t a -> b a t 1")
        chosen = chosen & (branch == torch.arange(F, device=branch.device))
    visible = _visible(args, S).expand(B, T, S)
    visible = visible.repeat_interleave(query.shape[0] // B if B else 1, 0)
    mask = chosen[..., None] & visible[:, None, :, None]  # [B, A, T, F, S]

    # what no slot sees may hold anything, and so may the query of a slot that sees nothing
    seen = mask.any(2).any(1)[:, :, None, :, None]
    key, value = (
        rearrange(torch.where(seen, x, 0.0), "b f h s d -> b h (f s) d") for x in (key, value)
    )
    active = mask.any(-1).any(-1)  # [B, A, T]
    query = torch.where(active[:, :, None, :, None], query, 0.0)
    query = query.unflatten(2, (Hkv, H // Hkv)).transpose(1, 2)  # [B, Hkv, A, G, T, D]
    scores = scaled_scores(query.flatten(2, 4), key, args.scale)
    scores = scores.unflatten(2, (A, H // Hkv, T))
    weights, lse = masked_softmax(scores, rearrange(mask, "b a t f s -> b 1 a 1 t (f s)"))
    ungated = (weights.flatten(2, 4) @ value).unflatten(2, (A, H // Hkv, T))

    ungated, lse = (x.transpose(1, 2).flatten(2, 3) for x in (ungated, lse))  # [B, A, H, T, ...]
    ungated, lse = (x.reshape(B, args.query.shape[1], *x.shape[2:]) for x in (ungated, lse))
    gates = torch.where(active.reshape(gates.shape), gates, 0.0)  # others get no gradient
    return (ungated * gates[:, :, None, :, None]).to(query.dtype), lse


def _visible(args: BranchAttentionArgs, S: int) -> Tensor:
    """Which keys of its branch the slots of each query see, bool ``[B or 1, T, S]``."""
    device = args.query.device
    i = torch.arange(args.query.shape[3], device=device)[:, None] + args.query_offset  # [T, 1]
    j = torch.arange(S, device=device)
    start, end, _ = documents(args.query, args.cu_seqlens, args.seq_start, args.seq_end)
    start, end = start(i), end(i)  # [B or 1, T or 1, 1]
    visible = (i >= start) & (i < end) & (j >= start) & (j < end)
    return visible & (j <= i) if args.is_causal else visible
