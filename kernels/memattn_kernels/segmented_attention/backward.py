"""Backward of segmented attention: no atomics, every gradient has one owner.

With P the softmax's weights, dS = P * (d_out V^T - rowsum(out * d_out) + d_lse):

    d_query = scale * dS K        one program per tile of queries, in ``backward_dq``
    d_key = scale * dS^T Q        one program per tile of keys, in ``backward_dkdv``,
    d_value = P^T d_out           which loops over the query heads of its group

A persistent key is seen by all queries of the batch: its programs each take a chunk of queries and
write a partial sum, added up in a fixed order.
"""

import torch

from memattn_kernels._launch import backward_inputs, key_rows, launch_keys, launch_queries, parts_of
from memattn_kernels._operator import Named
from memattn_kernels.segmented_attention.backward_dkdv import segmented_attention_bwd_dkdv_kernel
from memattn_kernels.segmented_attention.backward_dkdv_plain import launch_dkdv_plain
from memattn_kernels.segmented_attention.backward_dq import segmented_attention_bwd_dq_kernel
from memattn_kernels.segmented_attention.forward import kernel_inputs, tile_lengths
from memattn_kernels.segmented_attention.intervals import segment_table
from memattn_kernels.segmented_attention.plain import plain_config, plain_form
from memattn_kernels.signatures import SegmentedAttentionArgs


def launch_backward(
    args: SegmentedAttentionArgs, cotangents: Named, saved: Named, grads: Named
) -> None:
    """Fill the gradients of the floating inputs that are given."""
    shared = kernel_inputs(args) | backward_inputs(args, cotangents, saved, grads)
    name = "segmented_attention_bwd_dq"
    launch_queries(segmented_attention_bwd_dq_kernel, name, shared, **tile_lengths(shared))

    B, _, T, _ = args.query.shape
    shared |= {"B": B, "chunk": 0, "segments_ptr": None}
    # a loop over the query heads of a group, or a cap, holds registers that other tiles need
    is_grouped = shared["G"] > 1 or args.softcap is not None
    name = "segmented_attention_bwd_dkdv" + "_grouped" * is_grouped
    form = "" if is_grouped else plain_form(args)
    entry, config = plain_config(name, form, shared, "T")
    if config is not None:
        launch_dkdv_plain(shared, config)
    else:
        _launch_dkdv(entry, "token", shared["S"], 1, shared)
    if args.persistent_key is not None and args.persistent_value is not None:
        tensors = args.persistent_key, args.persistent_value
        n_parts, chunk = parts_of(T, B * len(args.persistent_key))
        # [n_parts * B, Hkv, P, D]
        sums = [t.new_empty(n_parts * B, *t.shape, dtype=torch.float32) for t in tensors]
        own = key_rows(*(t.expand(B, -1, -1, -1) for t in tensors), *sums) | {"chunk": chunk}
        _launch_dkdv(name, "persistent", shared["P"], n_parts, shared | own)
        grads["persistent_key"].copy_(sums[0].sum(0))
        grads["persistent_value"].copy_(sums[1].sum(0))
    if args.memory_key is not None and args.memory_value is not None:
        n_segments = args.memory_key.shape[2]
        if args.cu_seqlens is not None and args.segment_len is not None:
            shared["segments_ptr"] = segment_table(args.cu_seqlens, n_segments, args.segment_len)
        memory = args.memory_key, args.memory_value, grads["memory_key"], grads["memory_value"]
        own = key_rows(*(t.flatten(2, 3) for t in memory)) | {"IS_CAUSAL": args.memory_is_causal}
        _launch_dkdv(name, "memory", shared["M"], n_segments, shared | own)


def _launch_dkdv(name: str, source: str, n_keys: int, n_parts: int, inputs: dict) -> None:
    """Launch the key-stationary kernel for one source, with ``n_keys`` keys in each part."""
    inputs = inputs | dict(n_keys=n_keys, n_parts=n_parts, SOURCE=source)
    own_keys = None if source == "token" else n_keys
    launch_keys(segmented_attention_bwd_dkdv_kernel, name, inputs, own_keys)
