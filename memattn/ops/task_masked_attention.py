"""Attention under the mask of a task; one batch may mix tasks."""

from typing import Any

import torch
from torch import Tensor

from memattn.checks import (
    check_bool,
    check_indices,
    check_scale,
    check_type,
    must,
    values_to_check,
)
from memattn.ops._attention import (
    autocast_each,
    check_query_key_value,
    check_tensors,
    sequence_lengths,
)
from memattn.ops._dispatch import resolve_backend
from memattn.ops.segmented_attention import AttentionOutput
from memattn.ops.task_mask import TaskMask
from memattn_kernels.signatures import TaskMaskedAttentionArgs


def task_masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    task_mask: TaskMask,
    task_id: int | Tensor,
    *,
    is_causal: bool = False,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> AttentionOutput:
    """Attend to the keys that the mask of a task allows.

    ``softmax(Q K^T * scale + M) V`` with ``M[i, j] = 0`` where the task of the sequence allows
    query ``i`` to see key ``j``, and minus infinity elsewhere. Tiles of 128 queries by 128 keys
    without an allowed pair are skipped, forward and backward. A query that sees nothing gives
    ``out = 0``, ``lse = -inf`` and zero gradients. NaN in a key or value that no query of its
    sequence may see does not reach the output.

    Args:
        query: ``[B, H, T, D]``, float16, bfloat16, float32 or float64; any strides.
        key: ``[B, Hkv, S, D]``, where ``Hkv`` divides ``H`` (grouped-query attention).
        value: ``[B, Hkv, S, Dv]``.
        task_mask: Masks of all tasks, for T queries, S keys, and H query heads or one for all.
        task_id: The task of all sequences, or of each: int32 or int64 ``[B]``.
        is_causal: Whether query ``i`` also sees only keys ``j <= i``.
        seq_start: int32 ``[B]``. Rows and keys before it are empty, and positions in the mask
            count from it. At least 0.
        seq_end: int32 ``[B]``. Rows and keys at or after it are empty.
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
        Differentiable once in ``query``, ``key`` and ``value``, through ``out`` and ``lse``. A
        batch that mixes tasks gives the same bits as one call for each task. Source: Kirichenko,
        DTG-MA, https://github.com/infosave2007/dtgma. Differs: the mask acts on pairs of
        positions, while the published one is a number for each head, which a softmax ignores; and
        a query without a key gives 0 instead of NaN.
    """
    check_tensors({"query": query, "key": key, "value": value}, {})
    check_type("task_mask", task_mask, TaskMask, "be a TaskMask")
    query, key, value = autocast_each(query, key, value)
    check_query_key_value(query, key, value)
    _, H, T, D = query.shape
    S = key.shape[2]
    check_bool("is_causal", is_causal)
    if (task_mask.n_queries, task_mask.n_keys) != (T, S):
        got = f"{task_mask.n_queries} and {task_mask.n_keys}"
        must("task_mask", f"be for T={T} queries and S={S} keys", got)
    if task_mask.n_heads not in (1, H):
        must("task_mask", f"have one head or H={H}", task_mask.n_heads)
    if task_mask.device != query.device:
        must("task_mask", f"be on the device of query, {query.device}", task_mask.device)
    task_id = _task_ids(task_id, task_mask.n_tasks, query)
    sequence_lengths(query, S, None, seq_start, seq_end, 0, wanted_for=None)
    if seq_start is not None:
        starts = values_to_check(seq_start, "task_masked_attention")
        if starts is not None and min(starts, default=0) < 0:
            must("seq_start", "be at least 0", min(starts))

    args = TaskMaskedAttentionArgs(
        query=query,
        key=key,
        value=value,
        task_id=task_id,
        **task_mask.tensors._asdict(),
        seq_start=seq_start,
        seq_end=seq_end,
        is_causal=is_causal,
        scale=check_scale(scale, D),
    )
    match resolve_backend(backend, query):
        case "reference":
            from memattn.reference.task_masked_attention import task_masked_attention as define

            # one copy for each task, whatever the batch
            pairs = torch.stack([task_mask.dense(task) for task in range(task_mask.n_tasks)])
            return AttentionOutput(*define(args, pairs[task_id.long()]))
        case "triton":
            from memattn_kernels.task_masked_attention import task_masked_attention as impl
        case "cpp":
            from memattn.cpp.task_masked_attention import task_masked_attention as impl
    return AttentionOutput(*impl(args))


def _task_ids(task_id: int | Tensor, n_tasks: int, query: Tensor) -> Tensor:
    """The task of each sequence, int32 ``[B]`` on the device of the query."""
    B = query.shape[0]
    if isinstance(task_id, Tensor):
        check_indices("task_id", task_id, query)
        if list(task_id.shape) != [B]:
            must("task_id", f"be an integer or have shape [B={B}]", list(task_id.shape))
        for task in values_to_check(task_id, n_tasks) or ():
            _check_task(task, n_tasks)
        return task_id.to(torch.int32).contiguous()
    given: Any = task_id
    if isinstance(given, bool) or not isinstance(given, int | torch.SymInt):
        must("task_id", "be an integer or a tensor", type(given).__name__, TypeError)
    _check_task(task_id, n_tasks)
    return torch.full((B,), task_id, dtype=torch.int32, device=query.device)


def _check_task(task: int, n_tasks: int) -> None:
    if not 0 <= task < n_tasks:
        must("task_id", f"be from 0 to n_tasks - 1 = {n_tasks - 1}", task)
