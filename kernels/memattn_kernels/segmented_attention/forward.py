"""Forward of segmented attention: one program per tile of queries.

    out = softmax(scale * [Q Kp^T, Q Km^T, Q K^T]) [Vp; Vm; V],  lse = log of the softmax's sum

over the persistent, memory and token keys that each query sees. Rows must have adjacent elements;
all other strides are free.
"""

import triton
import triton.language as tl

from memattn_kernels import configs
from memattn_kernels._common import (
    MAX_LENGTH,
    finish_softmax,
    load_tile,
    rows,
    score_scale,
    sequence_of,
    store_tile,
)
from memattn_kernels._launch import common_inputs, forward_outputs, launch_queries, lookup
from memattn_kernels._operator import Named
from memattn_kernels._tiles import attend
from memattn_kernels.segmented_attention.decode_parts import launch_decode_parts
from memattn_kernels.segmented_attention.forward_plain import launch_forward_plain
from memattn_kernels.segmented_attention.intervals import (
    document_table,
    memory_of_query,
    tokens_of_query,
)
from memattn_kernels.segmented_attention.plain import plain_config, plain_form
from memattn_kernels.segmented_attention.sinks import attend_sinks
from memattn_kernels.signatures import SegmentedAttentionArgs

# lengths that change from call to call: compile once for all their values
RUNTIME_SIZES = ("T", "S", "P", "M", "n_memory", "L", "W", "n_sinks", "query_offset")


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def segmented_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, mk_ptr, mv_ptr,  # inputs
    documents_ptr, seq_start_ptr, seq_end_ptr,  # bounds of sequences, or None
    o_ptr, lse_ptr, residual_ptr,  # outputs
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_pkh, stride_pkt, stride_pvh, stride_pvt,
    stride_mkb, stride_mkh, stride_mkt, stride_mvb, stride_mvh, stride_mvt,
    stride_ob, stride_oh, stride_ot,
    H, G, T, S, P, M, n_memory, L, W, n_sinks, query_offset, scale, softcap,  # sizes
    IS_CAUSAL: tl.constexpr, MEMORY_IS_CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_NP: tl.constexpr,
    BLOCK_NM: tl.constexpr, BLOCK_NS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
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
    cap_scale = softcap
    if softcap is not None:
        cap_scale = scale / softcap
    scale = score_scale(scale, softcap, q.dtype)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)

    HAS_BOUNDS: tl.constexpr = seq_start_ptr is not None or seq_end_ptr is not None
    HAS_MORE_KEYS: tl.constexpr = pk_ptr is not None or mk_ptr is not None or n_sinks is not None
    IS_PLAIN: tl.constexpr = BLOCK_D <= 128 and not HAS_BOUNDS and not HAS_MORE_KEYS
    if pk_ptr is not None:
        lo = tl.zeros([BLOCK_M], dtype=tl.int32)
        acc, l_i, m_i = attend(
            acc, l_i, m_i, q, pk_ptr + h_kv * stride_pkh, pv_ptr + h_kv * stride_pvh,
            stride_pkt, stride_pvt, lo, lo + P, valid, scale,
            D, DV, BLOCK_NP, BLOCK_D, BLOCK_DV, IS_PLAIN, False, cap_scale,
        )  # fmt: skip
    if mk_ptr is not None:
        lo, hi = memory_of_query(i, start, first_segment, n_memory, L, M, MEMORY_IS_CAUSAL)
        acc, l_i, m_i = attend(
            acc, l_i, m_i, q, mk_ptr + b * stride_mkb + h_kv * stride_mkh,
            mv_ptr + b * stride_mvb + h_kv * stride_mvh, stride_mkt, stride_mvt,
            lo, hi, valid, scale, D, DV, BLOCK_NM, BLOCK_D, BLOCK_DV, IS_PLAIN, False,
            cap_scale,
        )  # fmt: skip
    if n_sinks is not None:
        acc, l_i, m_i = attend_sinks(
            acc, l_i, m_i, q, k_ptr + b * stride_kb + h_kv * stride_kh,
            v_ptr + b * stride_vb + h_kv * stride_vh, stride_kt, stride_vt, i, start, end, S, L, W,
            n_sinks, True, valid, scale, IS_CAUSAL, documents_ptr is not None,
            D, DV, BLOCK_NS, BLOCK_D, BLOCK_DV, cap_scale,
        )  # fmt: skip
    lo, hi = tokens_of_query(i, start, end, S, L, W, n_sinks, IS_CAUSAL)
    acc, l_i, m_i = attend(
        acc, l_i, m_i, q, k_ptr + b * stride_kb + h_kv * stride_kh,
        v_ptr + b * stride_vb + h_kv * stride_vh, stride_kt, stride_vt,
        lo, hi, valid, scale, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, IS_PLAIN, True, cap_scale,
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


def kernel_inputs(args: SegmentedAttentionArgs) -> dict:
    """Arguments that the kernels share, by name."""
    memory_key = args.memory_key
    S, M = args.key.shape[2], 0 if memory_key is None else memory_key.shape[3]
    inputs = common_inputs(args)
    inputs |= rows("pk", args.persistent_key, "ht") | rows("pv", args.persistent_value, "ht")
    # [B, Hkv, n_segments, M, D] is walked as rows [B, Hkv, n_segments * M, D]
    for name, memory in (("mk", memory_key), ("mv", args.memory_value)):
        inputs |= rows(name, None if memory is None else memory.flatten(2, 3), "bht")
    cu_seqlens, L, W = args.cu_seqlens, args.segment_len, args.window_size
    n_sinks = args.num_sink_tokens
    return inputs | dict(
        documents_ptr=None if cu_seqlens is None else document_table(cu_seqlens, S, L),
        P=0 if args.persistent_key is None else args.persistent_key.shape[1],
        M=M,
        n_memory=0 if memory_key is None else memory_key.shape[2] * M,
        L=None if L is None else min(L, MAX_LENGTH),
        W=None if W is None else min(W, MAX_LENGTH),
        n_sinks=None if n_sinks is None else min(n_sinks, S),
        query_offset=args.query_offset,
        softcap=args.softcap,
        IS_CAUSAL=args.is_causal,
        MEMORY_IS_CAUSAL=args.memory_is_causal,
    )


def tile_lengths(inputs: dict) -> dict[str, int]:
    """Keys of the sources that have a tile of their own, by its argument's name."""
    return dict(BLOCK_NP=inputs["P"], BLOCK_NM=inputs["M"], BLOCK_NS=inputs["n_sinks"] or 0)


def launch_forward(args: SegmentedAttentionArgs, results: Named) -> None:
    """Fill ``out``, ``lse`` and, for float32 inputs, what float32 rounds off ``lse``."""
    inputs = kernel_inputs(args) | forward_outputs(results)
    if args.query.shape[2] > configs.DECODE_LENGTH:
        whole = None if args.is_causal else "S"
        name, config = plain_config("segmented_attention_fwd", plain_form(args), inputs, whole)
        run = launch_forward_plain
    else:
        name = configs.WITH_PARTS
        config = lookup(name, args.query, inputs)
        config, run = config if "part" in config else None, launch_decode_parts
    if config is not None:
        run(inputs, config)
    else:
        launch_queries(segmented_attention_fwd_kernel, name, inputs, **tile_lengths(inputs))
