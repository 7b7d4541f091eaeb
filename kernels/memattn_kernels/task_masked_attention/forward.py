"""Forward of task-masked attention: one program per tile of queries.

    out = softmax(scale * Q K^T + M) V,  lse = log of the softmax's sum

with ``M`` zero where the task of the sequence allows a pair, else minus infinity. Rows must have
adjacent elements; all other strides are free.
"""

import triton
import triton.language as tl

from memattn_kernels._common import (
    exponent_factor,
    finish_softmax,
    load_tile,
    online_softmax_step,
    store_tile,
)
from memattn_kernels._launch import common_inputs, forward_outputs, launch_queries
from memattn_kernels._operator import Named
from memattn_kernels._products import dot
from memattn_kernels.signatures import TaskMaskedAttentionArgs
from memattn_kernels.task_masked_attention.tiles import (
    TILE,
    bounds_of_sequence,
    empty_rows_before,
    key_bits,
    listed_steps,
    load_allowed,
    load_rows,
    masked_step,
    query_bits,
    seen_keys,
    step_tile,
)

# what changes from mask to mask: compile once for all values
RUNTIME_SIZES = ("T", "S", "HM", "n_query_tiles", "n_key_tiles", "n_nodes", "n_words")


@triton.jit
def steps_of_queries(tiles_ptr, counts_ptr, mask_head, t, n_queries, n_keys, n_query_tiles,
                     n_key_tiles, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                     IS_CAUSAL: tl.constexpr):  # fmt: skip
    """For a tile of queries from row ``t``: how far each sees, offset in lists, and its steps."""
    i = t + tl.arange(0, BLOCK_M)
    whole_last = n_keys
    last = n_keys
    hi = n_keys + 0 * i
    if IS_CAUSAL:
        whole_last = tl.minimum(n_keys, t + 1)
        last = tl.minimum(n_keys, t + BLOCK_M)
        hi = tl.minimum(n_keys, i + 1)
    hi = tl.where(i < n_queries, hi, 0)
    whole_last = tl.where(t < n_queries, whole_last, 0)
    last = tl.where(t < n_queries, last, 0)
    row = mask_head * n_query_tiles + t // TILE
    steps = listed_steps(
        tiles_ptr, counts_ptr, row, n_key_tiles, 0, 0, whole_last, last, BLOCK_N, False
    )
    return hi, row * n_key_tiles, steps


@triton.jit
def allowed_to_queries(n, tile, is_partial, hi, bits, mask, BLOCK_N: tl.constexpr):
    """Whether each query sees each key of a step from column ``n``."""
    bits_ptr, slots_ptr, slot, key_node_ptr, S, n_words = mask
    word, words, bit = bits
    row, offsets = key_bits(key_node_ptr, n, S, n_words, BLOCK_N)
    allowed = load_allowed(
        bits_ptr, slots_ptr, slot + tile, word + row, words[:, None] + offsets[None, :],
        bit[:, None], is_partial,
    )  # fmt: skip
    return allowed & ((n + tl.arange(0, BLOCK_N))[None, :] < hi[:, None])


