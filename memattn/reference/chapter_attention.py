"""Definition of attention to selected chapters: every chapter scored, what is not selected hidden.

A chapter that stands in several slots of a row counts as often, or with the sum of its weights; so
a row is described by a number and a weight for each chapter, and the order of slots is without
effect.
"""

import torch
from einops import rearrange
from torch import Tensor

from memattn.reference._softmax import scaled_scores
from memattn.reference.chapter_quantization import dequantize_rows
from memattn_kernels.signatures import ChapterAttentionArgs


def chapter_attention(args: ChapterAttentionArgs) -> tuple[Tensor, Tensor]:
    """Return ``out [B, H, T, Dv]`` and ``lse [B, H, T]``."""
    query, key, value = args.query, args.key, args.value
    if args.key_scale is not None and args.value_scale is not None:
        key = dequantize_rows(key, args.key_scale, query.dtype)
        value = dequantize_rows(value, args.value_scale, query.dtype)
    C, Hkv, M, _ = key.shape
    G = query.shape[1] // Hkv
    number, weight = (by_token(args, counted) for counted in count_chapters(args))  # [B, T, C]
    selected = number > 0

    # NaN in a chapter that no query of a sequence selected must not reach its gradients either
    seen = selected.any(1)[:, :, None, None, None]  # [B, C, 1, 1, 1]
    key, value = (
        rearrange(torch.where(seen, x, 0.0), "b c h m d -> b h 1 (c m) d") for x in (key, value)
    )
    query = torch.where(selected.any(-1)[:, None, :, None], query, 0.0)  # may hold anything
    query = rearrange(query, "b (h g) t d -> b h g t d", g=G)
    scores = scaled_scores(query, key, args.scale)  # [B, Hkv, G, T, C * M]

    over_keys = lambda x: x.repeat_interleave(M, -1)[:, None, None]  # [B, 1, 1, T, C * M]
    allowed = over_keys(selected).expand(scores.shape)
    empty = ~allowed.any(-1, keepdim=True)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    times = weight if args.is_joint else number
    # the inner where keeps the logarithm's gradient finite where nothing is selected
    bias = torch.where(selected, torch.where(selected, times, 1.0).log(), 0.0)
    counted = (wide + over_keys(bias)).masked_fill(~allowed & ~empty, -torch.inf)
    counted = counted.masked_fill(empty, 0.0)
    lse = counted.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)
    if args.is_joint:
        shares = counted.softmax(-1).masked_fill(empty, 0.0)
    else:
        within = wide.unflatten(-1, (C, M)).softmax(-1).flatten(-2)
        shares = torch.where(allowed, within * over_keys(weight), 0.0)
    out = shares.to(value.dtype) @ value
    return rearrange(out, "b h g t d -> b (h g) t d"), rearrange(lse, "b h g t -> b (h g) t")


def count_chapters(args: ChapterAttentionArgs) -> tuple[Tensor, Tensor]:
    """How often each routing row selects each chapter, and with what weight: ``[B, N, C]``."""
    wide = torch.float64 if args.query.dtype == torch.float64 else torch.float32
    filled = args.indices >= 0
    if args.weights is not None and args.is_joint:
        filled = filled & ~(args.weights <= 0)  # NaN is no empty slot
    number = filled.to(wide)
    weight = number
    if args.weights is not None:
        weight = torch.where(filled, args.weights.to(wide), 0.0)
    slots = args.indices.long().clamp(min=0)
    none = number.new_zeros(*args.indices.shape[:2], args.key.shape[0])
    return none.scatter_add(2, slots, number), none.scatter_add(2, slots, weight)


def by_token(args: ChapterAttentionArgs, counted: Tensor) -> Tensor:
    """``[B, T, C]`` of the routing rows of tokens, from that of rows; 0 for tokens without one."""
    T = args.query.shape[2]
    tokens = torch.arange(T, device=counted.device).expand(len(counted), T)
    # rows rise, so the row of a token is the first that has not ended
    ends = args.row_end.long()
    ended = ends.new_zeros(len(ends), T + 1).scatter_add(1, ends, torch.ones_like(ends))
    row = ended.cumsum(1)[:, :T]
    inside = row < counted.shape[1]
    row = row.clamp(max=max(counted.shape[1] - 1, 0))
    inside = inside & (args.row_start.gather(1, row) <= tokens)
    row = row[..., None].expand(-1, -1, counted.shape[-1])
    return torch.where(inside[..., None], counted.gather(1, row), 0.0)
