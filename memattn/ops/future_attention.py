"""Future attention: one softmax over the past's keys and learned keys for the masked future."""

from typing import NamedTuple

from torch import Tensor

from memattn.checks import (
    check_bool,
    check_heads,
    check_int,
    check_like,
    check_rank,
    check_scale,
    check_shape,
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
from memattn.ops._dispatch import resolve_backend
from memattn_kernels.signatures import FutureAttentionArgs

FUTURE_INDEXES = ("position", "distance")
LOSS_TYPES = ("mse", "cosine")


class FutureAttentionOutput(NamedTuple):
    """Attention output, the part of it that came from future keys, and the log-sum-exp."""

    out: Tensor  # [B, H, T, Dv], the dtype of the inputs
    out_future: Tensor  # [B, H, T, Dv], the dtype of the inputs
    lse: Tensor  # [B, H, T], float32 (float64 for float64 inputs)


class FutureAttentionLossOutput(NamedTuple):
    """Attention output, the loss of its future part, and the log-sum-exp."""

    out: Tensor  # [B, H, T, Dv], the dtype of the inputs
    loss: Tensor  # scalar, float32 (float64 for float64 inputs)
    lse: Tensor  # [B, H, T], float32 (float64 for float64 inputs)


def future_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    future_key: Tensor,
    future_value: Tensor,
    *,
    future_dim: int,
    future_query: Tensor | None = None,
    future_index: str = "position",
    cu_seqlens: Tensor | None = None,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
    query_offset: int = 0,
    scale: float | None = None,
    backend: str = "auto",
) -> FutureAttentionOutput:
    """Attend to the past and, in the same softmax, to stand-ins for the keys of the future.

    The query at position ``i`` sees the keys at positions ``p <= i``, and one future key for each
    position ``i < p <= min(i + future_dim, N_ctx - 1)``, where ``N_ctx`` is one more than the rows
    of ``future_key``. ``out = P_past V + P_future V_future`` with one softmax ``P`` over the union,
    and ``out_future`` is its second part. A position is counted from 0 in each sequence or
    document. A query outside its sequence gives ``out = 0``, ``lse = -inf`` and zero gradients.
    NaN in a key, value or row that no query sees does not reach the output.

    Args:
        query: ``[B, H, T, D]``, float16, bfloat16, float32 or float64; any strides.
        key: ``[B, Hkv, S, D]``, where ``Hkv`` divides ``H`` (grouped-query attention).
        value: ``[B, Hkv, S, Dv]``.
        future_key: ``[Hf, N_ctx - 1, D]``, shared by the batch, where ``Hf`` divides ``H``; row
            ``c`` stands for position ``c + 1``. Or ``[B, Hf, N_ctx - 1, D]``, one table for each
            sequence; with ``cu_seqlens``, ``[n, Hf, N_ctx - 1, D]``, one for each document.
        future_value: The values of these rows, with ``Dv`` features.
        future_dim: Positions that a query sees ahead, at least 1 and at most ``N_ctx - 1``.
        future_query: ``[B, H, T, D]``, queries that meet the future keys instead of ``query``:
            for keys by distance that are rotated relative to the query.
        future_index: What a row stands for. ``"position"``: row ``c`` for position ``c + 1``.
            ``"distance"``: row ``c`` for position ``i + c + 1``; every query sees all
            ``future_dim`` rows, and ``N_ctx`` is without bound.
        cu_seqlens: int32 ``[n+1]``, the rising bounds ``0 ... S`` of ``n`` packed documents, with
            ``B = 1``. Positions restart in each document.
        seq_start: int32 ``[B]``. Rows and keys before it are empty, and positions count from it.
        seq_end: int32 ``[B]``. Rows and keys at or after it are empty.
        query_offset: Position of the first query among the keys; ``S - T`` in cached decoding.
        scale: Factor of the scores; None means ``1/sqrt(D)``.
        backend: ``"auto"`` (Triton for CUDA tensors, C++ for CPU tensors, the reference for
            float64 and where the extension is not built), ``"triton"``, ``"cpp"`` or
            ``"reference"``. A named backend never falls back.

    Returns:
        ``out`` and ``out_future`` ``[B, H, T, Dv]`` in the dtype of ``query``, and ``lse
        [B, H, T]`` over past and future keys together.

    Raises:
        TypeError: If an argument has the wrong Python type.
        ValueError: If a shape, dtype, device or value does not fit (a table with fewer rows than
            the band or the sequence needs among them), or ``backend`` is unknown.
        NotImplementedError: If a named backend lacks the dtype, device or head dimension.
        ImportError: If a named backend is not installed.

    Note:
        Differentiable once in all floating inputs, through all outputs. Source: the future
        attention transformer of yiphei/yif-AI (``future_attention/``). Differs: no matrix of
        ``T x T`` is stored, any length up to ``N_ctx`` trains, and rows may be computed, indexed
        by distance, or differ in a batch.
    """
    args = _checked(
        query=query,
        key=key,
        value=value,
        future_key=future_key,
        future_value=future_value,
        future_dim=future_dim,
        future_query=future_query,
        future_index=future_index,
        cu_seqlens=cu_seqlens,
        seq_start=seq_start,
        seq_end=seq_end,
        query_offset=query_offset,
        scale=scale,
    )
    out, out_future, lse, _ = _run(args, backend)
    return FutureAttentionOutput(out, out_future, lse)


