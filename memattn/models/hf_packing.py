"""Packed documents under ``memattn_segmented``, in the forms of transformers' models."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import ContinuousMixin

from memattn.checks import must
from memattn.parts.packing import (
    columns_that_change,
    document_bounds,
    document_marks,
    find_keywords,
    refuse_continuous_batching,
)

_agreed = WeakTensorKeyDictionary()  # given bounds, and the bounds they were found to agree with


def documents_of_call(
    seen: Tensor | None, keywords: Mapping[str, Any], query: Tensor, key: Tensor
) -> Tensor | None:
    """Bounds ``cu_seqlens`` of the documents of an attention call; None for one per row.

    Values are read once for all layers, and never while a graph is traced.

    Args:
        seen: Result of the mask function: int32 ``[n+1]`` for packed documents, other bounds or a
            bool table for rows with padding, or None.
        keywords: Keyword arguments of the attention function.
        query: ``[B, H, T, D]``.
        key: ``[B, Hkv, S, D]``.

    Raises:
        ValueError: If the descriptions of documents differ, or there is padding or a cache.
    """
    if keywords.get("cache") is not None:
        must("cache", "be None (generate takes a padded batch)", type(keywords["cache"]).__name__)
    packing = find_keywords(keywords)
    packed = None if seen is None or seen.dim() != 1 else seen
    if not packing:
        return packed
    (B, T), name = (query.shape[0], query.shape[2]), next(iter(packing))
    if seen is not None and packed is None:
        must("attention_mask", f"be None with {name}", "one with padding")
    if key.shape[2] != T:
        must("past_key_values", f"be None with {name}", f"keys of {key.shape[2] - T} tokens before")
    bounds = document_bounds(packing, (B, T))
    if not torch.compiler.is_compiling():
        for given in (bounds, packing.get("seq_idx")):
            if given is not None:
                _check_agreement(given, packed if bounds is None else bounds, packed, (B, T))
    return packed if bounds is None else bounds.to(torch.int32)


def _check_agreement(
    given: Tensor, bounds: Tensor | None, packed: Tensor | None, shape: tuple[int, int]
) -> None:
    """Raise unless the given bounds agree with ``bounds``, and these with the positions."""
    before = _agreed.get(given)
    if before is not None and before[0] is bounds and before[1] is packed:
        return
    B, T = shape
    begins = torch.arange(B * T, device=given.device).view(B, T) % max(T, 1) == 0
    marked = [
        begins if b is None else document_marks(b, B * T)[:-1].view(B, T) for b in (bounds, packed)
    ]
    if given.dim() == 2:  # seq_idx
        if given.shape != begins.shape:
            must("seq_idx", f"have shape [B={B}, T={T}]", list(given.shape))
        if not torch.equal(columns_that_change(given), marked[0]):
            allowed = "change where position_ids or cu_seq_lens_q begin documents"
            must("seq_idx", allowed, "others")
    elif packed is not None and not torch.equal(*marked):
        must("cu_seq_lens_q", "begin documents where position_ids do", given.tolist())
    _agreed[given] = (bounds, packed)


def guard_continuous_batching(name: str) -> None:
    """Refuse ``generate_batch`` for this implementation; it would use flash attention."""
    method = "init_continuous_batching"
    begin: Callable[..., Any] = getattr(ContinuousMixin, method)
    if hasattr(begin, "_memattn_guards"):
        return

    @wraps(begin)
    def guarded(model: Any, *args: Any, **kwargs: Any) -> Any:
        config = model.config.get_text_config(decoder=True)
        if config._attn_implementation == name:
            refuse_continuous_batching(model)
        return begin(model, *args, **kwargs)

    guarded._memattn_guards = begin  # pyright: ignore[reportAttributeAccessIssue]
    setattr(ContinuousMixin, method, guarded)
