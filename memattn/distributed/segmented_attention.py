"""Segmented attention over a sequence that several processes hold."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from memattn.checks import check_int, check_int32_vector, must
from memattn.distributed.edges import extend_by_edge
from memattn.distributed.shards import Edges, SequenceShards
from memattn.ops import AttentionOutput, segmented_attention
from memattn.ops._attention import autocast, check_tensors


def sequence_parallel_segmented_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    total_len: int | None = None,
    segment_len: int | None = None,
    window_size: int | None = None,
    persistent_key: Tensor | None = None,
    persistent_value: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> AttentionOutput:
    """Causal ``segmented_attention`` of a sequence whose tokens lie in several processes.

    Process ``r`` of the group holds consecutive tokens, ``ceil(total_len / n)`` each but the last,
    which holds the rest. A query sees at most ``window_size - 1`` tokens before its own, or those
    from the beginning of its segment, so a process needs only that edge of keys and values from
    the process before it, or from several where shards are shorter than the window. The edge goes
    point to point in the forward pass, its gradients go back in the backward pass; nothing else is
    communicated. ``memattn.distributed.edge_bytes`` tells how much that is.

    All processes of the group call it with the same options, and all run the backward pass.
    Tensors that every process has alike, such as persistent keys, get the gradient of the own
    queries: their sum over the group is that of one process.

    Args:
        query: ``[B, H, T, D]``, the queries of this process; dtypes as in ``segmented_attention``.
        key: ``[B, Hkv, T, D]``, the keys of the same tokens.
        value: ``[B, Hkv, T, Dv]``.
        group: The processes in the order of their tokens; None means all. A group of one
            communicates nothing.
        total_len: Tokens of the whole sequence; None means ``T`` in each process.
        segment_len: Tokens in a segment; this or ``window_size`` is given.
        window_size: Keys in the window, the query's own included.
        persistent_key: ``[Hkv, P, D]``, keys that all queries see.
        persistent_value: ``[Hkv, P, Dv]``.
        cu_seqlens: int32 ``[n+1]``, bounds ``0 ... total_len`` of packed documents of the *whole*
            sequence, with ``B = 1``, the same in each process. Its values are read.
        scale: Factor of the scores; None means ``1/sqrt(D)``.
        softcap: Bound that no score exceeds; None means no bound.
        backend: As in ``segmented_attention``.

    Returns:
        ``out [B, H, T, Dv]`` and ``lse [B, H, T]`` of this process's queries.

    Raises:
        ValueError: If neither ``segment_len`` nor ``window_size`` is given, a shape does not fit
            this process's shard, or bounds are not those of the whole sequence.
        RuntimeError: If there is no process group.
        TypeError, NotImplementedError, ImportError: As ``segmented_attention``.

    Note:
        Differentiable once in query, key, value and persistent tensors.
    """
    persistent = {"persistent_key": persistent_key, "persistent_value": persistent_value}
    check_tensors({"query": query, "key": key, "value": value}, persistent)
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "group must be a process group, got none: call torch.distributed.init_process_group"
        )
    if segment_len is None and window_size is None:
        must("segment_len", "be given, or window_size", None)
    for name, size in (("segment_len", segment_len), ("window_size", window_size)):
        if size is not None:
            check_int(name, size, 1)
    group = group or dist.group.WORLD
    assert group is not None
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        must("group", "have this process", f"a group of {size} others")
    T = query.shape[2]
    shards = SequenceShards(T * size if total_len is None else total_len, size)
    start, end = shards.bounds(rank)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4 or tensor.shape[2] != end - start:
            what = f"have T={end - start} tokens: {start} to {end} of total_len={shards.total_len}"
            must(name, f"{what}, as [B, H, T, D]", list(tensor.shape))
    documents = () if cu_seqlens is None else _documents(cu_seqlens, query, shards.total_len)
    edges = Edges(shards, segment_len, window_size, documents)
    key, value = map(autocast, (key, value))  # before the exchange: half the bytes
    key, value = extend_by_edge(key, value, edges, group)
    bounds, padding = _bounds(edges, rank, query)
    if padding:
        key, value = (F.pad(tensor, (0, 0, padding, 0)) for tensor in (key, value))
    return segmented_attention(
        query,
        key,
        value,
        segment_len=segment_len,
        window_size=window_size,
        **persistent,
        query_offset=edges.edge_len(rank) + padding,
        scale=scale,
        softcap=softcap,
        backend=backend,
        **bounds,
    )


def _documents(cu_seqlens: Tensor, query: Tensor, total_len: int) -> tuple[int, ...]:
    """Bounds of the documents of the whole sequence."""
    check_int32_vector("cu_seqlens", cu_seqlens, query)
    if query.shape[0] != 1:
        must("query", "have B=1 with cu_seqlens", f"B={query.shape[0]}")
    bounds = tuple(cu_seqlens.tolist())
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != total_len:
        must("cu_seqlens", f"begin with 0 and end with total_len={total_len}", list(bounds))
    if any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
        must("cu_seqlens", "rise", list(bounds))
    return bounds


def _bounds(edges: Edges, rank: int, query: Tensor) -> tuple[dict[str, Any], int]:
    """The bounds for the operator, and how many empty keys to put before the edge.

    Segments are counted from the beginning of the sequence. Without documents a bound says where
    that lies; a packed document begins at its first key, so empty keys, which no query sees, fill
    up the first segment of a document that is cut.
    """
    first, (_, end) = edges.first_key(rank), edges.shards.bounds(rank)
    if not edges.documents:
        at = torch.full((query.shape[0],), -first, dtype=torch.int32, device=query.device)
        return {"seq_start": at}, 0
    padding = 0
    if edges.segment_len is not None:
        padding = (first - edges.document_start(first)) % edges.segment_len
    inner = [bound for bound in edges.documents if first < bound < end]
    bounds = [0, *(bound - first + padding for bound in inner), end - first + padding]
    return {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32, device=query.device)}, padding
