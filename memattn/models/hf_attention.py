"""Segmented attention inside pretrained Hugging Face decoders.

``import memattn.models`` registers the implementation ``"memattn_segmented"``; then

    model.set_attn_implementation("memattn_segmented")

replaces the attention of Llama, Qwen2, Qwen3 and other decoders built on transformers'
``AttentionInterface``, without changing their weights. Three more fields of their configuration are
read at every call:

- ``memattn_segment_len``: tokens in a segment, or None;
- ``memattn_window_size``: keys in the sliding window, the query's own included, or None;
- ``memattn_num_sink_tokens``: first tokens of each sequence that all its tokens see, or None.

A query sees its own segment, the window and the first tokens; without segment and window, all
earlier tokens. A layer with its own ``sliding_window`` or chunks keeps them; the fields apply to
the other layers. Learned sink logits (gpt-oss) and soft caps of scores (Gemma 2) are supported.

A configuration with one of the fields selects this implementation: it is saved with
``attn_implementation``, so that a model loads as it was saved, and a process without memattn
refuses to load it instead of attending to all tokens. An implementation given at loading takes
precedence. In a multimodal model the fields apply to its text model, wherever they are set. Models
that do not use transformers' attention interface are refused.

The kernel gets padding as bounds of each row's sequence, and packed documents as ``cu_seqlens``:
there is never a mask of T x S elements. If padding is inside rows, tokens are moved together for
the kernel, so that windows and segments count tokens. A layer with its own ``sliding_window``
counts columns, as in transformers; once it drops keys, one more feature hides those of padding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from memattn.checks import check_int
from memattn.models.hf_choice import FIELDS, NAME, register_choice
from memattn.models.hf_packing import documents_of_call, guard_continuous_batching
from memattn.ops import segmented_attention
from memattn.ops._dispatch import resolve_backend
from memattn.parts.padding import check_mask, read_mask
from memattn.parts.token_order import TokenOrder, take_columns

# arguments by which models change scores or select keys by their values
LACKED = ("position_bias", "head_mask", "block_indices", "indices", "sinks")


def register_hf_attention() -> None:
    """Register ``"memattn_segmented"`` with transformers; importing ``memattn.models`` does it."""
    AttentionInterface.register(NAME, hf_segmented_attention)
    AttentionMaskInterface.register(NAME, hf_sequence_bounds)
    register_choice()
    guard_continuous_batching(NAME)


def hf_sequence_bounds(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    local_size: int | None = None,
    config: PreTrainedConfig | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask function that transformers calls once for each kind of layer.

    Returns:
        The ``attention_mask`` for the attention function: int32 ``[2, B]``, the start and end of
        each row's sequence in columns of the keys; bool ``[B, S]``, which keys are tokens, if
        padding is inside rows, or int8 for layers with their own window that drop keys; int32
        ``[n+1]``, the bounds of packed documents; or None if all columns are tokens of one
        sequence.

    Raises:
        ValueError: If a value of the mask is neither 0 nor 1, or its length does not fit.
        NotImplementedError: For custom, blockwise and bidirectional masks, for static caches, and
            for holes in layers whose chunks drop keys.
    """
    chunk, kinds = (getattr(config, n, None) for n in ("attention_chunk_size", "layer_types"))
    if chunk is not None and "chunked_attention" not in (kinds or ()):
        _lacks("config.attention_chunk_size", "be None", "set memattn_segment_len instead")
    if not getattr(config, "is_causal", True):
        _lacks("config.is_causal", "be True")
    shares_keys = bool(getattr(config, "num_kv_shared_layers", None))
    if use_vmap:
        _lacks("mask_function", "be causal, without functions joined to it")
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length:
        _lacks("past_key_values", "be a dynamic cache, whose last key is that of the last query")
    if attention_mask is not None:
        check_mask(attention_mask, batch_size, (kv_offset + kv_length,))
        start, end, order = read_mask(attention_mask, order_traced=False)
        if order is not None:
            if shares_keys:
                _lacks(
                    "attention_mask", "have one block of ones in each row where layers share keys"
                )
            if kv_offset or (local_size is not None and local_size < kv_length):
                if chunk is not None:
                    _lacks("attention_mask", "have one block of ones in each row beside chunks")
                return order.present[:, kv_offset:].to(torch.int8)
            return order.present
        if torch.compiler.is_compiling() or start.any() or (end != attention_mask.shape[1]).any():
            return _bounds(start - kv_offset, end - kv_offset, shares_keys)
    elif not allow_is_causal_skip and mask_function is not None:
        documents = _packed_bounds(mask_function, batch_size, q_length, device)
        if documents is not None and documents.dim() == 1 and shares_keys:
            _lacks("position_ids", "count one sequence in each row where layers share keys")
        return documents
    if kv_offset:
        # a trimmed cache: segments count from before the first key
        start = torch.full((batch_size,), -kv_offset, device=device)
        return _bounds(start, start + kv_offset + kv_length, shares_keys)
    return None