def future_attention_loss(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    future_key: Tensor,
    future_value: Tensor,
    *,
    future_dim: int,
    loss_type: str = "mse",
    detach_target: bool = True,
    future_query: Tensor | None = None,
    future_index: str = "position",
    cu_seqlens: Tensor | None = None,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
    query_offset: int = 0,
    scale: float | None = None,
    backend: str = "auto",
) -> FutureAttentionLossOutput:
    """Future attention together with the loss of its future part, in one pass.

    The target of ``out_future`` at position ``i`` is what the *real* keys and values of the same
    band contribute: with the softmax of ``query . key * scale`` over ``p <= i + future_dim``, the
    sum over ``p > i`` of weight times value. Positions whose band is empty or leaves the sequence
    (real keys are missing) are left out; ``loss`` is the mean over the others, all heads and, for
    ``"mse"``, all features, and 0 where none is left.

    Args:
        query: As in ``future_attention``, like all arguments not named below.
        key: ``[B, Hkv, S, D]``.
        value: ``[B, Hkv, S, Dv]``.
        future_key: ``[Hf, N_ctx - 1, D]`` or ``[B, Hf, N_ctx - 1, D]``.
        future_value: The same with ``Dv`` features.
        future_dim: Positions that a query sees ahead.
        loss_type: ``"mse"``, the mean squared error, or ``"cosine"``, ``(1 - cos) / 2``, between
            0 for the same direction and 1 for the opposite one. Its gradient grows as the inverse
            of the length of ``out_future``: in float16 it leaves the range of the dtype where a
            row gives its future next to no weight, and is NaN then.
        detach_target: Whether the target counts as a constant. Otherwise the loss reaches
            ``query``, ``key`` and ``value`` through it too.
        future_query: ``[B, H, T, D]`` or None.
        future_index: ``"position"`` or ``"distance"``.
        cu_seqlens: int32 ``[n+1]`` or None.
        seq_start: int32 ``[B]`` or None.
        seq_end: int32 ``[B]`` or None.
        query_offset: Position of the first query among the keys.
        scale: Factor of the scores; None means ``1/sqrt(D)``.
        backend: As in ``future_attention``.

    Returns:
        ``out [B, H, T, Dv]`` and ``lse [B, H, T]`` as in ``future_attention``, and the scalar
        ``loss``, in float32 (float64 for float64 inputs).

    Raises:
        TypeError: If an argument has the wrong Python type.
        ValueError: If a shape, dtype, device or value does not fit, or ``loss_type`` or
            ``backend`` is unknown.
        NotImplementedError: If a named backend lacks the dtype, device or head dimension.
        ImportError: If a named backend is not installed.

    Note:
        Differentiable once in all floating inputs, through all outputs. Source: as in
        ``future_attention``. Differs: the published loss counts the last position, which has no
        future, and fails for sequences shorter than ``N_ctx``.
    """
    if loss_type not in LOSS_TYPES:
        must("loss_type", f"be one of {', '.join(LOSS_TYPES)}", repr(loss_type))
    check_bool("detach_target", detach_target)
    args = _checked(
        query=query,
        key=key,
        value=value,
        future_key=future_key,
        future_value=future_value,
        future_dim=future_dim,
        future_query=future_query,
        future_index=future_index,
        cu_seqlens=cu_seqlens,
        seq_start=seq_start,
        seq_end=seq_end,
        query_offset=query_offset,
        scale=scale,
    )
    args = args._replace(loss_type=loss_type, detach_target=detach_target)
    out, _, lse, loss = _run(args, backend)
    return FutureAttentionLossOutput(out, loss, lse)


