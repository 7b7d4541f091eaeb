"""Key-stationary backward of plain attention by tensor descriptors, one query head a key head.

One loop over all tiles of queries that see a key of the tile: see ``forward_plain``.
"""

import triton
import triton.language as tl

from memattn_kernels._common import cdiv, exponent_factor, power, store_tile
from memattn_kernels._launch import launch
from memattn_kernels._products import dot
from memattn_kernels.segmented_attention.plain import number_descriptor, tile_descriptor


@triton.jit(do_not_specialize=("T", "S", "query_offset"))
def segmented_attention_bwd_dkdv_plain_kernel(
    q_desc, k_desc, v_desc, do_desc, scaled_lse_desc, delta_desc,  # inputs, by tiles
    dk_ptr, dv_ptr,  # outputs
    stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    H, T, S, query_offset, scale,  # sizes
    IS_CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    IS_SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(S, BLOCK_N) * B * H,). One program owns BLOCK_N keys.

    T is a multiple of BLOCK_M: after it stand the numbers of another head.
    """
    n_tiles = tl.cdiv(S, BLOCK_N)
    pid = tl.program_id(0)
    n = pid % n_tiles * BLOCK_N
    b = pid // n_tiles // H
    h = pid // n_tiles % H
    row = (b * H + h) * T

    # rows from ``lo`` on see a key
    offs_n = n + tl.arange(0, BLOCK_N)
    lo = tl.maximum(offs_n - query_offset, 0)
    first = 0
    if IS_CAUSAL:
        first = tl.maximum(n - query_offset, 0) // BLOCK_M * BLOCK_M
    k = k_desc.load([b, h, n, 0]).reshape(BLOCK_N, BLOCK_D)
    v = v_desc.load([b, h, n, 0]).reshape(BLOCK_N, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    exponent_scale = scale * exponent_factor(k.dtype)
    for t in tl.range(first, T, BLOCK_M, warp_specialize=IS_SPECIALIZED):
        q = q_desc.load([b, h, t, 0]).reshape(BLOCK_M, BLOCK_D)
        do = do_desc.load([b, h, t, 0]).reshape(BLOCK_M, BLOCK_DV)
        lse = scaled_lse_desc.load([row + t])
        delta = delta_desc.load([row + t])
        scores = dot(k, tl.trans(q))
        p = power(scores * exponent_scale - lse[None, :], k.dtype)
        if IS_CAUSAL:
            mask = tl.arange(0, BLOCK_M)[None, :] >= (lo - t)[:, None]
            p = tl.where(mask, p, 0.0)
        dv = dot(p.to(do.dtype), do, dv)
        ds = dot(v, tl.trans(do)) - delta[None, :]
        if IS_CAUSAL:  # delta may be NaN where p is 0
            ds = tl.where(p != 0.0, ds, 0.0)
        ds *= p
        dk = dot(ds.to(q.dtype), q, dk)

    dk *= scale
    if IS_CAUSAL:  # a key that no query may see, and its NaN, ends here
        dk = tl.where((lo < T)[:, None], dk, 0.0)
        dv = tl.where((lo < T)[:, None], dv, 0.0)
    dk_ptr += b.to(tl.int64) * stride_dkb + h.to(tl.int64) * stride_dkh
    store_tile(dk_ptr, n, stride_dkt, S, dk, D, BLOCK_N, BLOCK_D)
    dv_ptr += b.to(tl.int64) * stride_dvb + h.to(tl.int64) * stride_dvh
    store_tile(dv_ptr, n, stride_dvt, S, dv, DV, BLOCK_N, BLOCK_DV)


def launch_dkdv_plain(inputs: dict, config: dict) -> None:
    """Launch it with the inputs of the other kernel and a ``descriptor_config``."""
    BLOCK_M, BLOCK_N = config["BLOCK_M"], config["BLOCK_N"]
    BLOCK_D, BLOCK_DV = inputs["BLOCK_D"], inputs["BLOCK_DV"]
    k = inputs["k_ptr"]
    tiles = dict(
        q_desc=tile_descriptor(inputs["q_ptr"], BLOCK_M, BLOCK_D),
        do_desc=tile_descriptor(inputs["do_ptr"], BLOCK_M, BLOCK_DV),
        k_desc=tile_descriptor(k, BLOCK_N, BLOCK_D),
        v_desc=tile_descriptor(inputs["v_ptr"], BLOCK_N, BLOCK_DV),
        scaled_lse_desc=number_descriptor(inputs["scaled_lse_ptr"], BLOCK_M),
        delta_desc=number_descriptor(inputs["delta_ptr"], BLOCK_M),
    )
    B, H, S, _ = k.shape
    n_programs = cdiv(S, BLOCK_N) * B * H
    launch(segmented_attention_bwd_dkdv_plain_kernel, n_programs, config, inputs, tiles)
