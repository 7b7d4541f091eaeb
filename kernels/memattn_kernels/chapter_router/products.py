"""Matrix products of the router: logits, and gradients of hidden states and weights.

A logit is summed over E in one order, whatever the tile: the tiles do not depend on how many rows
there are, so that a row has the same logits in decode and in prefill. No atomics.
"""

import triton
import triton.language as tl

from memattn_kernels._products import dot


@triton.jit(do_not_specialize=("first", "n_rows"))
def chapter_router_logits_kernel(
    x_ptr, w_ptr, bias_ptr, valid_ptr,  # inputs; the last two may be None
    z_ptr,  # float32 [n_rows, C]
    stride_xr, stride_wc,
    first, n_rows, C, E, scale,  # rows from ``first`` on
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(n_rows, BLOCK_M) * cdiv(C, BLOCK_N),). ``scale`` is 1 / temperature."""
    n_tiles = tl.cdiv(C, BLOCK_N)
    offs_m = tl.program_id(0) // n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < n_rows
    mask_n = offs_n < C
    rows = tl.cast(first, tl.int64) + offs_m
    is_valid = mask_m
    if valid_ptr is not None:
        is_valid = mask_m & (tl.load(valid_ptr + rows, mask=mask_m, other=0) != 0)

    x_ptrs = x_ptr + rows[:, None] * stride_xr + offs_k[None, :]
    w_ptrs = w_ptr + offs_n.to(tl.int64)[:, None] * stride_wc + offs_k[None, :]
    z = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, E, BLOCK_K):
        mask_k = offs_k[None, :] < E - k
        x = tl.load(x_ptrs + k, mask=is_valid[:, None] & mask_k, other=0.0)
        w = tl.load(w_ptrs + k, mask=mask_n[:, None] & mask_k, other=0.0)
        if x.dtype != w.dtype:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        z = dot(x, tl.trans(w), z)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    z *= scale
    z_ptrs = z_ptr + offs_m.to(tl.int64)[:, None] * C + offs_n[None, :]
    tl.store(z_ptrs, z, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=("first", "n_rows"))
def chapter_router_d_hidden_kernel(
    z_ptr, w_ptr,  # float32 [n_rows, C], [C, E]
    dx_ptr,
    stride_wc, stride_dxr,
    first, n_rows, C, E,
    PRECISION: tl.constexpr,  # "half": in the dtype of the weights
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(n_rows, BLOCK_M) * cdiv(E, BLOCK_N),). Rows of ``d_logits @ weight``."""
    n_tiles = tl.cdiv(E, BLOCK_N)
    offs_m = tl.program_id(0) // n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < n_rows
    mask_n = offs_n < E
    z_ptrs = z_ptr + offs_m.to(tl.int64)[:, None] * C + offs_k[None, :]
    w_ptrs = w_ptr + offs_k.to(tl.int64)[:, None] * stride_wc + offs_n[None, :]
    dx = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for c in range(0, C, BLOCK_K):
        mask_k = offs_k < C - c
        z = tl.load(z_ptrs + c, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        w_ptrs += BLOCK_K * tl.cast(stride_wc, tl.int64)
        if PRECISION == "half":
            dx = tl.dot(z.to(w.dtype), w, dx)
        else:
            dx = tl.dot(z, w.to(tl.float32), dx, input_precision=PRECISION)
    rows = tl.cast(first, tl.int64) + offs_m
    dx_ptrs = dx_ptr + rows[:, None] * stride_dxr + offs_n[None, :]
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=("first", "n_rows", "rows_per_part"))
def chapter_router_d_weight_kernel(
    z_ptr, x_ptr, valid_ptr,  # float32 [n_rows, C], hidden states; valid may be None
    dw_ptr, db_ptr,  # float32 sums, [n_parts, C, E] and [n_parts, C]; the latter may be None
    stride_xr,
    first, n_rows, rows_per_part, C, E,
    ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(C, BLOCK_M) * cdiv(E, BLOCK_N), n_parts). ``d_logits.T @ hidden`` of some rows.

    A program owns its sums; with ADD they go on from those of the rows before.
    """
    n_tiles = tl.cdiv(E, BLOCK_N)
    offs_m = tl.program_id(0) // n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(1) * rows_per_part
    end = tl.minimum(begin + rows_per_part, n_rows)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < C
    mask_n = offs_n < E
    dw = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    db = tl.zeros([BLOCK_M], dtype=tl.float32)
    for r in range(begin, end, BLOCK_K):
        rows = r + offs_k
        mask_k = rows < end
        z_ptrs = z_ptr + rows.to(tl.int64)[:, None] * C + offs_m[None, :]
        z = tl.load(z_ptrs, mask=mask_k[:, None] & mask_m[None, :], other=0.0)
        db += tl.sum(z, 0)
        rows = tl.cast(first, tl.int64) + rows
        if valid_ptr is not None:  # a row that is not valid may hold anything
            mask_k = mask_k & (tl.load(valid_ptr + rows, mask=mask_k, other=0) != 0)
        x_ptrs = x_ptr + rows[:, None] * stride_xr + offs_n[None, :]
        x = tl.load(x_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        if PRECISION == "half":
            dw = tl.dot(tl.trans(z.to(x.dtype)), x, dw)
        else:
            dw = tl.dot(tl.trans(z), x.to(tl.float32), dw, input_precision=PRECISION)
    dw_ptrs = dw_ptr + (part * C + offs_m[:, None]) * E + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if ADD:
        dw += tl.load(dw_ptrs, mask=mask, other=0.0)
    tl.store(dw_ptrs, dw, mask=mask)
    if db_ptr is not None:
        mask_m = mask_m & (tl.program_id(0) % n_tiles == 0)
        db_ptrs = db_ptr + part * C + offs_m
        if ADD:
            db += tl.load(db_ptrs, mask=mask_m, other=0.0)
        tl.store(db_ptrs, db, mask=mask_m)
