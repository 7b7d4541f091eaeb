"""Backward of task-masked attention: no atomics, every gradient has one owner.

With P the softmax's weights, dS = P * (d_out V^T - rowsum(out * d_out) + d_lse):

    d_query = scale * dS K        one program per tile of queries, in ``backward_dq``
    d_key = scale * dS^T Q        one program per tile of keys, in ``backward_dkdv``,
    d_value = P^T d_out           which loops over the query heads of its group
"""

from memattn_kernels._launch import backward_inputs, launch_keys, launch_queries
from memattn_kernels._operator import Named
from memattn_kernels.signatures import TaskMaskedAttentionArgs
from memattn_kernels.task_masked_attention.backward_dkdv import (
    task_masked_attention_bwd_dkdv_kernel,
)
from memattn_kernels.task_masked_attention.backward_dq import task_masked_attention_bwd_dq_kernel
from memattn_kernels.task_masked_attention.forward import kernel_inputs


def launch_backward(
    args: TaskMaskedAttentionArgs, cotangents: Named, saved: Named, grads: Named
) -> None:
    """Fill the gradients of ``query``, ``key`` and ``value``."""
    inputs = kernel_inputs(args) | backward_inputs(args, cotangents, saved, grads)
    launch_queries(task_masked_attention_bwd_dq_kernel, "task_masked_attention_bwd_dq", inputs)
    inputs |= dict(tiles_ptr=args.key_tiles, counts_ptr=args.key_counts)
    launch_keys(task_masked_attention_bwd_dkdv_kernel, "task_masked_attention_bwd_dkdv", inputs)
