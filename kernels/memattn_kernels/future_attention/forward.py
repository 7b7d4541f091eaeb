"""Forward of future attention: one program per tile of queries.

    out_future = P_future V_future,  out = P_past V + out_future,  lse = log of the softmax's sum

with one softmax ``P = softmax(scale * [Q K^T, Q_future K_future^T])`` over past and future keys.
The loss compares ``out_future`` with what the real keys of the same band contribute to a softmax
over past and band: the scores of the past are computed once, and their sum serves both. Rows must
have adjacent elements; all other strides are free.
"""

import torch
import triton
import triton.language as tl

from memattn_kernels import configs
from memattn_kernels._common import (
    exponent_factor,
    finish_softmax,
    load_tile,
    power,
    rows,
    rows_ready,
    sequence_of,
    store_tile,
)
from memattn_kernels._launch import common_inputs, forward_outputs, launch_queries
from memattn_kernels._operator import Named
from memattn_kernels._tiles import attend
from memattn_kernels.future_attention.intervals import (
    ahead_of_query,
    document_table,
    past_of_query,
    rows_of_query,
    table_groups,
)
from memattn_kernels.future_attention.loss import row_loss
from memattn_kernels.signatures import FutureAttentionArgs

# lengths that change from call to call: compile once for all their values
RUNTIME_SIZES = ("T", "S", "table_len", "F", "query_offset")