def hf_segmented_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer.

    Args:
        module: The attention layer; its ``config`` has the fields described above.
        query: ``[B, H, T, D]``, rotated.
        key: ``[B, Hkv, S, D]``, cached keys included.
        value: ``[B, Hkv, S, Dv]``.
        attention_mask: The result of ``hf_sequence_bounds``.
        scaling: Factor of the scores; None means ``1/sqrt(D)``.
        dropout: Must be 0.
        sliding_window: The layer's own window.
        is_causal: Must not be False.
        softcap: Cap of the layer's scores, None for none.

    Returns:
        ``[B, T, H, Dv]``, and None for the attention weights.

    Raises:
        NotImplementedError: For dropout, other masks and bidirectional attention.
        ValueError: If ``softcap`` is not positive and finite.
    """
    if dropout:
        _lacks("attention_dropout", "be 0 in training", f"got {dropout}")
    for name in LACKED:
        if kwargs.get(name) is not None:
            _lacks(name, "be None")
    if is_causal is False or not getattr(module, "is_causal", True):
        _lacks("is_causal", "be True")
    seq_start = seq_end = rows = hidden = None
    if attention_mask is not None and attention_mask.shape[2:] == (1, 1):
        attention_mask = attention_mask[..., 0, 0]  # the form for models whose layers share keys
    cu_seqlens = documents_of_call(attention_mask, kwargs, query, key)
    if (
        attention_mask is not None
        and attention_mask.dtype == torch.bool
        and attention_mask.dim() == 2
    ):
        rows = _tokens(attention_mask, query.shape[2])
        query, key, value = map(take_columns, (query, key, value), rows.columns())
        seq_start = rows.seq_start
    elif attention_mask is not None and attention_mask.dtype == torch.int8:
        if softcap is not None or sliding_window is None:
            what = (
                "without a window but with keys dropped" if softcap is None else "of capped scores"
            )
            _lacks("attention_mask", f"have one block of ones in each row for a layer {what}")
        if query.shape[-1] > 255 and resolve_backend("auto", query) == "triton":
            what = "beside a window, at a head dimension of 256 on a GPU"  # the kernels' most
            _lacks("attention_mask", f"have one block of ones in each row {what}")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        there = attention_mask[:, -key.shape[2] :] != 0
        query, key = _hide(query, key, there)
        hidden = ~there[:, -query.shape[2] :, None, None]
    elif attention_mask is not None:
        if attention_mask.dim() == 3:
            _lacks("mask_function", "be causal, without blocks that see ahead")
        if attention_mask.dtype != torch.int32 or attention_mask.dim() > 2:
            got = f"got {attention_mask.dtype} {list(attention_mask.shape)}"
            _lacks("attention_mask", "be a padding mask [B, S]", got)
        if attention_mask.dim() == 2:
            seq_start, seq_end = _split_bounds(attention_mask)
    B = query.shape[0]
    if cu_seqlens is not None and B > 1:
        query, key, value = map(_one_row, (query, key, value))
    spans = _spans(module, sliding_window)
    if sliding_window == 1:
        # a cache of window 1 returns all earlier keys, but bounds for those in the window
        key, value = key[:, :, -query.shape[2] :], value[:, :, -query.shape[2] :]
    out = segmented_attention(
        query,
        key,
        value,
        **spans,
        sink_logits=kwargs.get("s_aux"),
        cu_seqlens=cu_seqlens,
        seq_start=seq_start,
        seq_end=seq_end,
        query_offset=key.shape[2] - query.shape[2],
        scale=scaling,
        softcap=softcap,
    ).out
    out = out.transpose(1, 2)
    if cu_seqlens is not None and B > 1:
        out = out.reshape(B, -1, *out.shape[2:])
    if hidden is not None:
        out = out.masked_fill(hidden, 0.0)
    return out.contiguous() if rows is None else rows.put_back(out), None


def _hide(query: Tensor, key: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[B, H, T, D + 1]`` whose scores for absent keys are below all others.

    Where ``there`` bool ``[B, S]`` is False, the new feature takes 1e8 off a score before scale,
    so that the key has a weight of exactly 0 beside any other.
    """
    far = torch.where(there, 0.0, -1e4).to(key.dtype)[:, None, :, None]
    key = torch.cat([key, far.expand(*key.shape[:3], 1)], -1)
    return torch.cat([query, torch.full_like(query[..., :1], 1e4)], -1), key


