"""Definition of segmented attention: one softmax over explicit masks.

Keys stand in the order persistent, memory, tokens. Everything here follows the text of
``memattn.ops.segmented_attention`` literally; no index is derived twice.
"""

import torch
from torch import Tensor

from memattn.reference._softmax import documents, hide_unseen, masked_softmax, scaled_scores
from memattn_kernels.signatures import SegmentedAttentionArgs


def segmented_attention(args: SegmentedAttentionArgs) -> tuple[Tensor, Tensor]:
    """Return ``out [B, H, T, Dv]`` and ``lse [B, H, T]`` of the explicit definition."""
    query, key, value = args.query, args.key, args.value
    segment_len, window_size = args.segment_len, args.window_size
    B, H, T, _ = query.shape
    Hkv, S = key.shape[1:3]
    start, end, first_segment = documents(
        query, args.cu_seqlens, args.seq_start, args.seq_end, segment_len
    )
    i = torch.arange(T, device=query.device)[:, None] + args.query_offset  # [T, 1]
    j = torch.arange(S, device=query.device)[None, :]  # [1, S]

    # rows of the documents; start and end are [B or 1, T] for rows, taken at the row's position
    start, end = start(i), end(i)  # [B or 1, T, 1]
    inside = (i >= start) & (i < end)
    masks, keys, values = [], [], []
    if args.persistent_key is not None and args.persistent_value is not None:
        P = args.persistent_key.shape[1]
        masks.append(inside.expand(-1, -1, P))
        keys.append(args.persistent_key.expand(B, -1, -1, -1))
        values.append(args.persistent_value.expand(B, -1, -1, -1))
    if args.memory_key is not None and args.memory_value is not None:
        assert segment_len is not None
        N, M = args.memory_key.shape[2:4]
        segment = first_segment(i) + (i - start) // segment_len
        column = torch.arange(N * M, device=query.device)
        allowed = inside & (column // M == segment)
        if args.memory_is_causal:
            allowed = allowed & (column % M <= (i - start) % segment_len)
        masks.append(allowed)
        keys.append(args.memory_key.flatten(2, 3))
        values.append(args.memory_value.flatten(2, 3))

    allowed = inside & (j >= start) & (j < end)
    if args.is_causal:
        allowed = allowed & (j <= i)
    if segment_len is not None or window_size is not None:
        near = torch.zeros_like(allowed)
        if segment_len is not None:
            near = near | ((i - start) // segment_len == (j - start) // segment_len)
        if window_size is not None:
            near = near | ((j > i - window_size) & (j < i + window_size))
        if args.num_sink_tokens is not None:
            first = start.clamp(min=0)
            near = near | ((j >= first) & (j < first + args.num_sink_tokens))
        allowed = allowed & near
    masks.append(allowed)
    keys.append(key)
    values.append(value)
    mask = torch.cat(masks, -1)[:, None]  # [B or 1, 1, T, keys]
    key, value = (
        hide_unseen(torch.cat(tensors, 2).repeat_interleave(H // Hkv, 1), mask)
        for tensors in (keys, values)
    )
    query = query.masked_fill(~mask.any(-1, keepdim=True), 0.0)  # an empty row may hold anything
    scores = scaled_scores(query, key, args.scale)
    if args.softcap is not None:
        scores = torch.tanh(scores / args.softcap) * args.softcap
    weights, lse = masked_softmax(scores, mask)
    return weights @ value, lse