@triton.jit
def load_seen_rows(ptr, n, stride, n_keys, tile, is_partial, queries, mask, WIDTH: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
                   IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Keys or values of a step, zero where no query of the tile sees them, if the mask has slots.

    A graph's words do not tell that: the caller must look at the weights.
    """
    bits_ptr, slots_ptr, slot, key_node_ptr, S, n_words = mask
    if MASKED and slots_ptr is not None:
        t, n_queries = queries
        seen = seen_keys(
            bits_ptr, slots_ptr, slot + tile, n, n_keys, t, n_queries, is_partial,
            BLOCK_M, BLOCK_N, IS_CAUSAL,
        )  # fmt: skip
        return load_rows(ptr, n, stride, seen, WIDTH, BLOCK_N, BLOCK_WIDTH)
    else:
        return load_tile(ptr, n, stride, n_keys, WIDTH, BLOCK_N, BLOCK_WIDTH, MASKED)


@triton.jit
def _attend_step(acc, l_i, m_i, q, k_ptr, v_ptr, stride_k, stride_v, n_keys, tiles_ptr, step,
                 is_partial, hi, bits, mask, queries, scale, D: tl.constexpr, DV: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                 IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Add the keys of one step to the running softmax."""
    tile, n = step_tile(tiles_ptr, step, BLOCK_N)
    k = load_tile(k_ptr, n, stride_k, n_keys, D, BLOCK_N, BLOCK_D, MASKED)
    scores = dot(q, tl.trans(k))
    if MASKED:
        allowed = allowed_to_queries(n, tile, is_partial, hi, bits, mask, BLOCK_N)
        scores = tl.where(allowed, scores, -float("inf"))
    HAS_SLOTS: tl.constexpr = mask[1] is not None
    v = load_seen_rows(
        v_ptr, n, stride_v, n_keys, tile, is_partial, queries, mask,
        DV, BLOCK_N, BLOCK_DV, acc.shape[0], IS_CAUSAL, MASKED,
    )  # fmt: skip
    return online_softmax_step(acc, l_i, m_i, scores, v, scale, MASKED and not HAS_SLOTS)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def task_masked_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, task_ptr, seq_start_ptr, seq_end_ptr,  # inputs; bounds may be None
    bits_ptr, slots_ptr, query_node_ptr, key_node_ptr, tiles_ptr, counts_ptr,  # mask
    o_ptr, lse_ptr, residual_ptr,  # outputs
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot,
    H, G, HM, T, S, n_query_tiles, n_key_tiles, n_nodes, n_words, scale,  # sizes
    IS_CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(T, BLOCK_M) * B * H,). One program computes BLOCK_M queries of one head.

    It also empties as many rows before the sequence.
    """
    n_tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    t = pid % n_tiles * BLOCK_M
    if IS_CAUSAL:  # the longest rows first
        t = (n_tiles - 1 - pid % n_tiles) * BLOCK_M
    b = (pid // n_tiles // H).to(tl.int64)
    h = (pid // n_tiles % H).to(tl.int64)

    # what each row sees
    start, n_queries, n_keys = bounds_of_sequence(b, seq_start_ptr, seq_end_ptr, T, S)
    mask_head = tl.load(task_ptr + b).to(tl.int64) * HM + h % HM
    hi, slot, steps = steps_of_queries(
        tiles_ptr, counts_ptr, mask_head, t, n_queries, n_keys, n_query_tiles, n_key_tiles,
        BLOCK_M, BLOCK_N, IS_CAUSAL,
    )  # fmt: skip
    tiles_ptr, before, whole_first, whole_last, full_last, partial, n_masked = steps
    i = t + tl.arange(0, BLOCK_M)
    bits = query_bits(query_node_ptr, t, T, BLOCK_M)

    q_ptr += b * stride_qb + h * stride_qh
    q = load_tile(q_ptr, start + t, stride_qt, start + n_queries, D, BLOCK_M, BLOCK_D, True)
    k_ptr += b * stride_kb + h // G * stride_kh + start.to(tl.int64) * stride_kt
    v_ptr += b * stride_vb + h // G * stride_vh + start.to(tl.int64) * stride_vt
    scale *= exponent_factor(q.dtype)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    mask = (bits_ptr + mask_head * n_nodes * n_words, slots_ptr, slot, key_node_ptr, S, n_words)
    for index in range(n_masked):
        step, is_partial = masked_step(index, before, whole_first, whole_last, full_last, partial)
        acc, l_i, m_i = _attend_step(
            acc, l_i, m_i, q, k_ptr, v_ptr, stride_kt, stride_vt, n_keys, tiles_ptr, step,
            is_partial, hi, bits, mask, (t, n_queries), scale,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, IS_CAUSAL, True,
        )  # fmt: skip
    for index in range(whole_last - whole_first):
        acc, l_i, m_i = _attend_step(
            acc, l_i, m_i, q, k_ptr, v_ptr, stride_kt, stride_vt, n_keys, tiles_ptr,
            whole_first + index, False, hi, bits, mask, (t, n_queries), scale,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, IS_CAUSAL, False,
        )  # fmt: skip

    # written anew: ``i < n_queries`` would hold a register through the loops
    valid = start + i < start + n_queries
    out, lse, residual = finish_softmax(acc, l_i, m_i, valid, q.dtype)
    o_ptr += b * stride_ob + h * stride_oh
    row = (b * H + h) * T
    store_tile(o_ptr, start + t, stride_ot, T, out, DV, BLOCK_M, BLOCK_DV)
    tl.store(lse_ptr + row + start + i, lse, mask=start + i < T)
    if residual_ptr is not None:
        tl.store(residual_ptr + row + start + i, residual, mask=start + i < T)
    if seq_start_ptr is not None:
        empty_rows_before(o_ptr, t, stride_ot, tl.minimum(start, T), DV, BLOCK_M, BLOCK_DV)
        tl.store(lse_ptr + row + i, float("-inf"), mask=i < tl.minimum(start, T))
        if residual_ptr is not None:
            tl.store(residual_ptr + row + i, 0.0, mask=i < tl.minimum(start, T))


def kernel_inputs(args: TaskMaskedAttentionArgs) -> dict:
    """Arguments that the kernels share, by name, with the lists of tiles of queries."""
    n_tasks, HM, n_query_tiles, n_key_tiles = args.query_tiles.shape
    return common_inputs(args) | dict(
        task_ptr=args.task_id.contiguous(),
        bits_ptr=args.bits,
        slots_ptr=args.slots,
        query_node_ptr=args.query_node,
        key_node_ptr=args.key_node,
        tiles_ptr=args.query_tiles,
        counts_ptr=args.query_counts,
        HM=HM,
        n_query_tiles=n_query_tiles,
        n_key_tiles=n_key_tiles,
        n_nodes=0 if args.query_node is None else args.bits.shape[0] // (n_tasks * HM),
        n_words=args.bits.shape[1],
        IS_CAUSAL=args.is_causal,
    )


def launch_forward(args: TaskMaskedAttentionArgs, results: Named) -> None:
    """Fill ``out``, ``lse`` and, for float32 inputs, what float32 rounds off ``lse``."""
    inputs = kernel_inputs(args) | forward_outputs(results)
    launch_queries(task_masked_attention_fwd_kernel, "task_masked_attention_fwd", inputs)