def _run(args: FutureAttentionArgs, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``out``, ``out_future``, ``lse`` and the loss, if one is asked for, of a backend."""
    match resolve_backend(backend, args.query):
        case "triton":
            from memattn_kernels.future_attention import future_attention as impl
        case "cpp":
            from memattn.cpp.future_attention import future_attention as impl
        case "reference":
            from memattn.reference.future_attention import future_attention as impl
    return impl(args)


def _checked(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    future_key: Tensor,
    future_value: Tensor,
    future_dim: int,
    future_query: Tensor | None,
    future_index: str,
    cu_seqlens: Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    query_offset: int,
    scale: float | None,
) -> FutureAttentionArgs:
    """The arguments of a backend, without a loss."""
    check_tensors(
        {
            "query": query,
            "key": key,
            "value": value,
            "future_key": future_key,
            "future_value": future_value,
        },
        {"future_query": future_query},
    )
    query, key, value, future_key, future_value = autocast_each(
        query, key, value, future_key, future_value
    )
    future_query = autocast(future_query)
    check_query_key_value(query, key, value)
    B, H, T, D = query.shape
    S, Dv = key.shape[2], value.shape[-1]
    check_int("future_dim", future_dim, 1)
    check_int("query_offset", query_offset, 0)
    if future_index not in FUTURE_INDEXES:
        must("future_index", f"be one of {', '.join(FUTURE_INDEXES)}", repr(future_index))
    if future_query is not None:
        check_shape("future_query", future_query, B=B, H=H, T=T, D=D)
        check_like("future_query", future_query, "query", query)

    per_sequence = future_key.dim() == 4
    if not per_sequence:
        check_rank("future_key", future_key, "Hf N_ctx-1 D")
    Hf, table_len = future_key.shape[-3:-1]
    shape = {"Hf": Hf, "N_ctx-1": table_len}
    if per_sequence and cu_seqlens is not None and cu_seqlens.dim() == 1:
        shape = {"n": max(cu_seqlens.numel() - 1, 0), **shape}
    elif per_sequence:
        shape = {"B": B, **shape}
    check_shape("future_key", future_key, **shape, D=D)
    check_shape("future_value", future_value, **shape, Dv=Dv)
    check_heads(query, "future_key", future_key, -3)
    check_like("future_key", future_key, "query", query)
    check_like("future_value", future_value, "query", query)

    by_distance = future_index == "distance"
    if by_distance and table_len != future_dim:
        must("future_key", f"have future_dim={future_dim} rows, one per distance", table_len)
    if table_len < future_dim:
        must("future_key", f"have at least future_dim={future_dim} rows", table_len)
    n_ctx = table_len + 1
    whole = cu_seqlens is None and seq_start is None and seq_end is None
    if not by_distance and whole and query_offset + T > n_ctx:
        must("query_offset", f"be such that query_offset + T={T} <= N_ctx={n_ctx}", query_offset)
    lengths = sequence_lengths(
        *(query, S, cu_seqlens, seq_start, seq_end, query_offset),
        wanted_for=None if by_distance else n_ctx,
    )
    if not by_distance and lengths is not None and longest(lengths) > n_ctx:
        needed = longest(lengths) - 1
        must("future_key", f"have a row for each position, at least {needed}", table_len)

    if per_sequence and cu_seqlens is not None:  # one table with the rows of all documents
        future_key, future_value = (
            t.transpose(0, 1).flatten(1, 2) for t in (future_key, future_value)
        )
    return FutureAttentionArgs(
        query=query,
        key=key,
        value=value,
        future_key=future_key,
        future_value=future_value,
        future_query=future_query,
        cu_seqlens=cu_seqlens,
        seq_start=seq_start,
        seq_end=seq_end,
        table_len=table_len,
        by_distance=by_distance,
        future_dim=future_dim,
        query_offset=query_offset,
        scale=check_scale(scale, D),
        loss_type=None,
        detach_target=True,
    )
