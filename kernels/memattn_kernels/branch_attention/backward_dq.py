"""Query-stationary backward of attention in branches.

    d_query = scale * dS K,  dS = P * (gate d_out V^T - gate rowsum(ungated * d_out) + d_lse)

A gate's gradient is ``rowsum(ungated * d_out)``, over all heads.
"""

import triton
import triton.language as tl

from memattn_kernels._common import exponent_factor, load_rows, scatter_rows
from memattn_kernels.branch_attention.forward import RUNTIME_SIZES
from memattn_kernels.branch_attention.tiles import (
    at_branch,
    at_slots,
    dq_until,
    rows_of_tile,
)


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
    r = rows_of_tile(
        tile, unit, h_kv, F, H, n_documents, first_ptr, entry_ptr, bounds_ptr, key_start_ptr,
        key_end_ptr, A, G, T, BLOCK_M,
    )  # fmt: skip
    row = r.h_kv * n_list + r.place

    q = load_rows(q_ptr, at_slots(r, stride_qb, stride_qs, stride_qh, stride_qt), D, BLOCK_D)
    scatter_rows(list_q_ptr, row * D, r.valid, q, D, BLOCK_D)
    offs_u = at_slots(r, stride_ub, stride_us, stride_uh, stride_ut)
    ungated = load_rows(ungated_ptr, offs_u, DV, BLOCK_DV).to(tl.float32)
    offs_do = at_slots(r, stride_dob, stride_dos, stride_doh, stride_dot)
    do = load_rows(do_ptr, offs_do, DV, BLOCK_DV).to(tl.float32)
    tl.store(dot_ptr + row, tl.sum(ungated * do, 1), mask=r.valid)
    do = (do * tl.load(gate_ptr + r.entry)[:, None]).to(q.dtype)
    scatter_rows(list_do_ptr, row * DV, r.valid, do, DV, BLOCK_DV)
    delta = tl.sum(ungated * do.to(tl.float32), 1)
    lse = tl.load(lse_ptr + r.number) * exponent_factor(q.dtype)
    tl.store(list_lse_ptr + row, lse, mask=r.valid)
    residual = lse
    dlse = tl.zeros([BLOCK_M], dtype=tl.float32)
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + r.number)
    # as in segmented attention: float32 results show what is rounded off delta, which is added up
    IS_CORRECTED: tl.constexpr = q.dtype == tl.float32
    if IS_CORRECTED:
        residual = tl.load(residual_ptr + r.number)
        tl.store(list_residual_ptr + row, residual, mask=r.valid)
        if dlse_ptr is not None:
            tl.store(list_dlse_ptr + row, dlse, mask=r.valid)
    else:
        delta -= dlse
        tl.store(list_delta_ptr + row, delta, mask=r.valid)

    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    pk = tl.zeros([BLOCK_D, BLOCK_M], dtype=tl.float32)
    rest = tl.zeros([BLOCK_M], dtype=tl.float32)
    dq, pk, rest = dq_until(
        dq, pk, rest, q, do, lse, residual, delta,
        at_branch(k_ptr, r, stride_kb, stride_kf, stride_kh),
        at_branch(v_ptr, r, stride_vb, stride_vf, stride_vh), stride_kt, stride_vt,
        r.key_start, r.key_end, scale * exponent_factor(q.dtype), D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        IS_CORRECTED,
    )  # fmt: skip
    if IS_CORRECTED:
        tl.store(list_delta_ptr + row, delta + rest, mask=r.valid)
        dq -= (rest - dlse)[:, None] * tl.trans(pk)
    offs_dq = at_slots(r, stride_dqb, stride_dqs, stride_dqh, stride_dqt)
    scatter_rows(dq_ptr, offs_dq, r.valid, dq * scale, D, BLOCK_D)
