"""Attention to the chapters of a memory bank that each sequence, block or token has selected."""

import torch
from torch import Tensor

from memattn.checks import (
    check_factor,
    check_floating,
    check_heads,
    check_index_range,
    check_indices,
    check_int,
    check_like,
    check_on_device_of_query,
    check_pair,
    check_rank,
    check_scale,
    check_shape,
    check_tensor,
    must,
)
from memattn.ops._attention import autocast, sequence_lengths
from memattn.ops._dispatch import resolve_backend
from memattn.ops._routing_rows import routing_rows
from memattn.ops.segmented_attention import AttentionOutput
from memattn_kernels.signatures import ChapterAttentionArgs

COMBINE = ("joint", "independent")


def chapter_attention(
    query: Tensor,
    chapter_key: Tensor,
    chapter_value: Tensor,
    chapter_indices: Tensor,
    chapter_weights: Tensor | None = None,
    *,
    combine: str = "joint",
    routing_block: int | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    query_offset: int = 0,
    scale: float | None = None,
    backend: str = "auto",
) -> AttentionOutput:
    """Attend to selected chapters of a bank that the whole batch shares.

    With the scores ``S_sm = scale <q, k_sm>`` of the keys of slot ``s`` and ``l_s = log sum_m exp
    S_sm``, a query gets

    - joint: ``sum_sm p_sm v_sm`` with ``p_sm = w_s exp(S_sm - lse)`` and ``lse = log sum_s w_s
      exp l_s``: one softmax, to which a chapter comes with its weight. A slot with a weight of 0 or
      less is empty;
    - independent: ``sum_s w_s sum_m exp(S_sm - l_s) v_sm``: a softmax for each chapter. Any weight
      is allowed, and ``lse = log sum_s exp l_s`` has none.

    Nothing of the size of the selected keys is stored. A chapter in several slots counts as often.
    Neither the order of the slots nor the batch changes a bit. A query without a chapter gives
    ``out = 0``, ``lse = -inf`` and zero gradients. NaN in a chapter that no query of a sequence
    selected does not reach the output.

    Args:
        query: ``[B, H, T, D]``, float16, bfloat16, float32 or float64; any strides.
        chapter_key: ``[C, Hkv, M, D]``, where ``Hkv`` divides ``H`` (grouped-query attention); M
            keys in each of C chapters. With ``key_scale`` int8, or uint8 ``[C, Hkv, M, D / 2]``
            with two four-bit numbers in a byte (see ``quantize_rows``).
        chapter_value: ``[C, Hkv, M, Dv]``, likewise.
        chapter_indices: int32 or int64, from 0 to C - 1, or -1 for an empty slot. ``[B, K]`` for
            whole sequences, ``[B, T, K]`` for each query, or ``[B, N, K]`` for blocks of
            ``routing_block`` tokens. Values are checked on the CPU; on a GPU those out of range are
            empty.
        chapter_weights: float32 (or float64 with a float64 query), the shape of the indices; None
            means 1.
        combine: ``"joint"`` or ``"independent"``.
        routing_block: Tokens in a block. Blocks count from the start of the sequence or document;
            the first row of the indices is for the block that holds the first query. Those of
            packed documents follow each other. None: ``[B, T, K]`` has a row for each query.
        key_scale: float32 (or float64 with a float64 query) ``[C, Hkv, M]``, of quantised keys;
            together with ``value_scale``.
        value_scale: The same, of quantised values.
        seq_start: int32 ``[B]``. Queries at positions before it are empty.
        seq_end: int32 ``[B]``. Queries at positions from it on are empty.
        cu_seqlens: int32 ``[n + 1]``, bounds of packed documents, with ``B = 1``.
        query_offset: Position of the first query; ``seq_start``, ``seq_end`` and ``cu_seqlens`` are
            positions too.
        scale: Factor of the scores; None means ``1/sqrt(D)``.
        backend: ``"auto"`` (Triton for CUDA tensors, C++ for CPU tensors, the reference for
            float64 and where the extension is not built), ``"triton"``, ``"cpp"`` or
            ``"reference"``. A named backend never falls back.

    Returns:
        ``out [B, H, T, Dv]`` in the dtype of ``query`` and ``lse [B, H, T]``.

    Raises:
        TypeError: If an argument has the wrong Python type.
        ValueError: If a shape, dtype, device or value does not fit, or ``backend`` is unknown.
        NotImplementedError: If a named backend lacks the dtype, device or head dimension.
        ImportError: If a named backend is not installed.

    Note:
        Differentiable once in ``query``, ``chapter_weights`` and, where they are not quantised,
        ``chapter_key`` and ``chapter_value``, through ``out`` and ``lse``. Source: Tasmay
        Tibrewal, Mixture of Chapters, https://github.com/Tasmay-Tibrewal/Memory. Differs: weights
        act on scores or outputs, not on the memory before its projection; the bank is projected
        once and not for every sample; every dtype and group size has a backward.
    """
    for name, tensor in (
        ("query", query),
        ("chapter_key", chapter_key),
        ("chapter_value", chapter_value),
        ("chapter_indices", chapter_indices),
    ):
        check_tensor(name, tensor)
    check_rank("query", query, "B H T D")
    check_floating("query", query)
    query = autocast(query)
    if key_scale is None and value_scale is None:
        chapter_key, chapter_value = autocast(chapter_key), autocast(chapter_value)
    value_dim = _check_bank(query, chapter_key, chapter_value, key_scale, value_scale)
    if combine not in COMBINE:
        must("combine", f"be one of {', '.join(COMBINE)}", repr(combine))
    check_int("query_offset", query_offset, 0)
    if routing_block is not None:
        check_int("routing_block", routing_block, 1)
    T = query.shape[2]
    indices, weights = _check_slots(query, chapter_indices, chapter_weights, routing_block)
    check_index_range("chapter_indices", chapter_indices, "C", chapter_key.shape[0])
    sequence_lengths(
        query, query_offset + T, cu_seqlens, seq_start, seq_end, query_offset, wanted_for=None
    )
    row_start, row_end, row_len = routing_rows(
        query,
        indices.shape[1],
        whole=chapter_indices.dim() == 2,
        routing_block=routing_block,
        query_offset=query_offset,
        cu_seqlens=cu_seqlens,
        seq_start=seq_start,
        seq_end=seq_end,
    )
    args = ChapterAttentionArgs(
        query=query,
        key=chapter_key,
        value=chapter_value,
        indices=indices,
        weights=weights,
        key_scale=key_scale,
        value_scale=value_scale,
        row_start=row_start,
        row_end=row_end,
        row_len=row_len,
        value_dim=value_dim,
        is_joint=combine == "joint",
        scale=check_scale(scale, query.shape[-1]),
    )
    match resolve_backend(backend, query):
        case "triton":
            from memattn_kernels.chapter_attention import chapter_attention as impl
        case "cpp":
            from memattn.cpp.chapter_attention import chapter_attention as impl
        case "reference":
            from memattn.reference.chapter_attention import chapter_attention as impl
    return AttentionOutput(*impl(args))


