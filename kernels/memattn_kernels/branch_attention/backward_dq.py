"""Query-stationary backward of attention in branches.

    d_query = scale * dS K,  dS = P * (gate d_out V^T - gate rowsum(ungated * d_out) + d_lse)

A gate's gradient is ``rowsum(ungated * d_out)``, over all heads.
"""

import triton
import triton.language as tl

from memattn_kernels._common import exponent_factor, load_rows, scatter_rows
from memattn_kernels.branch_attention.forward import RUNTIME_SIZES
from memattn_kernels.branch_attention.tiles import dq_until, rows_of_unit


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def branch_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr,  # inputs
    entry_ptr, bounds_ptr, key_start_ptr, key_end_ptr,  # index; keys that a token sees
    unit_ptr, first_ptr,  # of each tile
    ungated_ptr, lse_ptr, residual_ptr, do_ptr, dlse_ptr,
    dq_ptr,  # output
    # lists of the rows of each key head, in the order of the index
    dot_ptr, list_q_ptr, list_do_ptr, list_lse_ptr, list_delta_ptr,
    list_residual_ptr, list_dlse_ptr,  # or None
    stride_qb, stride_qs, stride_qh, stride_qt, stride_kb, stride_kf, stride_kh, stride_kt,
    stride_vb, stride_vf, stride_vh, stride_vt, stride_ub, stride_us, stride_uh, stride_ut,
    stride_dob, stride_dos, stride_doh, stride_dot,
    stride_dqb, stride_dqs, stride_dqh, stride_dqt,
    H, T, F, n_units, n_documents, n_tiles, n_list, scale,  # sizes
    A: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: that of the forward. One program computes BLOCK_M rows of d_query.

    It also lists what the key-stationary kernel reads of these rows: the query, ``gate d_out``,
    ``lse`` with ``exponent_factor`` in it, and delta; and ``rowsum(ungated * d_out)``.
    """
    tile = n_tiles - 1 - tl.program_id(0) % n_tiles
    h_kv = tl.program_id(0) // n_tiles
    unit = tl.load(unit_ptr + tile)
    if unit >= n_units:
        return
    b, f, a, h, t, entry, row, valid = rows_of_unit(
        unit, tl.load(first_ptr + tile), F, H, n_documents, h_kv, bounds_ptr, entry_ptr,
        A, G, T, BLOCK_M,
    )  # fmt: skip
    number = ((b * A + a).to(tl.int64) * H + h) * T + t
    key_end = tl.load(key_end_ptr + b * T + t)
    key_start = tl.load(key_start_ptr + b * T + tl.min(t))
    b, f, a, h, t = b.to(tl.int64), f.to(tl.int64), a.to(tl.int64), h.to(tl.int64), t.to(tl.int64)
    h_kv = h_kv.to(tl.int64)
    row = h_kv * n_list + row

    offs_q = b * stride_qb + a * stride_qs + h * stride_qh + t * stride_qt
    q = load_rows(q_ptr, offs_q, D, BLOCK_D)
    scatter_rows(list_q_ptr, row * D, valid, q, D, BLOCK_D)
    offs_u = b * stride_ub + a * stride_us + h * stride_uh + t * stride_ut
    ungated = load_rows(ungated_ptr, offs_u, DV, BLOCK_DV).to(tl.float32)
    offs_do = b * stride_dob + a * stride_dos + h * stride_doh + t * stride_dot
    do = load_rows(do_ptr, offs_do, DV, BLOCK_DV).to(tl.float32)
    tl.store(dot_ptr + row, tl.sum(ungated * do, 1), mask=valid)
    do = (do * tl.load(gate_ptr + entry)[:, None]).to(q.dtype)
    scatter_rows(list_do_ptr, row * DV, valid, do, DV, BLOCK_DV)
    delta = tl.sum(ungated * do.to(tl.float32), 1)
    lse = tl.load(lse_ptr + number) * exponent_factor(q.dtype)
    tl.store(list_lse_ptr + row, lse, mask=valid)
    residual = lse
    dlse = tl.zeros([BLOCK_M], dtype=tl.float32)
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + number)
    # as in segmented attention: float32 results show what is rounded off delta, which is added up
    IS_CORRECTED: tl.constexpr = q.dtype == tl.float32
    if IS_CORRECTED:
        residual = tl.load(residual_ptr + number)
        tl.store(list_residual_ptr + row, residual, mask=valid)
        if dlse_ptr is not None:
            tl.store(list_dlse_ptr + row, dlse, mask=valid)
    else:
        delta -= dlse
        tl.store(list_delta_ptr + row, delta, mask=valid)

    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    pk = tl.zeros([BLOCK_D, BLOCK_M], dtype=tl.float32)
    rest = tl.zeros([BLOCK_M], dtype=tl.float32)
    dq, pk, rest = dq_until(
        dq, pk, rest, q, do, lse, residual, delta,
        k_ptr + b * stride_kb + f * stride_kf + h_kv * stride_kh,
        v_ptr + b * stride_vb + f * stride_vf + h_kv * stride_vh, stride_kt, stride_vt,
        key_start, key_end, scale * exponent_factor(q.dtype), D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        IS_CORRECTED,
    )  # fmt: skip
    if IS_CORRECTED:
        tl.store(list_delta_ptr + row, delta + rest, mask=valid)
        dq -= (rest - dlse)[:, None] * tl.trans(pk)
    offs_dq = b * stride_dqb + a * stride_dqs + h * stride_dqh + t * stride_dqt
    scatter_rows(dq_ptr, offs_dq, valid, dq * scale, D, BLOCK_D)
