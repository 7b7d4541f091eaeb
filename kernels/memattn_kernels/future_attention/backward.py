"""Launches of the backward of future attention; what its kernels compute stands beside them.

A shared table is seen by all queries of the batch. Where its tiles alone would leave the card idle
several programs each take some of the queries and write partial sums, added up in a fixed order.
"""

import torch
from torch import Tensor

from memattn_kernels._common import cdiv, empty_rows, rows
from memattn_kernels._launch import (
    backward_inputs,
    key_rows,
    launch,
    launch_keys,
    launch_queries,
    lookup,
    parts_of,
)
from memattn_kernels._operator import Named
from memattn_kernels.future_attention.backward_kernels import (
    future_attention_bwd_dkdv_kernel,
    future_attention_bwd_dq_kernel,
    future_attention_bwd_table_kernel,
)
from memattn_kernels.future_attention.forward import kernel_inputs
from memattn_kernels.signatures import FutureAttentionArgs


def launch_backward(
    args: FutureAttentionArgs, cotangents: Named, saved: Named, grads: Named
) -> None:
    """Fill the gradients of the floating inputs that are given."""
    query, future_query, residual = args.query, args.future_query, saved["residual"]
    shared = kernel_inputs(args) | backward_inputs(args, cotangents, saved, grads)
    # the cotangent of the future part, where that of out is not all of it
    d_out_future = cotangents["out_future"]
    d_loss = None if args.loss_type is None else cotangents["loss"]
    has_own = d_out_future is not None or d_loss is not None
    d_future = empty_rows(query, args.value.shape[-1]) if has_own else None
    has_target = d_loss is not None and not args.detach_target
    d_target = empty_rows(query, args.value.shape[-1]) if has_target else None
    shared |= dict(
        **rows("of", saved["out_future"] if has_own else None, "bht"),
        **rows("target", saved["target"] if d_loss is not None else None, "bht"),
        **rows("dof", d_out_future, "bht"),
        **rows("dfq", None if future_query is None else grads["future_query"], "bht"),
        **rows("df", d_future, "bht"),
        **rows("dtarget", d_target, "bht"),
        lse_target_ptr=saved["lse_target"] if has_target else None,
        residual_target_ptr=residual[1] if has_target and len(residual) else None,
        scaled_lse_target_ptr=torch.empty_like(shared["scaled_lse_ptr"]) if has_target else None,
        delta_target_ptr=torch.empty_like(shared["delta_ptr"]) if has_target else None,
        dloss_ptr=None if d_loss is None else d_loss / saved["count"],
    )
    # a target with a gradient needs smaller tiles
    suffix = "_target" if has_target else ""
    launch_queries(future_attention_bwd_dq_kernel, f"future_attention_bwd_dq{suffix}", shared)
    launch_keys(future_attention_bwd_dkdv_kernel, f"future_attention_bwd_dkdv{suffix}", shared)
    if d_future is not None:
        shared |= rows("do", d_future, "bht")
    shared |= rows("q", query if future_query is None else future_query, "bht")
    _launch_table(args, grads["future_key"], grads["future_value"], shared)


def _launch_table(args: FutureAttentionArgs, d_key: Tensor, d_value: Tensor, shared: dict) -> None:
    """Launch the kernel that owns the rows of the table, and add up its parts."""
    config = lookup("future_attention_bwd_table", args.query, shared)
    cu_seqlens, T = args.cu_seqlens, args.query.shape[2]
    n_tables, n_sequences = 1, args.query.shape[0]
    if shared["PER_DOCUMENT"]:
        n_tables, n_sequences = args.future_key.shape[-2] // args.table_len, 1
    elif args.future_key.dim() == 4:
        n_tables, n_sequences = n_sequences, 1
    elif cu_seqlens is not None and args.by_distance:  # all queries see all rows
        shared["seq_end_ptr"], cu_seqlens = cu_seqlens[-1:], None
    elif cu_seqlens is not None:
        n_sequences = cu_seqlens.numel() - 1

    Hf = args.future_key.shape[-3]
    n_programs = cdiv(args.table_len, config["BLOCK_N"]) * Hf * n_tables
    n_parts, sequences_per_part = parts_of(n_sequences, n_programs, shortest=1)
    n_query_parts, queries_per_part = 1, T
    if args.by_distance:
        n_query_parts, queries_per_part = parts_of(T, n_programs * n_parts)
    n_parts *= n_query_parts
    grads = [t.view(-1, *t.shape[-3:]) for t in (d_key, d_value)]
    sums = grads
    if n_parts > 1:
        sums = [t.new_empty(n_parts * len(t), *t.shape[1:], dtype=torch.float32) for t in grads]
    key, value = (t.expand(len(grads[0]), -1, -1, -1) for t in (args.future_key, args.future_value))
    own = dict(
        **key_rows(key, value, *sums),
        cu_seqlens_ptr=cu_seqlens,
        n_tables=n_tables,
        n_sequences=n_sequences,
        n_query_parts=n_query_parts,
        sequences_per_part=sequences_per_part,
        queries_per_part=queries_per_part,
    )
    launch(future_attention_bwd_table_kernel, n_programs * n_parts, config, shared, own)
    if n_parts > 1:
        for grad, parts in zip(grads, sums, strict=True):
            grad.copy_(parts.unflatten(0, (n_parts, -1)).sum(0))
