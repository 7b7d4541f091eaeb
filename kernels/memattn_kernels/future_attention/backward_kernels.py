"""Kernels of the backward of future attention: no atomics, every gradient has one owner.

With P the weights, g the cotangent of ``out``, h that of ``out_future`` with the loss's gradient,

    delta = rowsum(g * out + h * out_future)
    dS_past = P_past * (g V^T - delta + d_lse)
    dS_future = P_future * ((g + h) V_future^T - delta + d_lse)

A target that is not detached adds, with its own weights Q and the loss's gradient g_target,

    dS_past += Q_past * (0 - delta_target),  delta_target = rowsum(g_target * target)
    dS_ahead = Q_ahead * (g_target V^T - delta_target),  d_value_ahead = Q_ahead^T g_target
"""

import triton
import triton.language as tl

from memattn_kernels._common import (
    NO_END,
    exponent_factor,
    load_tile,
    sequence_of,
    store_tile,
    tile_ranges,
)
from memattn_kernels._tiles import dkdv_source, dq_source
from memattn_kernels.future_attention.forward import RUNTIME_SIZES
from memattn_kernels.future_attention.intervals import (
    ahead_of_query,
    past_of_query,
    queries_of_ahead,
    queries_of_past,
    queries_of_row,
    rows_of_query,
    table_groups,
)
from memattn_kernels.future_attention.loss import row_loss_gradient


