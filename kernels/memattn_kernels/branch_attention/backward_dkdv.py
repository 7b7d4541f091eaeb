"""Key-stationary backward of attention in branches: one program per tile of keys of a branch.

    d_key = scale * dS^T Q,  d_value = (gate P)^T d_out

summed over the rows of the branch that see the key, in the order of the index.
"""

import triton
import triton.language as tl

from memattn_kernels._common import exponent_factor, load_tile, store_tile, tile_ranges
from memattn_kernels._tiles import dkdv_source
from memattn_kernels.branch_attention.forward import RUNTIME_SIZES


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def branch_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr,  # inputs; of the first the dtype is read alone
    list_q_ptr, list_do_ptr, list_lse_ptr, list_residual_ptr, list_delta_ptr, list_dlse_ptr,
    token_start_ptr, token_end_ptr, before_ptr,  # tokens that see a key; entries before a token
    dk_ptr, dv_ptr,  # outputs
    stride_kb, stride_kf, stride_kh, stride_kt, stride_vb, stride_vf, stride_vh, stride_vt,
    stride_dkb, stride_dkf, stride_dkh, stride_dkt, stride_dvb, stride_dvf, stride_dvh, stride_dvt,
    H, T, S, F, n_list, scale,  # sizes
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(S, BLOCK_N) * B * F * Hkv,). One program owns BLOCK_N keys of a branch."""
    n_key_tiles = tl.cdiv(S, BLOCK_N)
    n_heads = H // G
    pid = tl.program_id(0)
    n = pid % n_key_tiles * BLOCK_N
    h_kv = (pid // n_key_tiles % n_heads).to(tl.int64)
    branch = pid // n_key_tiles // n_heads
    b, f = (branch // F).to(tl.int64), (branch % F).to(tl.int64)

    # rows of the branch that see each key
    offs_n = n + tl.arange(0, BLOCK_N)
    is_key = offs_n < S
    before_ptr += branch.to(tl.int64) * T
    start = tl.load(token_start_ptr + b * S + offs_n, mask=is_key, other=0)
    lo = tl.load(before_ptr + start) * G
    hi = tl.load(before_ptr + tl.load(token_end_ptr + b * S + offs_n, mask=is_key, other=0)) * G
    valid = is_key & (lo < hi)
    first, full_first, full_last, last = tile_ranges(lo, hi, valid, BLOCK_M)

    k_ptr += b * stride_kb + f * stride_kf + h_kv * stride_kh
    k = load_tile(k_ptr, n, stride_kt, S, D, BLOCK_N, BLOCK_D, True)
    v_ptr += b * stride_vb + f * stride_vf + h_kv * stride_vh
    v = load_tile(v_ptr, n, stride_vt, S, DV, BLOCK_N, BLOCK_DV, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    rows = h_kv * n_list
    dk, dv = dkdv_source(
        dk, dv, k, v, list_q_ptr + rows * D, list_do_ptr + rows * DV, list_lse_ptr,
        list_residual_ptr, list_delta_ptr, list_dlse_ptr, None, None, None, rows, D, DV,
        lo, hi, first, full_first, full_last, last, scale * exponent_factor(k.dtype),
        D, DV, BLOCK_M, BLOCK_D, BLOCK_DV,
    )  # fmt: skip

    # a key that no row sees, and its NaN, ends here
    dk = tl.where(valid[:, None], dk * scale, 0.0)
    dv = tl.where(valid[:, None], dv, 0.0)
    dk_ptr += b * stride_dkb + f * stride_dkf + h_kv * stride_dkh
    store_tile(dk_ptr, n, stride_dkt, S, dk, D, BLOCK_N, BLOCK_D)
    dv_ptr += b * stride_dvb + f * stride_dvf + h_kv * stride_dvh
    store_tile(dv_ptr, n, stride_dvt, S, dv, DV, BLOCK_N, BLOCK_DV)
