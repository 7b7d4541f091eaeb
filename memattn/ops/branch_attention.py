"""Attention in branches over the same tokens: a base and specialists, weighted by gates."""

from torch import Tensor

from memattn.checks import (
    check_bool,
    check_factor,
    check_floating,
    check_heads,
    check_index_range,
    check_indices,
    check_int,
    check_like,
    check_rank,
    check_scale,
    check_shape,
    check_tensor,
    must,
)
from memattn.ops._attention import autocast, sequence_lengths
from memattn.ops._dispatch import resolve_backend
from memattn.ops.segmented_attention import AttentionOutput
from memattn_kernels.signatures import BranchAttentionArgs


def branch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    branch_indices: Tensor | None = None,
    *,
    is_causal: bool = True,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    query_offset: int = 0,
    scale: float | None = None,
    backend: str = "auto",
) -> AttentionOutput:
    """Attend in several branches, each with its own queries, keys and values, and gate the results.

    Every token has A slots. Slot ``a`` of token ``t`` is in branch ``f = branch_indices[b, t, a]``
    and gets ``gates[b, t, a] * softmax(scale q k_f^T) v_f`` over the keys of this branch that the
    token sees: those of its sequence or document, and if causal none after it. ``lse`` is that of
    these scores; the gate does not enter.

    A slot is inactive where its index is -1 or its gate is exactly 0, and where its token lies
    outside the sequence: ``out = 0``, ``lse = -inf`` and no gradient, not even to the gate. Other
    gates may have any value and need not sum to 1. NaN in a key or value that no active slot sees,
    or in the query of an inactive slot, does not reach the output.

    Args:
        query: ``[B, A, H, T, D]``, float16, bfloat16, float32 or float64; any strides.
        key: ``[B, F, Hkv, S, D]`` of F branches, where ``Hkv`` divides ``H`` (grouped-query
            attention).
        value: ``[B, F, Hkv, S, Dv]``.
        gates: ``[B, T, A]``, float32 (or float64 with a float64 query).
        branch_indices: int32 or int64 ``[B, T, A]``, from 0 to F - 1, or -1 for an empty slot. None
            means that ``A = F`` and slot ``a`` is in branch ``a``. Values are checked on the CPU;
            on a GPU those out of range are empty.
        is_causal: Whether a query sees only keys at or before its own position.
        seq_start: int32 ``[B]``. Rows and keys before it are empty.
        seq_end: int32 ``[B]``. Rows and keys at or after it are empty.
        cu_seqlens: int32 ``[n + 1]``, the rising bounds ``0 ... S`` of packed documents, with
            ``B = 1``.
        query_offset: Position of the first query among the keys; ``S - T`` in cached decoding.
        scale: Factor of the scores; None means ``1/sqrt(D)``.
        backend: ``"auto"`` (Triton for CUDA tensors, C++ for CPU tensors, the reference for
            float64 and where the extension is not built), ``"triton"``, ``"cpp"`` or
            ``"reference"``. A named backend never falls back.

    Returns:
        ``out [B, A, H, T, Dv]`` in the dtype of ``query`` and ``lse [B, A, H, T]``.

    Raises:
        TypeError: If an argument has the wrong Python type.
        ValueError: If a shape, dtype, device or value does not fit, or ``backend`` is unknown.
        NotImplementedError: If a named backend lacks the dtype, device or head dimension.
        ImportError: If a named backend is not installed.

    Note:
        Differentiable in all floating inputs, through ``out`` and ``lse``; once in Triton and C++.
        The gradient of a gate is the product of the cotangent with the result before the gate.
        Source: Shiftable attention,
        https://github.com/computermaster0101/shiftable-attention-poc. Differs: a token is in some
        branches only, gates may be a token's own, and a causal one sees nothing ahead.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value), ("gates", gates)):
        check_tensor(name, tensor)
    check_floating("query", query)
    query, key, value = map(autocast, (query, key, value))
    _check_branches(query, key, value)
    _check_slots(query, gates, branch_indices, key.shape[1])
    check_bool("is_causal", is_causal)
    check_int("query_offset", query_offset, 0)
    sequence_lengths(
        *(query[:, 0], key.shape[3], cu_seqlens, seq_start, seq_end, query_offset), wanted_for=None
    )
    args = BranchAttentionArgs(
        query=query,
        key=key,
        value=value,
        gates=gates,
        indices=None if branch_indices is None else branch_indices.int(),
        cu_seqlens=cu_seqlens,
        seq_start=seq_start,
        seq_end=seq_end,
        is_causal=is_causal,
        query_offset=query_offset,
        scale=check_scale(scale, query.shape[-1]),
    )
    match resolve_backend(backend, query, operator="branch_attention"):
        case "triton":
            from memattn_kernels.branch_attention import branch_attention as impl
        case "cpp":
            from memattn.cpp.branch_attention import branch_attention as impl
        case "reference":
            from memattn.reference.branch_attention import branch_attention as impl
    return AttentionOutput(*impl(args))


def _check_branches(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise unless queries, keys and values fit each other."""
    check_rank("query", query, "B A H T D")
    check_rank("key", key, "B F Hkv S D")
    B, A = query.shape[:2]
    F, Hkv, S = key.shape[1:4]
    check_shape("key", key, B=B, F=None, Hkv=None, S=None, D=query.shape[-1])
    check_shape("value", value, B=B, F=F, Hkv=Hkv, S=S, Dv=None)
    for name, sized, size in (("query", "slot", A), ("key", "branch", F)):
        if size == 0:
            must(name, f"have at least one {sized}", 0)
    check_heads(query[:, 0], "key", key, 2)
    check_like("key", key, "query", query)
    check_like("value", value, "query", query)


def _check_slots(query: Tensor, gates: Tensor, indices: Tensor | None, F: int) -> None:
    """Raise unless every slot of every token has a gate and a branch."""
    B, A, _, T, _ = query.shape
    check_shape("gates", gates, B=B, T=T, A=A)
    check_factor("gates", gates, query)
    if indices is None:
        if A != F:
            must("query", f"have A={F} slots, one for each branch, without branch_indices", A)
        return
    check_tensor("branch_indices", indices)
    check_indices("branch_indices", indices, query)
    check_shape("branch_indices", indices, B=B, T=T, A=A)
    check_index_range("branch_indices", indices, "F", F)
