"""Backward of attention in branches: no atomics, every gradient has one owner.

    d_query, d_gates    the owners of the forward's rows, in ``backward_dq``
    d_key, d_value      one program per tile of keys of a branch, in ``backward_dkdv``

Rows that are apart in memory follow each other in lists, which the first writes for the second:
keys then walk them as rows of one sequence.
"""

import torch

from memattn_kernels import configs
from memattn_kernels._common import cdiv, rows, rows_ready
from memattn_kernels._launch import launch, lookup
from memattn_kernels._operator import Named
from memattn_kernels.branch_attention.backward_dkdv import branch_attention_bwd_dkdv_kernel
from memattn_kernels.branch_attention.backward_dq import branch_attention_bwd_dq_kernel
from memattn_kernels.branch_attention.forward import kernel_inputs, launch_tiles
from memattn_kernels.branch_attention.index import BranchIndex, entries_before, tokens_of_keys
from memattn_kernels.signatures import BranchAttentionArgs


def launch_backward(
    args: BranchAttentionArgs, cotangents: Named, saved: Named, grads: Named
) -> None:
    """Fill the gradients of ``query``, ``key``, ``value`` and ``gates``."""
    lse = saved["lse"]
    grads["query"].zero_()
    if not lse.numel() or not args.key.numel():
        for name in ("key", "value", "gates"):
            grads[name].zero_()
        return
    index = BranchIndex(saved["entry"], saved["bounds"])
    inputs = kernel_inputs(args, index, saved)
    d_out, d_lse = cotangents["out"], cotangents["lse"]
    d_out = torch.zeros_like(saved["ungated"]) if d_out is None else rows_ready(d_out)
    n_entries, G, D, DV = index.entry.numel(), inputs["G"], inputs["D"], inputs["DV"]
    B, F, Hkv, S = args.key.shape[:4]
    n_list, is_float = n_entries * G, args.query.dtype == torch.float32
    # the key-stationary kernel reads whole tiles of numbers
    new = lambda: lse.new_empty(Hkv * n_list + configs.MAX_BLOCK)
    dots = lse.new_zeros(Hkv, n_entries, G)
    inputs |= dict(
        **rows("do", d_out, "bsht"),
        **rows("dq", grads["query"], "bsht"),
        dlse_ptr=None if d_lse is None else d_lse.contiguous(),
        dot_ptr=dots,
        list_q_ptr=args.query.new_empty(Hkv * n_list, D),
        list_do_ptr=args.query.new_empty(Hkv * n_list, DV),
        list_lse_ptr=new(),
        list_delta_ptr=new(),
        list_residual_ptr=new() if is_float else None,
        list_dlse_ptr=new() if is_float and d_lse is not None else None,
        n_list=n_list,
    )
    launch_tiles(branch_attention_bwd_dq_kernel, "branch_attention_bwd_dq", inputs)
    # inactive slots have no row
    grads["gates"].view(-1).scatter_(0, index.entry.long(), dots.sum((0, 2)))

    token_start, token_end = tokens_of_keys(args)
    inputs |= dict(
        **rows("dk", grads["key"], "bfht"),
        **rows("dv", grads["value"], "bfht"),
        token_start_ptr=token_start,
        token_end_ptr=token_end,
        before_ptr=entries_before(args, index),
    )
    config = lookup("branch_attention_bwd_dkdv", args.query, inputs)
    n_programs = cdiv(S, config["BLOCK_N"]) * B * F * Hkv
    launch(branch_attention_bwd_dkdv_kernel, n_programs, config, inputs)