def _check_bank(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> int:
    """Check keys and values, quantised or not, and return ``Dv``."""
    D = query.shape[-1]
    check_rank("chapter_key", key, "C Hkv M D")
    C, Hkv, M, _ = key.shape
    check_pair("key_scale", key_scale, "value_scale", value_scale)
    if C == 0 or M == 0:
        must("chapter_key", "have at least one chapter of one key", list(key.shape))
    check_heads(query, "chapter_key", key)
    if key_scale is None or value_scale is None:
        check_shape("chapter_key", key, C=None, Hkv=None, M=None, D=D)
        check_shape("chapter_value", value, C=C, Hkv=Hkv, M=M, Dv=None)
        check_like("chapter_key", key, "query", query)
        check_like("chapter_value", value, "query", query)
        return value.shape[-1]
    if key.dtype not in (torch.int8, torch.uint8):
        must("chapter_key", "have dtype int8 or uint8 with key_scale", key.dtype)
    packed = key.dtype == torch.uint8
    if packed and D % 2:
        must("query", "have an even D for keys of four bits", D)
    check_shape("chapter_key", key, C=None, Hkv=None, M=None, D=D // 2 if packed else D)
    check_shape("chapter_value", value, C=C, Hkv=Hkv, M=M, Dv=None)
    check_like("chapter_value", value, "chapter_key", key)
    for name, tensor in (("key_scale", key_scale), ("value_scale", value_scale)):
        check_tensor(name, tensor)
        check_shape(name, tensor, C=C, Hkv=Hkv, M=M)
        check_factor(name, tensor, query)
    check_on_device_of_query("chapter_key", key, query)
    return value.shape[-1] * (2 if packed else 1)


def _check_slots(
    query: Tensor, indices: Tensor, weights: Tensor | None, routing_block: int | None
) -> tuple[Tensor, Tensor | None]:
    """Indices int32 ``[B, N, K]`` and weights of the same shape."""
    B, _, T, _ = query.shape
    check_indices("chapter_indices", indices, query)
    if indices.dim() == 2:
        check_shape("chapter_indices", indices, B=B, K=None)
        if routing_block is not None:
            must("routing_block", "be None with chapter_indices [B, K]", routing_block)
    elif indices.dim() == 3:
        n_rows = {"T": T} if routing_block is None else {"N": None}
        check_shape("chapter_indices", indices, B=B, **n_rows, K=None)
    else:
        must("chapter_indices", "have 2 or 3 axes", f"shape {list(indices.shape)}")
    if weights is not None:
        check_tensor("chapter_weights", weights)
        dims = ("B", "K") if indices.dim() == 2 else ("B", "N", "K")
        check_shape("chapter_weights", weights, **dict(zip(dims, indices.shape, strict=True)))
        check_factor("chapter_weights", weights, query)
    if indices.dim() == 2:
        indices, weights = indices[:, None], None if weights is None else weights[:, None]
    return indices.int().contiguous(), None if weights is None else weights.contiguous()
