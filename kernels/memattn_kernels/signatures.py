"""The arguments of every operator, checked and in order: what all backends take.

A signature is written here and nowhere else: the schemas of the Triton and the C++ operators are
made from it (``_operator``), and one tuple travels from ``memattn.ops`` to the reference, to Triton
and to C++. ``gradients`` names the arguments with a gradient, in the order in which both backends
return them. What the arguments mean is said by the functions of ``memattn.ops``.
"""

from typing import NamedTuple

from torch import Tensor


class SegmentedAttentionArgs(NamedTuple):
    """Arguments of segmented attention."""

    gradients = "query key value persistent_key persistent_value memory_key memory_value"

    query: Tensor  # [B, H, T, D]
    key: Tensor  # [B, Hkv, S, D]
    value: Tensor  # [B, Hkv, S, Dv]
    persistent_key: Tensor | None  # [Hkv, P, D]
    persistent_value: Tensor | None  # [Hkv, P, Dv]
    memory_key: Tensor | None  # [B, Hkv, n_segments, M, D]
    memory_value: Tensor | None  # [B, Hkv, n_segments, M, Dv]
    cu_seqlens: Tensor | None  # int32 [n + 1]
    seq_start: Tensor | None  # int32 [B]
    seq_end: Tensor | None  # int32 [B]
    segment_len: int | None
    window_size: int | None
    num_sink_tokens: int | None  # beside a segment or a window; None for none
    is_causal: bool
    memory_is_causal: bool
    query_offset: int
    scale: float
    softcap: float | None  # scores are softcap * tanh(scale * q k / softcap); None for no cap


class FutureAttentionArgs(NamedTuple):
    """Arguments of future attention, with or without its loss."""

    gradients = "query key value future_key future_value future_query"

    query: Tensor  # [B, H, T, D]
    key: Tensor  # [B, Hkv, S, D]
    value: Tensor  # [B, Hkv, S, Dv]
    future_key: Tensor  # [Hf, R, D] or [B, Hf, R, D]
    future_value: Tensor  # the same with Dv
    future_query: Tensor | None  # [B, H, T, D]
    cu_seqlens: Tensor | None  # int32 [n + 1]
    seq_start: Tensor | None  # int32 [B]
    seq_end: Tensor | None  # int32 [B]
    table_len: int  # R, or a part of it: then each document has its own rows
    by_distance: bool
    future_dim: int
    query_offset: int
    scale: float
    loss_type: str | None  # None: without a loss
    detach_target: bool


class TaskMaskedAttentionArgs(NamedTuple):
    """Arguments of task-masked attention; from ``bits`` on those of a mask, ``MaskTensors``."""

    gradients = "query key value"

    query: Tensor  # [B, H, T, D]
    key: Tensor  # [B, Hkv, S, D]
    value: Tensor  # [B, Hkv, S, Dv]
    task_id: Tensor  # int32 [B]
    bits: Tensor
    slots: Tensor | None
    query_node: Tensor | None
    key_node: Tensor | None
    query_tiles: Tensor
    query_counts: Tensor
    key_tiles: Tensor
    key_counts: Tensor
    seq_start: Tensor | None  # int32 [B]
    seq_end: Tensor | None  # int32 [B]
    is_causal: bool
    scale: float


class ChapterAttentionArgs(NamedTuple):
    """Arguments of attention to selected chapters; a chapter is ``key[c]`` and ``value[c]``."""

    gradients = "query key value weights"

    query: Tensor  # [B, H, T, D]
    key: Tensor  # [C, Hkv, M, D]; int8, or uint8 with D / 2 pairs of four bits
    value: Tensor  # [C, Hkv, M, Dv], the same
    indices: Tensor  # int32 [B, N, K], -1 is empty
    weights: Tensor | None  # float32 [B, N, K]
    key_scale: Tensor | None  # float32 [C, Hkv, M] of quantised keys
    value_scale: Tensor | None  # float32 [C, Hkv, M] of quantised values
    row_start: Tensor  # int32 [B, N], first query of each routing row
    row_end: Tensor  # int32 [B, N], the query after its last; rows rise and do not overlap
    row_len: int  # no routing row has more queries
    value_dim: int  # Dv
    is_joint: bool
    scale: float


class ChapterRouterArgs(NamedTuple):
    """Arguments of the router of chapters."""

    gradients = "hidden weight bias"

    hidden: Tensor  # [B, N, E]
    weight: Tensor  # [C - num_shared, E]
    bias: Tensor | None  # [C - num_shared]
    valid: Tensor | None  # bool [B, N]
    top_k: int
    num_shared: int
    temperature: float
    routed_scale: float
    is_mean: bool  # the load-balance loss is 1 at balance, else top_k


