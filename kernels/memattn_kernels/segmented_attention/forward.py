"""Forward of segmented attention: one program per tile of queries.

    out = softmax(scale * [Q Kp^T, Q Km^T, Q K^T]) [Vp; Vm; V],  lse = log of the softmax's sum

over the persistent, memory and token keys that each query sees. Rows must have adjacent elements;
all other strides are free.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memattn_kernels import configs
from memattn_kernels._common import (
    IS_INTERPRETED,
    MAX_LENGTH,
    block_length,
    block_width,
    check_head_dim,
    device_guard,
    empty_rows,
    exponent_factor,
    finish_softmax,
    load_tile,
    rows,
    rows_ready,
    sequence_of,
    store_tile,
)
from memattn_kernels._tiles import attend
from memattn_kernels.segmented_attention.intervals import (
    document_table,
    memory_of_query,
    tokens_of_query,
)

# lengths that change from call to call: compile once for all their values
RUNTIME_SIZES = ("T", "S", "P", "M", "n_memory", "L", "W", "query_offset")


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def segmented_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, mk_ptr, mv_ptr,  # inputs
    documents_ptr, seq_start_ptr, seq_end_ptr,  # bounds of sequences, or None
    o_ptr, lse_ptr, residual_ptr,  # outputs
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_pkh, stride_pkt, stride_pvh, stride_pvt,
    stride_mkb, stride_mkh, stride_mkt, stride_mvb, stride_mvh, stride_mvt,
    stride_ob, stride_oh, stride_ot,
    H, G, T, S, P, M, n_memory, L, W, query_offset, scale,  # sizes
    IS_CAUSAL: tl.constexpr, MEMORY_IS_CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_NP: tl.constexpr,
    BLOCK_NM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(T, BLOCK_M) * B * H,). One program computes BLOCK_M queries of one head."""
    n_tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    pid_m = pid % n_tiles
    if IS_CAUSAL:  # the longest rows first
        pid_m = n_tiles - 1 - pid_m
    b = (pid // n_tiles // H).to(tl.int64)
    h = (pid // n_tiles % H).to(tl.int64)
    h_kv = h // G

    # what each row sees
    t = pid_m * BLOCK_M
    offs_m = t + tl.arange(0, BLOCK_M)
    i = query_offset + offs_m
    start, end, first_segment = sequence_of(i, b, documents_ptr, seq_start_ptr, seq_end_ptr, S)
    valid = (offs_m < T) & (i >= start) & (i < end)
    q = load_tile(q_ptr + b * stride_qb + h * stride_qh, t, stride_qt, T, D, BLOCK_M, BLOCK_D, True)
    scale *= exponent_factor(q.dtype)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)

    HAS_BOUNDS: tl.constexpr = seq_start_ptr is not None or seq_end_ptr is not None
    HAS_MORE_KEYS: tl.constexpr = pk_ptr is not None or mk_ptr is not None
    IS_PLAIN: tl.constexpr = BLOCK_D <= 128 and not HAS_BOUNDS and not HAS_MORE_KEYS
    if pk_ptr is not None:
        lo = tl.zeros([BLOCK_M], dtype=tl.int32)
        acc, l_i, m_i = attend(
            acc, l_i, m_i, q, pk_ptr + h_kv * stride_pkh, pv_ptr + h_kv * stride_pvh,
            stride_pkt, stride_pvt, lo, lo + P, valid, scale,
            D, DV, BLOCK_NP, BLOCK_D, BLOCK_DV, IS_PLAIN, False,
        )  # fmt: skip
    if mk_ptr is not None:
        lo, hi = memory_of_query(i, start, first_segment, n_memory, L, M, MEMORY_IS_CAUSAL)
        acc, l_i, m_i = attend(
            acc, l_i, m_i, q, mk_ptr + b * stride_mkb + h_kv * stride_mkh,
            mv_ptr + b * stride_mvb + h_kv * stride_mvh, stride_mkt, stride_mvt,
            lo, hi, valid, scale, D, DV, BLOCK_NM, BLOCK_D, BLOCK_DV, IS_PLAIN, False,
        )  # fmt: skip
    lo, hi = tokens_of_query(i, start, end, S, L, W, IS_CAUSAL)
    acc, l_i, m_i = attend(
        acc, l_i, m_i, q, k_ptr + b * stride_kb + h_kv * stride_kh,
        v_ptr + b * stride_vb + h_kv * stride_vh, stride_kt, stride_vt,
        lo, hi, valid, scale, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, IS_PLAIN, True,
    )  # fmt: skip

    if IS_PLAIN and documents_ptr is None:
        # written anew: ``valid`` would hold a register through the loops
        valid = (i < query_offset + T) & (offs_m >= start - query_offset)
        valid &= offs_m < end - query_offset
    out, lse, residual = finish_softmax(acc, l_i, m_i, valid, q.dtype)
    o_ptr += b * stride_ob + h * stride_oh
    store_tile(o_ptr, t, stride_ot, T, out, DV, BLOCK_M, BLOCK_DV)
    row = (b * H + h) * T + offs_m
    tl.store(lse_ptr + row, lse, mask=offs_m < T)
    if residual_ptr is not None:
        tl.store(residual_ptr + row, residual, mask=offs_m < T)


def kernel_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    persistent_key: Tensor | None,
    persistent_value: Tensor | None,
    memory_key: Tensor | None,
    memory_value: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    segment_len: int | None,
    window_size: int | None,
    query_offset: int,
    scale: float,
) -> dict:
    """Arguments that the forward and the query-stationary backward kernel share, by name."""
    query, key, value = (rows_ready(t) for t in (query, key, value))
    B, H, T, D = query.shape
    S, M = key.shape[2], 0
    inputs = {
        **rows("q", query, "bht"),
        **rows("k", key, "bht"),
        **rows("v", value, "bht"),
        **rows("pk", persistent_key, "ht"),
        **rows("pv", persistent_value, "ht"),
    }
    # [B, Hkv, n_segments, M, D] is walked as rows [B, Hkv, n_segments * M, D]
    for name, memory in (("mk", memory_key), ("mv", memory_value)):
        if memory is not None:
            M = memory.shape[3]
            memory = memory.flatten(2, 3)
        inputs |= rows(name, memory, "bht")
    documents = None if cu_seqlens is None else document_table(cu_seqlens, S, segment_len)
    inputs |= dict(
        documents_ptr=documents,
        seq_start_ptr=None if seq_start is None else seq_start.contiguous(),
        seq_end_ptr=None if seq_end is None else seq_end.contiguous(),
        H=H,
        G=H // max(key.shape[1], 1),
        T=T,
        S=S,
        P=0 if persistent_key is None else persistent_key.shape[1],
        M=M,
        n_memory=0 if memory_key is None else memory_key.shape[2] * M,
        L=None if segment_len is None else min(segment_len, MAX_LENGTH),
        W=None if window_size is None else min(window_size, MAX_LENGTH),
        query_offset=query_offset,
        scale=scale,
        D=D,
        DV=value.shape[-1],
        BLOCK_D=block_width(D),
        BLOCK_DV=block_width(value.shape[-1]),
    )
    return inputs


