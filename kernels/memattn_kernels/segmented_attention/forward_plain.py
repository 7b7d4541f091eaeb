"""Forward of plain attention by tensor descriptors: one loop over all tiles of keys.

The loop is one, with a mask in every tile or in none, as Triton 3.6 takes no other for warp
specialisation on sm_90; a tile beyond the last key is zero. See ``plain`` for when it runs.
"""

import triton
import triton.language as tl

from memattn_kernels._common import (
    cdiv,
    exponent_factor,
    finish_softmax,
    online_softmax_step,
    store_tile,
)
from memattn_kernels._launch import launch, n_query_programs
from memattn_kernels._products import dot
from memattn_kernels._tiles import columns_between
from memattn_kernels.segmented_attention.plain import tile_descriptor

# half of what the second-level cache of an H100 holds: keys and values of heads that run together
CACHED_BYTES = 24 * 2**20


@triton.jit(do_not_specialize=("T", "S", "query_offset", "heads_together"))
def segmented_attention_fwd_plain_kernel(
    q_desc, k_desc, v_desc,  # inputs, by tiles
    o_ptr, lse_ptr,  # outputs
    stride_ob, stride_oh, stride_ot, H, G, T, S, query_offset, heads_together, scale,  # sizes
    IS_CAUSAL: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, IS_SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(T, BLOCK_M) * B * H,). One program computes BLOCK_M queries of one head.

    Unless IS_CAUSAL, S is a multiple of BLOCK_N.
    """
    n_tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    pid_m = pid % n_tiles
    head = pid // n_tiles
    if IS_CAUSAL:  # the longest rows first, of as many heads as the cache holds
        first_head = pid // (n_tiles * heads_together) * heads_together
        n_heads = tl.minimum(heads_together, tl.num_programs(0) // n_tiles - first_head)
        turn = pid - first_head * n_tiles
        pid_m = n_tiles - 1 - turn // n_heads
        head = first_head + turn % n_heads
    b = head // H
    h = head % H
    h_kv = h // G

    t = pid_m * BLOCK_M
    offs_m = t + tl.arange(0, BLOCK_M)
    hi = tl.minimum(query_offset + offs_m + 1, S)
    last = S
    if IS_CAUSAL:
        last = tl.minimum(query_offset + t + BLOCK_M, S)
    q = q_desc.load([b, h, t, 0]).reshape(BLOCK_M, BLOCK_D)
    scale *= exponent_factor(q.dtype)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    for n in tl.range(0, last, BLOCK_N, warp_specialize=IS_SPECIALIZED):
        k = k_desc.load([b, h_kv, n, 0]).reshape(BLOCK_N, BLOCK_D)
        scores = dot(q, tl.trans(k))
        if IS_CAUSAL:
            mask = columns_between(None, hi, n, BLOCK_N, True)
            scores = tl.where(mask, scores, -float("inf"))
        v = v_desc.load([b, h_kv, n, 0]).reshape(BLOCK_N, BLOCK_DV)
        acc, l_i, m_i = online_softmax_step(acc, l_i, m_i, scores, v, scale)

    valid = offs_m < T
    out, lse, _ = finish_softmax(acc, l_i, m_i, valid, q.dtype)
    o_ptr += b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh
    store_tile(o_ptr, t, stride_ot, T, out, DV, BLOCK_M, BLOCK_DV)
    tl.store(lse_ptr + (b.to(tl.int64) * H + h) * T + offs_m, lse, mask=valid)


def launch_forward_plain(inputs: dict, config: dict) -> None:
    """Launch it with the inputs of the other kernel and a ``descriptor_config``."""
    BLOCK_M, BLOCK_N = config["BLOCK_M"], config["BLOCK_N"]
    q, k, v = (inputs[name] for name in ("q_ptr", "k_ptr", "v_ptr"))
    # keys after those that the last query sees are zero: they may be NaN
    end = inputs["query_offset"] + inputs["T"] if inputs["IS_CAUSAL"] else None
    tiles = dict(
        q_desc=tile_descriptor(q, BLOCK_M, inputs["BLOCK_D"]),
        k_desc=tile_descriptor(k, BLOCK_N, inputs["BLOCK_D"], end),
        v_desc=tile_descriptor(v, BLOCK_N, inputs["BLOCK_DV"], end),
    )
    n_heads = q.shape[0] * q.shape[1]
    bytes_of_head = (k.shape[-1] + v.shape[-1]) * k.shape[2] * k.element_size() / inputs["G"]
    n_groups = cdiv(n_heads, max(int(CACHED_BYTES / bytes_of_head), 1))
    tiles["heads_together"] = cdiv(n_heads, n_groups)
    n_programs = n_query_programs(q, config)
    launch(segmented_attention_fwd_plain_kernel, n_programs, config, inputs, tiles)