class BranchAttentionArgs(NamedTuple):
    """Arguments of attention in branches; a slot of a token is in one of them."""

    gradients = "query key value gates"

    query: Tensor  # [B, A, H, T, D]
    key: Tensor  # [B, F, Hkv, S, D]
    value: Tensor  # [B, F, Hkv, S, Dv]
    gates: Tensor  # float32 [B, T, A]
    indices: Tensor | None  # int32 [B, T, A], -1 is empty; None: A = F and slot a is in branch a
    cu_seqlens: Tensor | None  # int32 [n + 1]
    seq_start: Tensor | None  # int32 [B]
    seq_end: Tensor | None  # int32 [B]
    is_causal: bool
    query_offset: int
    scale: float


class NeuralMemoryArgs(NamedTuple):
    """Arguments of the neural memory. A row is a sequence or a packed document; R of them.

    ``start_weights`` and ``start_momentum`` are packed: layer by layer, each ``[d_n, d_{n-1}]`` in
    row-major order, P numbers in all. Pending rows are those of the open chunk's tokens, the layers
    beside each other: PH is the sum of ``d_0 ... d_{N-1}``, PD that of ``d_1 ... d_N``.
    """

    gradients = (
        "query key value lr momentum decay start_weights start_momentum "
        "pending_h pending_delta pending_decay pending_momentum"
    )

    query: Tensor  # [B, H, T, D]
    key: Tensor  # [B, H, T, D]
    value: Tensor  # [B, H, T, Dv]
    lr: Tensor  # float32 [B, H, T], as all that follow
    momentum: Tensor | None  # [B, H, T]; None: no momentum is kept
    decay: Tensor | None  # [B, H, T]; None: 0
    start_weights: Tensor  # [R, H, P], or [1, H, P] for all rows
    start_momentum: Tensor | None  # [R, H, P]; None: 0
    pending_h: Tensor | None  # [R, H, chunk_size - 1, PH]; all that is pending, or none of it
    pending_delta: Tensor | None  # [R, H, chunk_size - 1, PD]
    pending_decay: Tensor | None  # [R, H, chunk_size - 1]
    pending_momentum: Tensor | None  # [R, H, chunk_size - 1]; not read without momentum
    count: Tensor | None  # int32 [R], pending tokens; what stands after them may be anything
    skipped: Tensor | None  # int64 [R]
    row_start: Tensor | None  # int32 [R], first token of each row, from 0 to T; None: 0
    row_end: Tensor | None  # int32 [R], the token after its last; None: T
    width_1: int  # d_1 ... d_3 as far as they are hidden, else 0
    width_2: int
    width_3: int
    depth: int
    chunk_size: int
    read_chunk: bool  # reads use the weights at the start of a chunk
    is_silu: bool  # else GELU, the erf form
    residual: bool
    is_huber: bool
    huber_delta: float
    max_norm: float | None
    clamp_soft: bool
    skip_nonfinite: bool
    return_state: bool


class NeuralMemoryStepArgs(NamedTuple):
    """Arguments of one token of the neural memory, for decoding, without gradients.

    The pending tensors are written in place at row ``count`` (not where a chunk ends); weights are
    written only where a chunk ends.
    """

    query: Tensor  # [B, H, 1, D]
    key: Tensor  # [B, H, 1, D]
    value: Tensor  # [B, H, 1, Dv]
    lr: Tensor  # float32 [B, H, 1], as all that follow
    momentum: Tensor | None  # [B, H, 1]
    decay: Tensor | None  # [B, H, 1]
    start_weights: Tensor  # [B, H, P]
    start_momentum: Tensor | None  # [B, H, P]
    pending_h: Tensor  # [B, H, chunk_size - 1, PH], contiguous
    pending_delta: Tensor  # [B, H, chunk_size - 1, PD], contiguous
    pending_decay: Tensor  # [B, H, chunk_size - 1], contiguous
    pending_momentum: Tensor  # [B, H, chunk_size - 1], contiguous
    count: Tensor  # int32 [B]
    skipped: Tensor  # int64 [B]
    width_1: int
    width_2: int
    width_3: int
    depth: int
    chunk_size: int
    read_chunk: bool
    is_silu: bool
    residual: bool
    is_huber: bool
    huber_delta: float
    max_norm: float | None
    clamp_soft: bool
    skip_nonfinite: bool
    fold: bool  # whether the chunk of a row may end with this token
