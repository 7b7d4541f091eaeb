"""Launches of the backward of future attention; what its kernels compute stands beside them.

A shared table is seen by all queries of the batch. Where its tiles alone would leave the card idle
several programs each take some of the queries and write partial sums, added up in a fixed order.
"""

import torch
import triton
from torch import Tensor

from memattn_kernels import configs
from memattn_kernels._common import empty_rows, rows, rows_ready
from memattn_kernels._launch import launch, lookup, n_query_programs
from memattn_kernels.future_attention.backward_kernels import (
    future_attention_bwd_dkdv_kernel,
    future_attention_bwd_dq_kernel,
    future_attention_bwd_table_kernel,
)
from memattn_kernels.future_attention.forward import kernel_inputs
from memattn_kernels.signatures import FutureAttentionArgs

# a partial sum by distance takes at least this many queries, and there are about this many programs
MIN_CHUNK = 1024
N_PROGRAMS = 512


def launch_backward(
    args: FutureAttentionArgs,
    cotangents: dict[str, Tensor | None],
    saved: dict[str, Tensor],
    grads: dict[str, Tensor],
) -> None:
    """Fill the gradients of the floating inputs that are given."""
    query, future_query = args.query, args.future_query
    out, lse, residual = saved["out"], saved["lse"], saved["residual"]
    d_out, d_future_out, d_lse = (cotangents[name] for name in ("out", "out_future", "lse"))
    d_loss = None if args.loss_type is None else cotangents["loss"]
    d_out = torch.zeros_like(out) if d_out is None else rows_ready(d_out)
    # the cotangent of the future part, where that of out is not all of it
    has_own = d_future_out is not None or d_loss is not None
    d_future = empty_rows(query, out.shape[-1]) if has_own else None
    has_target = d_loss is not None and not args.detach_target
    d_target = empty_rows(query, out.shape[-1]) if has_target else None
    # the key-stationary kernels read whole tiles of these
    n_numbers = lse.numel() + configs.MAX_BLOCK
    numbers = [lse.new_empty(n_numbers) for _ in range(4 if has_target else 2)]
    shared = kernel_inputs(args) | dict(
        residual_ptr=residual[0] if len(residual) else None,
        residual_target_ptr=residual[1] if has_target and len(residual) else None,
        scaled_lse_ptr=numbers[0],
        delta_ptr=numbers[1],
        scaled_lse_target_ptr=numbers[2] if has_target else None,
        delta_target_ptr=numbers[3] if has_target else None,
        dlse_ptr=None if d_lse is None else d_lse.contiguous(),
        **rows("dtarget", d_target, "bht"),
        **rows("do", d_out, "bht"),
    )
    # a target with a gradient needs smaller tiles
    suffix = "_target" if has_target else ""
    config = lookup(f"future_attention_bwd_dq{suffix}", query, shared)
    own = dict(
        **rows("o", out, "bht"),
        **rows("of", saved["out_future"] if has_own else None, "bht"),
        **rows("target", saved["target"] if d_loss is not None else None, "bht"),
        **rows("dof", d_future_out, "bht"),
        **rows("dq", grads["query"], "bht"),
        **rows("dfq", None if future_query is None else grads["future_query"], "bht"),
        **rows("df", d_future, "bht"),
        lse_ptr=lse,
        lse_target_ptr=saved["lse_target"] if has_target else None,
        dloss_ptr=None if d_loss is None else d_loss / saved["count"],
    )
    programs = n_query_programs(query, config)
    launch(future_attention_bwd_dq_kernel, programs, config, shared, own)

    config = lookup(f"future_attention_bwd_dkdv{suffix}", query, shared)
    B, Hkv, S, _ = args.key.shape
    own = rows("dk", grads["key"], "bht") | rows("dv", grads["value"], "bht")
    programs = triton.cdiv(S, config["BLOCK_N"]) * B * Hkv
    launch(future_attention_bwd_dkdv_kernel, programs, config, shared, own)

    shared |= rows("do", d_out if d_future is None else d_future, "bht")
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
    n_programs = triton.cdiv(args.table_len, config["BLOCK_N"]) * Hf * n_tables
    if n_programs == 0:
        return
    wanted = triton.cdiv(N_PROGRAMS, n_programs)
    sequences_per_part = max(triton.cdiv(n_sequences, wanted), 1)
    n_parts = max(triton.cdiv(n_sequences, sequences_per_part), 1)
    n_query_parts = 1
    if args.by_distance:
        n_query_parts = min(triton.cdiv(T, MIN_CHUNK), triton.cdiv(wanted, n_parts))
        n_query_parts = max(n_query_parts, 1)
    n_parts *= n_query_parts
    grads = [t.view(-1, *t.shape[-3:]) for t in (d_key, d_value)]
    sums = grads
    if n_parts > 1:
        sums = [
            torch.empty(n_parts * len(t), *t.shape[1:], dtype=torch.float32, device=t.device)
            for t in grads
        ]
    key, value = (t.expand(len(grads[0]), -1, -1, -1) for t in (args.future_key, args.future_value))
    own = dict(
        **rows("k", key, "bht"),
        **rows("v", value, "bht"),
        **rows("dk", sums[0], "bht"),
        **rows("dv", sums[1], "bht"),
        cu_seqlens_ptr=cu_seqlens,
        n_tables=n_tables,
        n_sequences=n_sequences,
        n_query_parts=n_query_parts,
        sequences_per_part=sequences_per_part,
        queries_per_part=triton.cdiv(T, n_query_parts),
    )
    launch(future_attention_bwd_table_kernel, n_programs * n_parts, config, shared, own)
    if n_parts > 1:
        for grad, parts in zip(grads, sums, strict=True):
            torch.sum(parts.unflatten(0, (n_parts, -1)), 0, out=grad)
