"""Definition of future attention and its loss: explicit masks, scores and weights.

Everything here follows the text of ``memattn.ops.future_attention`` literally. Keys stand in the
order tokens, future rows; the bands are boolean matrices.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from memattn.reference._softmax import documents, hide_unseen, masked_softmax, scaled_scores
from memattn_kernels.signatures import FutureAttentionArgs


class _Bands(NamedTuple):
    """Which keys and rows a query sees."""

    causal: Tensor  # [B or 1, 1, T, S], keys up to the query
    ahead: Tensor  # [B or 1, 1, T, S], keys of the band after it
    future: Tensor  # [B or 1, 1, T, R], rows of the table that stand for that band
    whole: Tensor  # [B or 1, T], the band is not empty and does not leave the sequence


def future_attention(args: FutureAttentionArgs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``out``, ``out_future`` ``[B, H, T, Dv]``, ``lse [B, H, T]`` and the scalar ``loss``.

    Without ``loss_type`` the last has size 0.
    """
    bands = _bands(args)
    out, out_future, lse = _split_softmax(args, bands)
    loss = lse.new_empty(0) if args.loss_type is None else _loss(args, bands, out_future)
    return out, out_future, lse, loss


def _loss(args: FutureAttentionArgs, bands: _Bands, out_future: Tensor) -> Tensor:
    """Distance of the future part from the contribution of the real keys of the same band."""
    query, key, value = args.query, args.key, args.value
    groups = query.shape[1] // key.shape[1]
    both = bands.causal | bands.ahead
    key, value = (hide_unseen(t.repeat_interleave(groups, 1), both) for t in (key, value))
    query = query.masked_fill(~both.any(-1, keepdim=True), 0.0)
    weights, _ = masked_softmax(scaled_scores(query, key, args.scale), both)
    target = weights.masked_fill(~bands.ahead, 0.0) @ value
    if args.detach_target:
        target = target.detach()
    if out_future.dtype != torch.float64:
        out_future, target = out_future.float(), target.float()
    if args.loss_type == "mse":
        rows = (out_future - target).square().mean(-1)
    else:
        rows = (1.0 - torch.nn.functional.cosine_similarity(out_future, target, dim=-1)) / 2.0
    whole = bands.whole[:, None].expand(rows.shape)
    return rows.masked_fill(~whole, 0.0).sum() / whole.sum().clamp(min=1)


def _split_softmax(args: FutureAttentionArgs, bands: _Bands) -> tuple[Tensor, Tensor, Tensor]:
    """One softmax over the keys and the future rows, its two parts of the output and its lse."""
    query, key, value = args.query, args.key, args.value
    B, H, T, _ = query.shape
    S = key.shape[2]
    future_key, future_value = (
        t.expand(B, -1, -1, -1) for t in (args.future_key, args.future_value)
    )
    future_query = query if args.future_query is None else args.future_query
    mask = torch.cat([bands.causal, bands.future], -1)
    empty = ~mask.any(-1, keepdim=True)
    query, future_query = (q.masked_fill(empty, 0.0) for q in (query, future_query))
    key, value = (
        hide_unseen(t.repeat_interleave(H // t.shape[1], 1), bands.causal) for t in (key, value)
    )
    future_key, future_value = (
        hide_unseen(t.repeat_interleave(H // t.shape[1], 1), bands.future)
        for t in (future_key, future_value)
    )
    pairs = ((query, key), (future_query, future_key))
    scores = torch.cat([scaled_scores(q, k, args.scale) for q, k in pairs], -1)
    weights, lse = masked_softmax(scores, mask)
    out_future = weights[..., S:] @ future_value
    return weights[..., :S] @ value + out_future, out_future, lse


def _bands(args: FutureAttentionArgs) -> _Bands:
    """The bands of every query."""
    query, table_len = args.query, args.table_len
    T, S, R = query.shape[2], args.key.shape[2], args.future_key.shape[-2]
    start, end, number = documents(query, args.cu_seqlens, args.seq_start, args.seq_end)
    i = torch.arange(T, device=query.device)[:, None] + args.query_offset  # [T, 1]
    j = torch.arange(S, device=query.device)[None, :]  # [1, S]
    row = torch.arange(R, device=query.device)[None, :]  # [1, R]
    start, end, number = start(i), end(i), number(i)
    inside = (i >= start) & (i < end)
    position = i - start  # [B or 1, T, 1]
    last = position + args.future_dim  # the last position of the band
    if args.by_distance:
        future = row % table_len < args.future_dim
    else:
        last = last.clamp(max=table_len)
        future = (row % table_len + 1 > position) & (row % table_len + 1 <= last)
    if table_len < R:
        future = future & (row // table_len == number)
    own = inside & (j >= start) & (j < end)
    causal = own & (j <= i)
    ahead = own & (j > i) & (j - start <= last)
    whole = inside & (last > position) & (last < end.clamp(max=S) - start)
    return _Bands(causal[:, None], ahead[:, None], (inside & future)[:, None], whole[..., 0])