@torch.library.custom_op("memattn_kernels::segmented_attention", mutates_args=())
def segmented_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    persistent_key: Tensor | None,
    persistent_value: Tensor | None,
    memory_key: Tensor | None,
    memory_value: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    segment_len: int | None,
    window_size: int | None,
    is_causal: bool,
    memory_is_causal: bool,
    query_offset: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``out``, ``lse`` and, for float32 inputs, what float32 rounds off ``lse`` (else size 0)."""
    out, lse, residual = _empty_outputs(query, value)
    if lse.numel() == 0:
        return out, lse, residual
    inputs = kernel_inputs(
        *(query, key, value, persistent_key, persistent_value, memory_key, memory_value),
        *(cu_seqlens, seq_start, seq_end, segment_len, window_size, query_offset, scale),
    )
    B, H, T, _ = query.shape
    kernel = "fwd" if T > configs.DECODE_LENGTH else "decode"
    tiles = row_tiles(f"segmented_attention_{kernel}", query, inputs)
    with device_guard(query):
        segmented_attention_fwd_kernel[(triton.cdiv(T, tiles["BLOCK_M"]) * B * H,)](
            **inputs,
            **tiles,
            **rows("o", out, "bht"),
            lse_ptr=lse,
            residual_ptr=residual if query.dtype == torch.float32 else None,
            IS_CAUSAL=is_causal,
            MEMORY_IS_CAUSAL=memory_is_causal,
        )
    return out, lse, residual


@segmented_attention_op.register_fake
def _(query, key, value, *rest):
    return _empty_outputs(query, value)


def _empty_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised ``out``, ``lse`` and residual."""
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    residual = torch.empty_like(lse) if query.dtype == torch.float32 else lse.new_empty(0)
    return empty_rows(query, value.shape[-1]), lse, residual


def row_tiles(kernel: str, query: Tensor, inputs: dict) -> dict:
    """Tile lengths and launch options of a query-stationary kernel, by argument name."""
    config = configs.lookup(kernel, query, max(inputs["BLOCK_D"], inputs["BLOCK_DV"]))
    block_n = config["BLOCK_N"]
    return {
        **config,
        "BLOCK_NP": block_length(block_n, inputs["P"]),
        "BLOCK_NM": block_length(block_n, inputs["M"]),
    }


def segmented_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    persistent_key: Tensor | None,
    persistent_value: Tensor | None,
    memory_key: Tensor | None,
    memory_value: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    segment_len: int | None,
    window_size: int | None,
    is_causal: bool,
    memory_is_causal: bool,
    query_offset: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return ``out [B, H, T, Dv]`` and ``lse [B, H, T]``; the arguments are those of the reference.

    Raises:
        NotImplementedError: If a head dimension is above 256.
    """
    check_head_dim("query", query.shape[-1])
    check_head_dim("value", value.shape[-1])
    tensors = [query, key, value, persistent_key, persistent_value, memory_key, memory_value]
    dtype = query.dtype
    if dtype == torch.bfloat16 and IS_INTERPRETED:
        # the interpreter computes bfloat16 wrongly
        tensors = [None if t is None else t.float() for t in tensors]
    out, lse, _ = segmented_attention_op(
        *(*tensors, cu_seqlens, seq_start, seq_end, segment_len, window_size),
        *(is_causal, memory_is_causal, query_offset, scale),
    )
    return out.to(dtype), lse
