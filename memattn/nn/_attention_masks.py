"""Convert masks of PyTorch's attention to intervals of keys, or else to a bias of the scores."""

from typing import NamedTuple

import torch
from torch import Tensor

from memattn.checks import is_readable


class AttentionMasks(NamedTuple):
    """Attention masks as intervals of keys or as a bias."""

    is_causal: bool
    seq_start: Tensor | None  # int32 [B]
    seq_end: Tensor | None  # int32 [B]
    bias: Tensor | None  # [B or 1, H or 1, T or 1, S], bias of the scores, if there is no interval


def hidden_keys(mask: Tensor, B: int) -> Tensor:
    """Keys that a padding mask hides, bool ``[B, S]``; a float mask hides them by -inf."""
    mask = mask.expand(B, mask.shape[-1])
    return mask if mask.dtype == torch.bool else mask.isneginf()


def take_apart(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    is_self: bool,
) -> AttentionMasks:
    """Intervals of keys if the masks are intervals, else a bias of the scores.

    Args:
        query: ``[B, T, E]``.
        key: ``[B, S, E]``.
        key_padding_mask: ``[B, S]`` or ``[S]``, True where a key is hidden, or added to scores.
        attn_mask: ``[T, S]`` or ``[B * H, T, S]``, the same for each query.
        is_causal: Whether ``attn_mask`` is known to be causal.
        is_self: Whether padding hides queries too, as in self-attention.
    """
    B, S = key.shape[:2]
    free = attn_mask is None or is_causal
    if free and key_padding_mask is None:
        return AttentionMasks(is_causal, None, None, None)
    if free and is_self and key_padding_mask is not None and is_readable(key_padding_mask):
        padding = hidden_keys(key_padding_mask, B)
        place = torch.arange(S, device=key.device)
        start = torch.where(padding, S, place).amin(1)
        end = torch.where(padding, 0, place + 1).amax(1)
        start = start.minimum(end)
        other = ((~padding).sum(1) != end - start).any()  # a gap between keys
        if key_padding_mask.dtype != torch.bool:
            other = other | (~padding & (key_padding_mask != 0)).any()
        if not bool(other):
            return AttentionMasks(is_causal, start.int(), end.int(), None)
    bias = query.new_zeros(1, 1, 1, 1)
    if attn_mask is not None:
        mask = attn_mask if attn_mask.dim() == 3 else attn_mask[None]
        heads = mask.shape[0] // B if mask.shape[0] > 1 else 1
        by_head = torch.unflatten(mask, 0, (-1, heads))
        bias = bias + _as_bias(by_head, query)
    if key_padding_mask is not None:
        mask = key_padding_mask.expand(B, S)
        bias = bias + _as_bias(mask, query)[:, None, None]
    return AttentionMasks(False, None, None, bias)


def _as_bias(mask: Tensor, like: Tensor) -> Tensor:
    """The bias of a mask: -inf where a boolean mask is True."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
