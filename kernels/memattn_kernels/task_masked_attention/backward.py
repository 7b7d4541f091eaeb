"""Backward of task-masked attention: no atomics, every gradient has one owner.

With P the softmax's weights, dS = P * (d_out V^T - rowsum(out * d_out) + d_lse):

    d_query = scale * dS K        one program per tile of queries, in ``backward_dq``
    d_key = scale * dS^T Q        one program per tile of keys, in ``backward_dkdv``,
    d_value = P^T d_out           which loops over the query heads of its group
"""

import torch
import triton
from torch import Tensor

from memattn_kernels import configs
from memattn_kernels._common import rows, rows_ready
from memattn_kernels._launch import launch, lookup, n_query_programs, residual_ptr
from memattn_kernels.signatures import TaskMaskedAttentionArgs
from memattn_kernels.task_masked_attention.backward_dkdv import (
    task_masked_attention_bwd_dkdv_kernel,
)
from memattn_kernels.task_masked_attention.backward_dq import task_masked_attention_bwd_dq_kernel
from memattn_kernels.task_masked_attention.forward import kernel_inputs


def launch_backward(
    args: TaskMaskedAttentionArgs,
    cotangents: dict[str, Tensor | None],
    saved: dict[str, Tensor],
    grads: dict[str, Tensor],
) -> None:
    """Fill the gradients of ``query``, ``key`` and ``value``."""
    query, key, lse, out = args.query, args.key, saved["lse"], saved["out"]
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
    config = lookup("task_masked_attention_bwd_dq", query, shared)
    own = rows("o", out, "bht") | rows("dq", grads["query"], "bht")
    own |= dict(tiles_ptr=args.query_tiles, counts_ptr=args.query_counts, lse_ptr=lse)
    programs = n_query_programs(query, config)
    launch(task_masked_attention_bwd_dq_kernel, programs, config, shared, own)

    config = lookup("task_masked_attention_bwd_dkdv", query, shared)
    own = rows("dk", grads["key"], "bht") | rows("dv", grads["value"], "bht")
    own |= dict(tiles_ptr=args.key_tiles, counts_ptr=args.key_counts)
    programs = triton.cdiv(key.shape[2], config["BLOCK_N"]) * key.shape[0] * key.shape[1]
    launch(task_masked_attention_bwd_dkdv_kernel, programs, config, shared, own)