@triton.jit
def _load_lse(lse_ptr, scaled_lse_ptr, row, mask, dtype: tl.constexpr):
    """``lse`` with ``exponent_factor``, infinite for a row without keys; kept."""
    lse = tl.load(lse_ptr + row, mask=mask, other=0.0) * exponent_factor(dtype)
    lse = tl.where(lse > -float("inf"), lse, float("inf"))
    tl.store(scaled_lse_ptr + row, lse, mask=mask)
    return lse


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def future_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, fk_ptr, fv_ptr, fq_ptr,  # inputs; fq may be None
    o_ptr, of_ptr, target_ptr, lse_ptr, lse_target_ptr, residual_ptr, residual_target_ptr,
    do_ptr, dof_ptr, dlse_ptr, dloss_ptr,  # cotangents; all but the first may be None
    documents_ptr, seq_start_ptr, seq_end_ptr,  # bounds of sequences, or None
    dq_ptr, dfq_ptr, df_ptr, dtarget_ptr,  # outputs; all but the first may be None
    scaled_lse_ptr, delta_ptr, scaled_lse_target_ptr, delta_target_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_fkb, stride_fkh, stride_fkt,
    stride_fvb, stride_fvh, stride_fvt, stride_fqb, stride_fqh, stride_fqt,
    stride_ob, stride_oh, stride_ot, stride_ofb, stride_ofh, stride_oft,
    stride_targetb, stride_targeth, stride_targett,
    stride_dob, stride_doh, stride_dot, stride_dofb, stride_dofh, stride_doft,
    stride_dqb, stride_dqh, stride_dqt, stride_dfqb, stride_dfqh, stride_dfqt,
    stride_dfb, stride_dfh, stride_dft, stride_dtargetb, stride_dtargeth, stride_dtargett,
    H, G, GF, T, S, table_len, F, query_offset, scale,  # sizes
    BY_DISTANCE: tl.constexpr, PER_DOCUMENT: tl.constexpr, IS_COSINE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(T, BLOCK_M) * B * H,). One program computes BLOCK_M rows of d_query.

    For the other kernels it also writes delta, lse with ``exponent_factor`` in it, ``df`` (the
    cotangent of the future part, where that of ``out`` is not all of it) and ``dtarget``.
    """
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
    exponent_scale = scale * exponent_factor(q.dtype)
    k_ptr += b * stride_kb + h // G * stride_kh
    v_ptr += b * stride_vb + h // G * stride_vh
    HAS_TARGET: tl.constexpr = lse_target_ptr is not None
    IS_CORRECTED: tl.constexpr = q.dtype == tl.float32

    lse = _load_lse(lse_ptr, scaled_lse_ptr, row, mask_m, q.dtype)
    residual = lse
    lse_target = lse
    residual_target = lse
    delta_target = lse
    if q.dtype == tl.float32:
        residual = tl.load(residual_ptr + row, mask=mask_m, other=0.0)
    if HAS_TARGET:
        lse_target = _load_lse(lse_target_ptr, scaled_lse_target_ptr, row, mask_m, q.dtype)
        if q.dtype == tl.float32:
            residual_target = tl.load(residual_target_ptr + row, mask=mask_m, other=0.0)

    # cotangents of the parts, and delta
    o_ptr += b * stride_ob + h * stride_oh
    o = load_tile(o_ptr, t, stride_ot, T, DV, BLOCK_M, BLOCK_DV, True)
    do_ptr += b * stride_dob + h * stride_doh
    do = load_tile(do_ptr, t, stride_dot, T, DV, BLOCK_M, BLOCK_DV, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    _, _, whole = ahead_of_query(i, start, end, S, table_len, F, BY_DISTANCE)
    whole &= mask_m
    df = do
    dtarget = do
    if df_ptr is not None:
        of_ptr += b * stride_ofb + h * stride_ofh
        of = load_tile(of_ptr, t, stride_oft, T, DV, BLOCK_M, BLOCK_DV, True)
        d_own = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
        if dloss_ptr is not None:
            target_ptr += b * stride_targetb + h * stride_targeth
            target = load_tile(target_ptr, t, stride_targett, T, DV, BLOCK_M, BLOCK_DV, True)
            weight = tl.where(whole, tl.load(dloss_ptr), 0.0)
            own, other, own_target = row_loss_gradient(of, target, weight, DV, IS_COSINE)
            if HAS_TARGET:
                d_own = own_target[:, None] * target + other[:, None] * of
                delta_target = tl.sum(d_own * target, 1)
                tl.store(delta_target_ptr + row, delta_target, mask=mask_m)
                dtarget = d_own.to(q.dtype)
                dtarget_ptr += b * stride_dtargetb + h * stride_dtargeth
                store_tile(dtarget_ptr, t, stride_dtargett, T, dtarget, DV, BLOCK_M, BLOCK_DV)
            d_own = own[:, None] * of + other[:, None] * target
        if dof_ptr is not None:
            dof_ptr += b * stride_dofb + h * stride_dofh
            d_own += load_tile(dof_ptr, t, stride_doft, T, DV, BLOCK_M, BLOCK_DV, True)
        delta += tl.sum(d_own * of, 1)
        df = (do + d_own).to(q.dtype)
        df_ptr += b * stride_dfb + h * stride_dfh
        store_tile(df_ptr, t, stride_dft, T, df, DV, BLOCK_M, BLOCK_DV)
    if not IS_CORRECTED:
        if dlse_ptr is not None:
            delta -= tl.load(dlse_ptr + row, mask=mask_m, other=0.0)
        tl.store(delta_ptr + row, delta, mask=mask_m)

    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # float32 results show the rounding of out and lse in delta, most where dS cancels (a row with
    # one key): there dS without d_lse must sum to 0, so the rest of that sum corrects delta, and
    # pk = P K corrects d_query
    pk = tl.zeros([BLOCK_D, BLOCK_M], dtype=tl.float32)
    rest = tl.zeros([BLOCK_M], dtype=tl.float32)
    stored = valid & (lse < float("inf"))  # a row without keys, and its NaN, ends here
    stored = stored[:, None]

    if HAS_TARGET:
        lo, hi, _ = ahead_of_query(i, start, end, S, table_len, F, BY_DISTANCE)
        dq, pk, rest = dq_source(
            dq, pk, rest, q, dtarget, lse_target, residual_target, delta_target, lse, lse, lse,
            k_ptr, v_ptr, stride_kt, stride_vt, lo, tl.where(whole, hi, lo),
            whole, exponent_scale, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, False, False,
            not IS_CORRECTED,
        )  # fmt: skip
    if IS_CORRECTED:  # short of registers: read again what would wait in them
        do = load_tile(do_ptr, t, stride_dot, T, DV, BLOCK_M, BLOCK_DV, True)
    lo, hi = past_of_query(i, start, end, S)
    dq, pk, rest = dq_source(
        dq, pk, rest, q, do, lse, residual, delta, lse_target, residual_target, delta_target,
        k_ptr, v_ptr, stride_kt, stride_vt, lo, tl.where(valid, hi, lo), valid, exponent_scale,
        D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_TARGET, IS_CORRECTED, not IS_CORRECTED,
    )  # fmt: skip
    dq_ptr += b * stride_dqb + h * stride_dqh
    fq = q
    dfq = dq
    pk_future = pk
    if fq_ptr is not None:
        if not IS_CORRECTED:
            dq = tl.where(stored, dq * scale, 0.0)
            store_tile(dq_ptr, t, stride_dqt, T, dq, D, BLOCK_M, BLOCK_D)
        fq_ptr += b * stride_fqb + h * stride_fqh
        fq = load_tile(fq_ptr, t, stride_fqt, T, D, BLOCK_M, BLOCK_D, True)
        dfq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        pk_future = tl.zeros([BLOCK_D, BLOCK_M], dtype=tl.float32)
    if IS_CORRECTED and df_ptr is not None:
        tl.debug_barrier()  # other threads of this program wrote it
        df = load_tile(df_ptr, t, stride_dft, T, DV, BLOCK_M, BLOCK_DV, True)
    lo, hi = rows_of_query(i, start, number, table_len, F, BY_DISTANCE, PER_DOCUMENT)
    group, n_groups = table_groups(
        number, valid, documents_ptr is not None, BY_DISTANCE, PER_DOCUMENT
    )
    for part in range(n_groups):
        sees = valid & (group == part)
        dfq, pk_future, rest = dq_source(
            dfq, pk_future, rest, fq, df, lse, residual, delta, lse, lse, lse,
            fk_ptr + b * stride_fkb + h // GF * stride_fkh,
            fv_ptr + b * stride_fvb + h // GF * stride_fvh, stride_fkt, stride_fvt,
            lo, tl.where(sees, hi, lo), sees, exponent_scale,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, False, IS_CORRECTED,
            not IS_CORRECTED and documents_ptr is None,
        )  # fmt: skip

    if IS_CORRECTED:
        tl.store(delta_ptr + row, delta + rest, mask=mask_m)
        if dlse_ptr is not None:
            rest -= tl.load(dlse_ptr + row, mask=mask_m, other=0.0)
        # masks cover all else that a row without keys has
        rest = tl.where(lse < float("inf"), rest, 0.0)
        dfq = (dfq - rest[:, None] * tl.trans(pk_future)) * scale
        if fq_ptr is not None:
            dq = (dq - rest[:, None] * tl.trans(pk)) * scale
            store_tile(dq_ptr, t, stride_dqt, T, dq, D, BLOCK_M, BLOCK_D)
    else:
        dfq = tl.where(stored, dfq * scale, 0.0)
    if fq_ptr is not None:
        dfq_ptr += b * stride_dfqb + h * stride_dfqh
        store_tile(dfq_ptr, t, stride_dfqt, T, dfq, D, BLOCK_M, BLOCK_D)
    else:
        store_tile(dq_ptr, t, stride_dqt, T, dfq, D, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def future_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dtarget_ptr, scaled_lse_ptr, delta_ptr, residual_ptr, dlse_ptr,
    scaled_lse_target_ptr, delta_target_ptr, residual_target_ptr,  # all but q, k, v, do may be None
    documents_ptr, seq_start_ptr, seq_end_ptr,  # bounds of sequences, or None
    dk_ptr, dv_ptr,  # outputs
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_dob, stride_doh, stride_dot,
    stride_dtargetb, stride_dtargeth, stride_dtargett,
    stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    H, G, T, S, table_len, F, query_offset, scale,  # sizes
    BY_DISTANCE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(S, BLOCK_N) * B * Hkv,). One program owns BLOCK_N token keys."""
    n_tiles = tl.cdiv(S, BLOCK_N)
    pid = tl.program_id(0)
    n = pid % n_tiles * BLOCK_N
    b = (pid // n_tiles // (H // G)).to(tl.int64)
    h_kv = (pid // n_tiles % (H // G)).to(tl.int64)

    # what sees each key
    offs_n = n + tl.arange(0, BLOCK_N)
    start, end, _ = sequence_of(offs_n, b, documents_ptr, seq_start_ptr, seq_end_ptr, S)
    # no query, so no whole tile, for a key outside its sequence: nothing is added for it
    end = tl.where((offs_n >= start) & (offs_n < end), end, 0)

    k_ptr += b * stride_kb + h_kv * stride_kh
    k = load_tile(k_ptr, n, stride_kt, S, D, BLOCK_N, BLOCK_D, True)
    v_ptr += b * stride_vb + h_kv * stride_vh
    v = load_tile(v_ptr, n, stride_vt, S, DV, BLOCK_N, BLOCK_DV, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    exponent_scale = scale * exponent_factor(k.dtype)
    if scaled_lse_target_ptr is not None:
        lo, hi = queries_of_ahead(offs_n, start, end, table_len, F, query_offset, T, BY_DISTANCE)
        first, full_first, full_last, last = tile_ranges(lo, hi, offs_n < S, BLOCK_M)
        for g in range(G):
            h = h_kv * G + g
            dk, dv = dkdv_source(
                dk, dv, k, v, q_ptr + b * stride_qb + h * stride_qh,
                dtarget_ptr + b * stride_dtargetb + h * stride_dtargeth,
                scaled_lse_target_ptr, residual_target_ptr, delta_target_ptr, None,
                None, None, None, (b * H + h) * T, stride_qt, stride_dtargett,
                lo, hi, first, full_first, full_last, last,
                exponent_scale, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    lo, hi = queries_of_past(offs_n, end, query_offset, T)
    first, full_first, full_last, last = tile_ranges(lo, hi, offs_n < S, BLOCK_M)
    for g in range(G):
        h = h_kv * G + g
        dk, dv = dkdv_source(
            dk, dv, k, v, q_ptr + b * stride_qb + h * stride_qh,
            do_ptr + b * stride_dob + h * stride_doh,
            scaled_lse_ptr, residual_ptr, delta_ptr, dlse_ptr,
            scaled_lse_target_ptr, residual_target_ptr, delta_target_ptr, (b * H + h) * T,
            stride_qt, stride_dot, lo, hi, first, full_first, full_last, last,
            exponent_scale, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV,
        )  # fmt: skip

    dk_ptr += b * stride_dkb + h_kv * stride_dkh
    store_tile(dk_ptr, n, stride_dkt, S, dk * scale, D, BLOCK_N, BLOCK_D)
    dv_ptr += b * stride_dvb + h_kv * stride_dvh
    store_tile(dv_ptr, n, stride_dvt, S, dv, DV, BLOCK_N, BLOCK_DV)


@triton.jit(
    do_not_specialize=("T", "table_len", "F", "query_offset", "n_tables", "n_sequences",
                       "n_query_parts", "sequences_per_part", "queries_per_part")
)  # fmt: skip
def future_attention_bwd_table_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, scaled_lse_ptr, delta_ptr, residual_ptr, dlse_ptr,
    cu_seqlens_ptr, seq_start_ptr, seq_end_ptr,  # bounds of sequences, or None
    dk_ptr, dv_ptr,  # outputs
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_dob, stride_doh, stride_dot,
    stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    H, GF, T, table_len, F, query_offset, n_tables, n_sequences,  # sizes
    n_query_parts, sequences_per_part, queries_per_part, scale,
    BY_DISTANCE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(table_len, BLOCK_N) * Hf * n_tables * n_parts,). One program owns BLOCK_N rows.

    A shared table serves ``n_sequences``, one of several tables a single one. Each part takes some
    of the sequences and some of the query rows, and writes to its own slice of the outputs. Here
    ``q``, ``k``, ``v`` and ``do`` are those of the future.
    """
    n_tiles = tl.cdiv(table_len, BLOCK_N)
    pid = tl.program_id(0)
    n = pid % n_tiles * BLOCK_N
    h_table = (pid // n_tiles % (H // GF)).to(tl.int64)
    pid = pid // n_tiles // (H // GF)
    table = pid % n_tables
    part = pid // n_tables
    first_sequence = table + part // n_query_parts * sequences_per_part
    last_sequence = tl.minimum(first_sequence + sequences_per_part, table + n_sequences)
    first_t = part % n_query_parts * queries_per_part
    last_t = tl.minimum(first_t + queries_per_part, T)

    # the tables of documents lie one after the other, those of sequences have an axis
    row = tl.cast(n, tl.int64)
    batch = table.to(tl.int64)
    out_batch = part.to(tl.int64) * n_tables + batch
    if cu_seqlens_ptr is not None:
        row += batch * table_len
        out_batch = part.to(tl.int64)
        batch *= 0
    row_end = row + (table_len - n)
    offs_n = n + tl.arange(0, BLOCK_N)
    k_ptr += batch * stride_kb + h_table * stride_kh
    k = load_tile(k_ptr, row, stride_kt, row_end, D, BLOCK_N, BLOCK_D, True)
    v_ptr += batch * stride_vb + h_table * stride_vh
    v = load_tile(v_ptr, row, stride_vt, row_end, DV, BLOCK_N, BLOCK_DV, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    exponent_scale = scale * exponent_factor(k.dtype)

    # one loop over sequences and the heads of a group, which takes fewer registers than two
    for index in range(first_sequence * GF, last_sequence * GF):
        sequence = index // GF
        h = h_table * GF + index % GF
        start = tl.full([], 0, tl.int32)
        end = tl.full([], NO_END, tl.int32)
        b = tl.cast(sequence, tl.int64)
        if cu_seqlens_ptr is not None:
            start = tl.load(cu_seqlens_ptr + sequence)
            end = tl.load(cu_seqlens_ptr + sequence + 1)
            b *= 0
        if seq_start_ptr is not None:
            start = tl.load(seq_start_ptr + sequence)
        if seq_end_ptr is not None:
            end = tl.load(seq_end_ptr + sequence)
        lo, hi = queries_of_row(offs_n, start, end, F, query_offset, T, BY_DISTANCE)
        if BY_DISTANCE:  # else there is one part
            lo = tl.maximum(lo, first_t)
            hi = tl.minimum(hi, last_t)
        first, full_first, full_last, last = tile_ranges(lo, hi, offs_n < table_len, BLOCK_M)
        dk, dv = dkdv_source(
            dk, dv, k, v, q_ptr + b * stride_qb + h * stride_qh,
            do_ptr + b * stride_dob + h * stride_doh,
            scaled_lse_ptr, residual_ptr, delta_ptr, dlse_ptr, None, None, None,
            (b * H + h) * T, stride_qt, stride_dot, lo, hi, first, full_first, full_last, last,
            exponent_scale, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV,
        )  # fmt: skip

    dk_ptr += out_batch * stride_dkb + h_table * stride_dkh
    store_tile(dk_ptr, row, stride_dkt, row_end, dk * scale, D, BLOCK_N, BLOCK_D)
    dv_ptr += out_batch * stride_dvb + h_table * stride_dvh
    store_tile(dv_ptr, row, stride_dvt, row_end, dv, DV, BLOCK_N, BLOCK_DV)