@triton.jit
def _join(m_a, l_a, m_b, l_b, dtype: tl.constexpr):
    """Softmax state over two sets of keys, and the factors that bring their sums to it."""
    m = tl.maximum(m_a, m_b)
    m_safe = tl.where(m == -float("inf"), 0.0, m)
    factor_a = power(m_a - m_safe, dtype)
    factor_b = power(m_b - m_safe, dtype)
    return m, l_a * factor_a + l_b * factor_b, factor_a, factor_b


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _future_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, fk_ptr, fv_ptr, fq_ptr,  # inputs; fq may be None
    documents_ptr, seq_start_ptr, seq_end_ptr,  # bounds of sequences, or None
    o_ptr, of_ptr, lse_ptr, residual_ptr,  # outputs
    target_ptr, lse_target_ptr, residual_target_ptr, loss_ptr, counts_ptr,  # of the loss, or None
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_fkb, stride_fkh, stride_fkt,
    stride_fvb, stride_fvh, stride_fvt, stride_fqb, stride_fqh, stride_fqt,
    stride_ob, stride_oh, stride_ot, stride_ofb, stride_ofh, stride_oft,
    stride_targetb, stride_targeth, stride_targett,
    H, G, GF, T, S, table_len, F, query_offset, scale,  # sizes
    BY_DISTANCE: tl.constexpr, PER_DOCUMENT: tl.constexpr, IS_COSINE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(T, BLOCK_M) * B * H,). One program computes BLOCK_M queries of one head."""
    n_tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    t = (n_tiles - 1 - pid % n_tiles) * BLOCK_M  # the longest rows first
    b = (pid // n_tiles // H).to(tl.int64)
    h = (pid // n_tiles % H).to(tl.int64)

    offs_m = t + tl.arange(0, BLOCK_M)
    mask_m = offs_m < T
    i = query_offset + offs_m
    start, end, number = sequence_of(i, b, documents_ptr, seq_start_ptr, seq_end_ptr, S)
    valid = mask_m & (i >= start) & (i < end)
    row = (b * H + h) * T + offs_m
    q = load_tile(q_ptr + b * stride_qb + h * stride_qh, t, stride_qt, T, D, BLOCK_M, BLOCK_D, True)
    scale *= exponent_factor(q.dtype)
    k_ptr += b * stride_kb + h // G * stride_kh
    v_ptr += b * stride_vb + h // G * stride_vh

    # float32 is slow enough to mask every tile, and one loop takes fewer registers than two
    HAS_WHOLE_TILES: tl.constexpr = q.dtype != tl.float32
    # every set of keys has a softmax of its own, joined afterwards
    no_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    no_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    lo, hi = past_of_query(i, start, end, S)
    acc, l_past, m_past = attend(
        acc, no_sum, no_max, q, k_ptr, v_ptr, stride_kt, stride_vt,
        lo, hi, valid, scale, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, True, HAS_WHOLE_TILES,
    )  # fmt: skip

    fq = q
    if fq_ptr is not None:
        fq_ptr += b * stride_fqb + h * stride_fqh
        fq = load_tile(fq_ptr, t, stride_fqt, T, D, BLOCK_M, BLOCK_D, True)
    acc_future = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    l_future = no_sum
    m_future = no_max
    lo, hi = rows_of_query(i, start, number, table_len, F, BY_DISTANCE, PER_DOCUMENT)
    group, n_groups = table_groups(
        number, valid, documents_ptr is not None, BY_DISTANCE, PER_DOCUMENT
    )
    for part in range(n_groups):
        acc_future, l_future, m_future = attend(
            acc_future, l_future, m_future, fq, fk_ptr + b * stride_fkb + h // GF * stride_fkh,
            fv_ptr + b * stride_fvb + h // GF * stride_fvh, stride_fkt, stride_fvt,
            lo, tl.where(group == part, hi, lo), valid & (group == part), scale,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, True,
            HAS_WHOLE_TILES and documents_ptr is None,
        )  # fmt: skip

    m, l, factor, factor_future = _join(m_past, l_past, m_future, l_future, q.dtype)
    acc_future *= factor_future[:, None]
    acc = acc * factor[:, None] + acc_future
    out, lse, residual = finish_softmax(acc, l, m, valid, q.dtype)
    out_future, _, _ = finish_softmax(acc_future, l, m, valid, q.dtype)
    out_future = out_future.to(q.dtype)  # fewer registers until the loss
    o_ptr += b * stride_ob + h * stride_oh
    store_tile(o_ptr, t, stride_ot, T, out, DV, BLOCK_M, BLOCK_DV)
    of_ptr += b * stride_ofb + h * stride_ofh
    store_tile(of_ptr, t, stride_oft, T, out_future, DV, BLOCK_M, BLOCK_DV)
    tl.store(lse_ptr + row, lse, mask=mask_m)
    if residual_ptr is not None:
        tl.store(residual_ptr + row, residual, mask=mask_m)

    if loss_ptr is not None:
        lo, hi, whole = ahead_of_query(i, start, end, S, table_len, F, BY_DISTANCE)
        whole &= mask_m
        acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
        acc, l_ahead, m_ahead = attend(
            acc, no_sum, no_max, q, k_ptr, v_ptr, stride_kt, stride_vt,
            lo, tl.where(whole, hi, lo), whole, scale,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, True, HAS_WHOLE_TILES,
        )  # fmt: skip
        m, l, _, factor = _join(m_past, l_past, m_ahead, l_ahead, q.dtype)
        target, lse, residual = finish_softmax(acc * factor[:, None], l, m, whole, q.dtype)
        target_ptr += b * stride_targetb + h * stride_targeth
        store_tile(target_ptr, t, stride_targett, T, target, DV, BLOCK_M, BLOCK_DV)
        if lse_target_ptr is not None:
            tl.store(lse_target_ptr + row, lse, mask=mask_m)
            if residual_target_ptr is not None:
                tl.store(residual_target_ptr + row, residual, mask=mask_m)
        loss = tl.where(whole, row_loss(out_future, target, DV, IS_COSINE), 0.0)
        tl.store(loss_ptr + row, loss, mask=mask_m)
        tl.store(counts_ptr + row, whole.to(tl.float32), mask=mask_m)


def kernel_inputs(args: FutureAttentionArgs) -> dict:
    """Arguments that the kernels share, by name."""
    B, H = args.query.shape[:2]
    R, cu_seqlens = args.future_key.shape[-2], args.cu_seqlens
    # a shared table has stride 0 over the batch
    tables = [rows_ready(t).expand(B, -1, -1, -1) for t in (args.future_key, args.future_value)]
    return common_inputs(args) | dict(
        **rows("fk", tables[0], "bht"),
        **rows("fv", tables[1], "bht"),
        **rows("fq", args.future_query, "bht"),
        documents_ptr=None if cu_seqlens is None else document_table(cu_seqlens, args.key.shape[2]),
        GF=H // max(args.future_key.shape[-3], 1),
        table_len=args.table_len,
        F=args.future_dim,
        query_offset=args.query_offset,
        BY_DISTANCE=args.by_distance,
        PER_DOCUMENT=args.table_len < R,
        IS_COSINE=args.loss_type == "cosine",
    )


def launch_forward(args: FutureAttentionArgs, results: Named) -> None:
    """Fill the results."""
    lse, residual, lse_target = results["lse"], results["residual"], results["lse_target"]
    has_loss = args.loss_type is not None
    # the loss of each row and whether it counts
    losses = lse.new_empty(2, *lse.shape) if has_loss else None
    inputs = kernel_inputs(args) | forward_outputs(results)
    inputs |= dict(
        **rows("of", results["out_future"], "bht"),
        **rows("target", results["target"] if has_loss else None, "bht"),
        lse_target_ptr=lse_target if lse_target.numel() else None,
        residual_target_ptr=residual[1] if len(residual) > 1 else None,
        loss_ptr=None if losses is None else losses[0],
        counts_ptr=None if losses is None else losses[1],
    )
    kernel = "decode"
    if args.query.shape[2] > configs.DECODE_LENGTH:  # a loss has a third loop, and smaller tiles
        kernel = "fwd_loss" if has_loss else "fwd"
    launch_queries(_future_attention_fwd_kernel, f"future_attention_{kernel}", inputs)
    if losses is not None:
        total, counted = losses.flatten(1).sum(1)
        torch.clamp(counted, min=1.0, out=results["count"])
        torch.div(total, results["count"], out=results["loss"])
