"""Segmented sliding-window attention with persistent and memory keys."""

from typing import NamedTuple

import torch
from torch import Tensor

from memattn.checks import (
    check_bool,
    check_floating,
    check_int,
    check_like,
    check_pair,
    check_positive,
    check_rank,
    check_scale,
    check_shape,
    check_tensor,
    must,
)
from memattn.ops._attention import (
    autocast,
    autocast_each,
    check_query_key_value,
    check_tensors,
    longest,
    sequence_lengths,
)
from memattn.ops._checked import CheckedCalls, signature_of
from memattn.ops._dispatch import resolve_backend
from memattn_kernels.signatures import SegmentedAttentionArgs

_checked = CheckedCalls()


class AttentionOutput(NamedTuple):
    """Attention output and the natural log-sum-exp of its scores."""

    out: Tensor  # [B, H, T, Dv], the dtype of the inputs
    lse: Tensor  # [B, H, T], float32 (float64 for float64 inputs)


def segmented_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segment_len: int | None = None,
    window_size: int | None = None,
    num_sink_tokens: int = 0,
    sink_logits: Tensor | None = None,
    is_causal: bool = True,
    persistent_key: Tensor | None = None,
    persistent_value: Tensor | None = None,
    memory_key: Tensor | None = None,
    memory_value: Tensor | None = None,
    memory_is_causal: bool = False,
    cu_seqlens: Tensor | None = None,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
    query_offset: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> AttentionOutput:
    """Attend within segments and a sliding window, and to persistent and memory keys.

    ``softmax(Q K^T * scale) V`` in one softmax over the keys that a query may see. The query at
    position ``i`` sees the token key at position ``j`` when ``j <= i`` (or ``is_causal=False``)
    and one of these holds:

    - same segment: ``i // segment_len == j // segment_len``;
    - within the window: ``j > i - window_size`` and ``j < i + window_size``; a window of W is W
      keys with the query's own, if causal;
    - a sink: one of the first ``num_sink_tokens`` tokens of the sequence or document;
    - neither ``segment_len`` nor ``window_size`` is given.

    It also sees every persistent key, and the memory keys of its own segment: all ``M``, or with
    ``memory_is_causal`` only rows ``<= i mod segment_len``. A query that sees nothing gives
    ``out = 0``, ``lse = -inf`` and zero gradients. NaN in a key or value that no query sees does
    not reach the output.

    Args:
        query: ``[B, H, T, D]``, float16, bfloat16, float32 or float64; any strides.
        key: ``[B, Hkv, S, D]``, where ``Hkv`` divides ``H`` (grouped-query attention).
        value: ``[B, Hkv, S, Dv]``.
        segment_len: Tokens in a segment, at least 1.
        window_size: Keys in the window, the query's own included, at least 1.
        num_sink_tokens: First tokens of each sequence or document that its queries see beside
            segment and window. Where ``seq_start`` is negative, the first keys given stand for
            them, as in a trimmed cache that kept them. Without segment and window it says nothing
            more.
        sink_logits: ``[H]``, a logit for each query head that stands in the softmax beside the
            scores and has no value, as in gpt-oss: ``lse`` counts it, and ``out`` is smaller by
            its weight. A query that sees no key keeps ``out = 0``, ``lse = -inf``, and a head
            whose logit is ``-inf`` has no such sink.
        is_causal: Whether a query sees only keys at or before its own position.
        persistent_key: ``[Hkv, P, D]``, keys that all queries of all sequences see.
        persistent_value: ``[Hkv, P, Dv]``.
        memory_key: ``[B, Hkv, n_segments, M, D]``, needs ``segment_len``. ``n_segments`` covers
            all segments of the queries; with ``cu_seqlens``, the segments of all documents in
            order.
        memory_value: ``[B, Hkv, n_segments, M, Dv]``.
        memory_is_causal: Whether a query sees only the memory rows up to its place in the
            segment. Needs ``M == segment_len``.
        cu_seqlens: int32 ``[n+1]``, the rising bounds ``0 ... S`` of ``n`` packed documents, with
            ``B = 1``. Positions, segments and windows restart in each document.
        seq_start: int32 ``[B]``. Rows and keys before it are empty, and positions count from it.
            Negative where the sequence began before the first key given, as in a trimmed cache.
        seq_end: int32 ``[B]``. Rows and keys at or after it are empty.
        query_offset: Position of the first query among the keys; ``S - T`` in cached decoding.
        scale: Factor of the scores; None means ``1/sqrt(D)``.
        softcap: Bound that no score exceeds, positive, as in Gemma 2: the scores of all keys, scale
            included, become ``softcap * tanh(score / softcap)``; logits of sinks stay as they are.
            None means no bound.
        backend: ``"auto"`` (Triton for CUDA tensors, C++ for CPU tensors, the reference for
            float64 and where the extension is not built), ``"triton"``, ``"cpp"`` or
            ``"reference"``; or ``"flex"``, PyTorch's FlexAttention, which is compiled and has no
            backward on the CPU. A named backend never falls back.

    Returns:
        ``out [B, H, T, Dv]`` in the dtype of ``query`` and ``lse [B, H, T]``.

    Raises:
        TypeError: If an argument has the wrong Python type.
        ValueError: If a shape, dtype, device or value does not fit, or ``backend`` is unknown.
        NotImplementedError: If a named backend lacks the dtype, device or head dimension.
        ImportError: If a named backend is not installed.

    Note:
        Differentiable once in all floating inputs, through ``out`` and ``lse``. Source: Behrouz et
        al., Titans (2025), section 4.1, https://arxiv.org/abs/2501.00663. Differs: causal inside
        the segment, window and segment may be joined, and the published code's window of W + 1
        keys is W keys here.
    """
    check_tensors(
        {"query": query, "key": key, "value": value},
        {
            "persistent_key": persistent_key,
            "persistent_value": persistent_value,
            "memory_key": memory_key,
            "memory_value": memory_value,
        },
    )
    query, key, value = autocast_each(query, key, value)
    optional = (persistent_key, persistent_value, memory_key, memory_value)
    if any(tensor is not None for tensor in optional):
        optional = tuple(map(autocast, optional))
        persistent_key, persistent_value, memory_key, memory_value = optional
    tensors = (query, key, value, persistent_key, persistent_value, memory_key, memory_value)
    options = (segment_len, window_size, num_sink_tokens, is_causal, memory_is_causal)
    bounds = (cu_seqlens, seq_start, seq_end)
    signature = None
    if all(bound is None for bound in bounds):  # their values are looked at in each call
        signature = signature_of((*tensors, sink_logits), (*options, query_offset, scale))
    if signature is None or signature not in _checked:
        _check(*tensors, sink_logits, *options, *bounds, query_offset, scale)
        _checked.add(signature)
    has_sinks = num_sink_tokens > 0 and not (segment_len is None and window_size is None)
    args = SegmentedAttentionArgs(
        query=query,
        key=key,
        value=value,
        persistent_key=persistent_key,
        persistent_value=persistent_value,
        memory_key=memory_key,
        memory_value=memory_value,
        cu_seqlens=cu_seqlens,
        seq_start=seq_start,
        seq_end=seq_end,
        segment_len=segment_len,
        window_size=window_size,
        num_sink_tokens=num_sink_tokens if has_sinks else None,
        is_causal=is_causal,
        memory_is_causal=memory_is_causal,
        query_offset=query_offset,
        scale=check_scale(scale, query.shape[-1]),
        softcap=None if softcap is None else check_positive("softcap", softcap),
    )
    if backend == "flex":
        from memattn.ops.flex_attention import flex_segmented_attention

        return _beside_sink(AttentionOutput(*flex_segmented_attention(args)), sink_logits)
    match resolve_backend(backend, query):
        case "triton":
            from memattn_kernels.segmented_attention import segmented_attention as impl
        case "cpp":
            from memattn.cpp.segmented_attention import segmented_attention as impl
        case "reference":
            from memattn.reference.segmented_attention import segmented_attention as impl
    return _beside_sink(AttentionOutput(*impl(args)), sink_logits)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    persistent_key: Tensor | None,
    persistent_value: Tensor | None,
    memory_key: Tensor | None,
    memory_value: Tensor | None,
    sink_logits: Tensor | None,
    segment_len: int | None,
    window_size: int | None,
    num_sink_tokens: int,
    is_causal: bool,
    memory_is_causal: bool,
    cu_seqlens: Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    query_offset: int,
    scale: float | None,
) -> None:
    """Raise unless all arguments fit."""
    check_query_key_value(query, key, value)
    B, _, _, D = query.shape
    Hkv, S, Dv = *key.shape[1:3], value.shape[-1]
    if segment_len is not None:
        check_int("segment_len", segment_len, 1)
    if window_size is not None:
        check_int("window_size", window_size, 1)
    check_int("num_sink_tokens", num_sink_tokens, 0)
    if sink_logits is not None:
        check_tensor("sink_logits", sink_logits)
        check_shape("sink_logits", sink_logits, H=query.shape[1])
        check_floating("sink_logits", sink_logits)
        if sink_logits.device != query.device:
            must("sink_logits", f"be on the device of query, {query.device}", sink_logits.device)
    check_int("query_offset", query_offset, 0)
    check_bool("is_causal", is_causal)
    check_bool("memory_is_causal", memory_is_causal)

    check_pair("persistent_key", persistent_key, "persistent_value", persistent_value)
    if persistent_key is not None and persistent_value is not None:
        check_shape("persistent_key", persistent_key, Hkv=Hkv, P=None, D=D)
        check_shape("persistent_value", persistent_value, Hkv=Hkv, P=persistent_key.shape[1], Dv=Dv)
        check_like("persistent_key", persistent_key, "query", query)
        check_like("persistent_value", persistent_value, "query", query)
    check_pair("memory_key", memory_key, "memory_value", memory_value)
    if memory_key is not None and memory_value is not None:
        if segment_len is None:
            must("segment_len", "be given together with memory_key", "None")
        check_rank("memory_key", memory_key, "B Hkv n_segments M D")
        N, M = memory_key.shape[2:4]
        check_shape("memory_key", memory_key, B=B, Hkv=Hkv, n_segments=None, M=None, D=D)
        check_shape("memory_value", memory_value, B=B, Hkv=Hkv, n_segments=N, M=M, Dv=Dv)
        check_like("memory_key", memory_key, "query", query)
        check_like("memory_value", memory_value, "query", query)
        if memory_is_causal and segment_len != M:
            must("memory_key", f"have M={segment_len} rows (memory_is_causal)", f"M={M}")
    elif memory_is_causal:
        must("memory_key", "be given with memory_is_causal=True", "None")
    lengths = sequence_lengths(
        *(query, S, cu_seqlens, seq_start, seq_end, query_offset),
        wanted_for=None if memory_key is None else (segment_len, memory_key.shape[2]),
    )
    if memory_key is not None and segment_len is not None and lengths is not None:
        counts = [(max(length, 0) + segment_len - 1) // segment_len for length in lengths]
        n_segments = longest(counts) if cu_seqlens is None else sum(counts)
        if memory_key.shape[2] < n_segments:
            must("memory_key", f"have at least n_segments={n_segments}", memory_key.shape[2])
    check_scale(scale, D)


def _beside_sink(found: AttentionOutput, sink_logits: Tensor | None) -> AttentionOutput:
    """The softmax with one more logit for each head, whose value is 0."""
    if sink_logits is None:
        return found
    out, lse = found
    sink = sink_logits.to(lse.dtype)[:, None]  # [H, 1]
    is_empty = lse == -torch.inf
    seen = lse.masked_fill(is_empty, 0.0)  # no NaN where the sink is -inf as well
    scaled = out * (seen - sink).sigmoid()[..., None]
    return AttentionOutput(
        scaled.to(out.dtype), torch.where(is_empty, lse, torch.logaddexp(seen, sink))
    )