def _spans(module: nn.Module, sliding_window: int | None) -> dict[str, Any]:
    """Segment length, window and sink tokens of a layer, for ``segmented_attention``."""
    if sliding_window is not None:
        return {"window_size": sliding_window}
    config = getattr(module, "config", None)
    if _is_chunked(module):
        return {"segment_len": getattr(config, "attention_chunk_size", None)}
    spans = {}
    for name, least in zip(FIELDS, (1, 1, 0), strict=True):
        span = getattr(config, name, None)
        if span is not None:
            check_int(f"config.{name}", span, least)
            spans[name.removeprefix("memattn_")] = span
    return spans


def _is_chunked(module: nn.Module) -> bool:
    """Whether a layer has its own chunked attention, as most layers of Llama 4."""
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    layer = getattr(module, "layer_idx", None)
    return kinds is not None and layer is not None and kinds[layer] == "chunked_attention"


def _bounds(start: Tensor, end: Tensor, shares_keys: bool) -> Tensor:
    """Starts and ends as one int32 tensor ``[2, B]``.

    It is ``[2, B, 1, 1]`` for models whose last layers share keys: they cut queries, and the third
    dimension of a mask, to the newest tokens.
    """
    bounds = torch.stack([start, end]).to(torch.int32)
    return bounds[..., None, None] if shares_keys else bounds


class _Tokens(NamedTuple):
    """An order of keys and queries in which each row's tokens come last (padding inside rows)."""

    keys: Tensor  # int64 [B, S], their columns
    queries: TokenOrder
    seq_start: Tensor  # int32 [B], position of the first token

    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """The columns of queries, keys and values."""
        return self.queries.index, self.keys, self.keys

    def put_back(self, out: Tensor) -> Tensor:
        """``[B, T, H, Dv]`` in the columns of the call; 0 for padding."""
        return self.queries.columns(out)


_orders = WeakTensorKeyDictionary()


def _tokens(present: Tensor, T: int) -> _Tokens:
    """The order for keys that are tokens where ``present [B, S]``; computed once for all layers."""
    if present not in _orders:
        S = present.shape[1]
        keys = TokenOrder.at_end(present)
        queries = TokenOrder.at_end(present[:, S - T :])
        start = (S - present.sum(1)).to(torch.int32)
        _orders[present] = _Tokens(keys.index, queries, start)
    return _orders[present]


_halves = WeakTensorKeyDictionary()


def _split_bounds(bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Split into starts and ends; cached for all layers, so that they are checked once."""
    if torch.compiler.is_compiling():
        return bounds[0], bounds[1]
    if bounds not in _halves:
        _halves[bounds] = (bounds[0].clone(), bounds[1].clone())
    return _halves[bounds]


def _packed_bounds(
    mask_function: Callable[..., Tensor], B: int, T: int, device: torch.device | str
) -> Tensor | None:
    """``cu_seqlens`` of packed documents from the mask function; None for one document per row.

    Rows are concatenated.
    """
    row = torch.arange(B, device=device)[:, None]
    head = torch.zeros((), dtype=torch.long, device=device)
    before = torch.arange(T - 1, device=device)[None]
    if mask_function(row, head, before, before + 1).any():
        # refused in attention instead: decoders with an encoder also make masks without keys
        return torch.ones(1, 1, 1, dtype=torch.bool, device=device)
    begins = ~mask_function(row, head, before + 1, before).expand(B, -1)  # [B, T-1]
    if not begins.any():
        return None
    begins = torch.cat([torch.ones_like(begins[:, :1]), begins], 1).flatten()
    return torch.cat([begins.nonzero()[:, 0], begins.new_full((1,), B * T, dtype=torch.long)]).int()


def _one_row(x: Tensor) -> Tensor:
    """``[B, H, T, D]`` as one row of all tokens, ``[1, H, B * T, D]``."""
    return x.transpose(0, 1).flatten(1, 2)[None]


def _lacks(name: str, requirement: str, detail: str = "") -> None:
    """Raise NotImplementedError for a feature that only eager attention has."""
    message = f'{name} must {requirement} with attn_implementation="{NAME}"'
    raise NotImplementedError(f'{message}{", " if detail else ""}{detail}; "eager" takes it')
