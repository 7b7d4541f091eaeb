"""Definition of segmented attention: one softmax over explicit masks.

Keys stand in the order persistent, memory, tokens. Everything here follows the text of
``memattn.ops.segmented_attention`` literally; no index is derived twice.
"""

import torch
from torch import Tensor


def segmented_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    persistent_key: Tensor | None,
    persistent_value: Tensor | None,
    memory_key: Tensor | None,
    memory_value: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    segment_len: int | None,
    window_size: int | None,
    is_causal: bool,
    memory_is_causal: bool,
    query_offset: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return ``out [B, H, T, Dv]`` and ``lse [B, H, T]`` of the explicit definition."""
    B, H, T, _ = query.shape
    Hkv, S = key.shape[1:3]
    start, end, first_segment = _documents(query, S, cu_seqlens, seq_start, seq_end, segment_len)
    i = torch.arange(T, device=query.device)[:, None] + query_offset  # [T, 1]
    j = torch.arange(S, device=query.device)[None, :]  # [1, S]

    # rows of the documents; start and end are [B or 1, T] for rows, taken at the row's position
    start, end = start(i), end(i)  # [B or 1, T, 1]
    inside = (i >= start) & (i < end)
    masks, keys, values = [], [], []
    if persistent_key is not None and persistent_value is not None:
        P = persistent_key.shape[1]
        masks.append(inside.expand(-1, -1, P))
        keys.append(persistent_key.expand(B, -1, -1, -1))
        values.append(persistent_value.expand(B, -1, -1, -1))
    if memory_key is not None and memory_value is not None:
        assert segment_len is not None
        N, M = memory_key.shape[2:4]
        segment = first_segment(i) + (i - start) // segment_len
        column = torch.arange(N * M, device=query.device)
        allowed = inside & (column // M == segment)
        if memory_is_causal:
            allowed = allowed & (column % M <= (i - start) % segment_len)
        masks.append(allowed)
        keys.append(memory_key.flatten(2, 3))
        values.append(memory_value.flatten(2, 3))

    allowed = inside & (j >= start) & (j < end)
    if is_causal:
        allowed = allowed & (j <= i)
    if segment_len is not None or window_size is not None:
        near = torch.zeros_like(allowed)
        if segment_len is not None:
            near = near | ((i - start) // segment_len == (j - start) // segment_len)
        if window_size is not None:
            near = near | ((j > i - window_size) & (j < i + window_size))
        allowed = allowed & near
    masks.append(allowed)
    keys.append(key)
    values.append(value)
    return masked_attention(
        query, torch.cat(keys, 2), torch.cat(values, 2), torch.cat(masks, -1)[:, None], scale
    )


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Grouped-query attention under a boolean mask ``[B or 1, H or 1, T, S]``, with its lse.

    A row without a key gives ``out = 0``, ``lse = -inf`` and no gradient. Such a row, and a key
    that no row sees, may hold NaN.
    """
    H, Hkv = query.shape[1], key.shape[1]
    B = query.shape[0]
    seen = mask.any(-2, keepdim=True).transpose(-1, -2)  # [B or 1, H or 1, S, 1]
    key = key.repeat_interleave(H // Hkv, 1).masked_fill(~seen, 0.0)
    value = value.repeat_interleave(H // Hkv, 1).masked_fill(~seen, 0.0)
    mask = mask.expand(B, H, -1, -1)
    empty = ~mask.any(-1, keepdim=True)
    query = query.masked_fill(empty, 0.0)
    scores = (query @ key.mT) * scale
    scores = scores.masked_fill(~mask & ~empty, -torch.inf).masked_fill(empty, 0.0)
    weights = scores.softmax(-1).masked_fill(empty, 0.0)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    lse = wide.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)
    return weights @ value, lse


def _documents(query, S, cu_seqlens, seq_start, seq_end, segment_len):
    """Functions from positions [T, 1] to the start, end and first segment of their document."""
    if cu_seqlens is not None:
        cu = cu_seqlens.long()
        lengths = cu[1:] - cu[:-1]
        segments = (lengths + segment_len - 1) // segment_len if segment_len else lengths
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
