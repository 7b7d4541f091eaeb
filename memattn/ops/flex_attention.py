"""Segmented attention by PyTorch's FlexAttention, for comparisons and for devices that have it.

Keys stand in the order persistent, memory, tokens, and one mask function says what a query sees.
Unlike the other backends it lets NaN in a key or value that no query sees reach the output, where
one of the same block is seen.
"""

import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from memattn_kernels.signatures import SegmentedAttentionArgs

MaskFunction = Callable[[Any, Any, Any, Any], Any]
ScoreFunction = Callable[[Any, Any, Any, Any, Any], Any]


class MaskShape(NamedTuple):
    """All that a mask depends on, except bounds."""

    T: int
    S: int
    num_persistent: int
    num_memory_segments: int
    memory_len: int
    segment_len: int | None
    window_size: int | None
    num_sink_tokens: int | None
    is_causal: bool
    memory_is_causal: bool
    query_offset: int


def flex_segmented_attention(args: SegmentedAttentionArgs) -> tuple[Tensor, Tensor]:
    """Return ``out [B, H, T, Dv]`` and ``lse [B, H, T]``.

    Raises:
        NotImplementedError: On the CPU where a gradient is needed.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    query, (key, value) = args.query, joined_keys(args)
    if not query.is_cuda and any(tensor.requires_grad for tensor in (query, key, value)):
        raise NotImplementedError(
            'query must have device cuda for backend "flex" where gradients are needed, got '
            f"{query.device}: FlexAttention has no backward there"
        )
    attend: Any = _compiled(flex_attention) if query.is_cuda else flex_attention
    out, aux = attend(
        query,
        key,
        value,
        score_mod=None if args.softcap is None else _capped(args.softcap),
        block_mask=_block_mask(args),
        scale=args.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return out, aux.lse


@lru_cache(maxsize=32)
def _capped(softcap: float) -> ScoreFunction:
    """The function that caps a score."""
    return lambda score, b, h, i, j: softcap * torch.tanh(score / softcap)


def joined_keys(args: SegmentedAttentionArgs) -> tuple[Tensor, Tensor]:
    """Persistent, memory and token keys in a row, and their values."""
    B = len(args.query)
    keys, values = [args.key], [args.value]
    if args.memory_key is not None and args.memory_value is not None:
        keys.insert(0, args.memory_key.flatten(2, 3))
        values.insert(0, args.memory_value.flatten(2, 3))
    if args.persistent_key is not None and args.persistent_value is not None:
        keys.insert(0, args.persistent_key.expand(B, -1, -1, -1))
        values.insert(0, args.persistent_value.expand(B, -1, -1, -1))
    return torch.cat(keys, 2), torch.cat(values, 2)


def mask_shape(args: SegmentedAttentionArgs) -> MaskShape:
    """All that the mask of a call depends on, except bounds."""
    memory = None if args.memory_key is None else args.memory_key.shape
    return MaskShape(
        T=args.query.shape[2],
        S=args.key.shape[2],
        num_persistent=0 if args.persistent_key is None else args.persistent_key.shape[1],
        num_memory_segments=0 if memory is None else memory[2],
        memory_len=1 if memory is None else memory[3],
        segment_len=args.segment_len,
        window_size=args.window_size,
        num_sink_tokens=args.num_sink_tokens,
        is_causal=args.is_causal,
        memory_is_causal=args.memory_is_causal,
        query_offset=args.query_offset,
    )


def mask_function(shape: MaskShape, rows: tuple[Tensor, Tensor, Tensor] | None) -> MaskFunction:
    """Whether query ``i`` sees key ``j``, for sequence ``b``.

    Args:
        shape: Sizes and spans.
        rows: Start, end and first segment of the document of each query, int64 ``[B, T]``; None
            where all keys are one sequence.
    """
    P, N, M = shape.num_persistent, shape.num_memory_segments, shape.memory_len
    L, W = shape.segment_len, shape.window_size

    def sees(b: Any, h: Any, i: Any, j: Any) -> Any:
        start, end, segment = (0, shape.S, 0) if rows is None else (each[b, i] for each in rows)
        i = i + shape.query_offset
        token = j - P - N * M
        seen = (token >= 0) & (token >= start) & (token < end)
        if shape.is_causal:
            seen = seen & (token <= i)
        near = None
        if L is not None:
            near = (i - start) // L == (token - start) // L
        if W is not None:
            window = (token > i - W) & (token < i + W)
            near = window if near is None else near | window
        if near is not None and shape.num_sink_tokens is not None:
            # keys before a negative start are none, so the first sink is key 0 there
            first = start * (start > 0)
            near = near | ((token >= first) & (token < first + shape.num_sink_tokens))
        if near is not None:
            seen = seen & near
        if N and L is not None:
            row = j - P
            memory = (row >= 0) & (token < 0) & (row // M == segment + (i - start) // L)
            if shape.memory_is_causal:
                memory = memory & (row % M <= (i - start) % L)
            seen = seen | memory
        if P:
            seen = seen | (j < P)
        return seen & (i >= start) & (i < end)

    return sees


def document_rows(args: SegmentedAttentionArgs) -> tuple[Tensor, Tensor, Tensor] | None:
    """Start, end and first segment of the document of each query, int64 ``[B, T]``."""
    from memattn.reference._softmax import documents

    if args.cu_seqlens is None and args.seq_start is None and args.seq_end is None:
        return None
    B, _, T, _ = args.query.shape
    bounds = documents(args.query, args.cu_seqlens, args.seq_start, args.seq_end, args.segment_len)
    i = torch.arange(T, device=args.query.device)[:, None] + args.query_offset
    start, end, segment = (bound(i)[..., 0].expand(B, T).long().contiguous() for bound in bounds)
    return start, end, segment


def _block_mask(args: SegmentedAttentionArgs) -> Any:
    """The mask of a call; layers with the same bounds share it."""
    shape, device = mask_shape(args), str(args.query.device)
    bounds = [t for t in (args.cu_seqlens, args.seq_start, args.seq_end) if t is not None]
    if not bounds:
        return _mask_without_bounds(shape, device)
    known, same = _masks.setdefault(bounds[0], {}), (shape, len(bounds))
    if same not in known or any(
        kept() is not given for kept, given in zip(known[same][0], bounds[1:], strict=True)
    ):
        mask = _new_mask(shape, document_rows(args), len(args.query), device)
        known[same] = [weakref.ref(bound) for bound in bounds[1:]], mask
    return known[same][1]


_masks: Any = WeakTensorKeyDictionary()


@lru_cache(maxsize=32)
def _mask_without_bounds(shape: MaskShape, device: str) -> Any:
    return _new_mask(shape, None, None, device)


def _new_mask(
    shape: MaskShape, rows: tuple[Tensor, Tensor, Tensor] | None, B: int | None, device: str
) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    # compiled on CUDA, where masks are long: else it stores T x S integers on the way
    create: Any = _compiled(create_block_mask) if "cuda" in device else create_block_mask
    keys = shape.num_persistent + shape.num_memory_segments * shape.memory_len + shape.S
    return create(mask_function(shape, rows), B, None, shape.T, keys, device=device)


@lru_cache(maxsize=4)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)  # pyright: ignore[reportUnknownMemberType]
