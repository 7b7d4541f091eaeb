"""Backward of segmented attention: no atomics, every gradient has one owner.

With P the softmax's weights, dS = P * (d_out V^T - rowsum(out * d_out) + d_lse):

    d_query = scale * dS K        one program per tile of queries, in ``backward_dq``
    d_key = scale * dS^T Q        one program per tile of keys, in ``backward_dkdv``,
    d_value = P^T d_out           which loops over the query heads of its group

A persistent key is seen by all queries of the batch: its programs each take a chunk of queries and
write a partial sum, added up in a fixed order.
"""

import torch
import triton
from torch import Tensor

from memattn_kernels import configs
from memattn_kernels._common import block_length, rows, rows_ready
from memattn_kernels._launch import launch, lookup, n_query_programs, residual_ptr
from memattn_kernels.segmented_attention.backward_dkdv import segmented_attention_bwd_dkdv_kernel
from memattn_kernels.segmented_attention.backward_dq import segmented_attention_bwd_dq_kernel
from memattn_kernels.segmented_attention.forward import kernel_inputs, row_tiles
from memattn_kernels.segmented_attention.intervals import segment_table
from memattn_kernels.signatures import SegmentedAttentionArgs

# a partial sum of the persistent gradients takes at least this many queries, and there are about
# this many partial sums, which fill any card
MIN_CHUNK = 1024
N_PARTIALS = 512


def launch_backward(
    args: SegmentedAttentionArgs,
    cotangents: dict[str, Tensor | None],
    saved: dict[str, Tensor],
    grads: dict[str, Tensor],
) -> None:
    """Fill the gradients of the floating inputs that are given."""
    query, lse, out = args.query, saved["lse"], saved["out"]
    d_out, d_lse = cotangents["out"], cotangents["lse"]
    d_out = torch.zeros_like(out) if d_out is None else rows_ready(d_out)
    # the key-stationary kernel reads whole tiles of these
    scaled_lse = lse.new_empty(lse.numel() + configs.MAX_BLOCK)
    shared = kernel_inputs(args) | rows("do", d_out, "bht") | residual_ptr(query, saved["residual"])
    shared |= dict(
        scaled_lse_ptr=scaled_lse,
        delta_ptr=torch.empty_like(scaled_lse),
        dlse_ptr=None if d_lse is None else d_lse.contiguous(),
    )
    tiles = row_tiles("segmented_attention_bwd_dq", query, shared)
    own = rows("o", out, "bht") | rows("dq", grads["query"], "bht") | {"lse_ptr": lse}
    programs = n_query_programs(query, tiles)
    launch(segmented_attention_bwd_dq_kernel, programs, tiles, shared, own)

    B, _, T, _ = query.shape
    shared |= {"B": B, "chunk": 0, "segments_ptr": None}
    _launch_dkdv("token", args.key, args.value, grads["key"], grads["value"], 1, shared)
    if args.persistent_key is not None and args.persistent_value is not None:
        tensors = args.persistent_key, args.persistent_value
        Hkv = args.persistent_key.shape[0]
        wanted = min(triton.cdiv(T, MIN_CHUNK), triton.cdiv(N_PARTIALS, max(B * Hkv, 1)))
        chunk = triton.cdiv(T, max(wanted, 1))
        n_parts = triton.cdiv(T, max(chunk, 1))
        # [n_parts * B, Hkv, P, D]
        sums = [
            torch.empty(n_parts * B, *t.shape, dtype=torch.float32, device=t.device)
            for t in tensors
        ]
        key, value = (t.expand(B, -1, -1, -1) for t in tensors)
        _launch_dkdv("persistent", key, value, *sums, n_parts, shared | {"chunk": chunk})
        grads["persistent_key"].copy_(sums[0].sum(0))
        grads["persistent_value"].copy_(sums[1].sum(0))
    if args.memory_key is not None and args.memory_value is not None:
        n_segments = args.memory_key.shape[2]
        if args.cu_seqlens is not None and args.segment_len is not None:
            shared["segments_ptr"] = segment_table(args.cu_seqlens, n_segments, args.segment_len)
        memory = args.memory_key, args.memory_value, grads["memory_key"], grads["memory_value"]
        shared["IS_CAUSAL"] = args.memory_is_causal
        _launch_dkdv("memory", *(t.flatten(2, 3) for t in memory), n_segments, shared)


def _launch_dkdv(
    source: str,
    key: Tensor,
    value: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    n_parts: int,
    shared: dict,
) -> None:
    """Launch the key-stationary kernel for one source of keys ``[B, Hkv, rows, D]``.

    ``shared`` has the arguments that are the same for all sources.
    """
    n_keys = {"token": shared["S"], "persistent": shared["P"], "memory": shared["M"]}[source]
    # a loop over the query heads of a group holds registers that other tiles need
    name = "segmented_attention_bwd_dkdv" + "_grouped" * (shared["G"] > 1)
    config = lookup(name, shared["q_ptr"], shared)
    if source != "token":
        config = config | {"BLOCK_N": block_length(config["BLOCK_N"], n_keys)}
    n_programs = triton.cdiv(n_keys, config["BLOCK_N"]) * n_parts * key.shape[0] * key.shape[1]
    own = rows("k", key, "bht") | rows("v", value, "bht")
    own |= rows("dk", d_key, "bht") | rows("dv", d_value, "bht")
    own |= dict(n_keys=n_keys, n_parts=n_parts, SOURCE=source)
    launch(segmented_attention_bwd_dkdv_kernel, n_programs, config, shared, own)
