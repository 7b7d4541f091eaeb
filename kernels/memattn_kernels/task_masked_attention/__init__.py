"""Attention under the mask of a task, forward and backward.

The definition is memattn.reference.task_masked_attention. A mask lists the tiles of 128 queries by
128 keys that hold an allowed pair, for tiles of queries and for tiles of keys, so both directions
walk only these (see ``tiles``).
"""

from torch import Tensor

from memattn_kernels._launch import call, empty_gradient, empty_results
from memattn_kernels._operator import register
from memattn_kernels.signatures import TaskMaskedAttentionArgs
from memattn_kernels.task_masked_attention.backward import launch_backward
from memattn_kernels.task_masked_attention.forward import launch_forward

_operator = register(
    "memattn_kernels::task_masked_attention",
    TaskMaskedAttentionArgs,
    results="out lse residual",
    cotangents="out? lse?",
    saved="out lse residual",
    gradients="query key value",
    empty_results=empty_results,
    empty_gradient=empty_gradient,
    forward=launch_forward,
    backward=launch_backward,
)


def task_masked_attention(args: TaskMaskedAttentionArgs) -> tuple[Tensor, Tensor]:
    """Return ``out [B, H, T, Dv]`` and ``lse [B, H, T]``."""
    out, lse, _ = call(_operator, args)
    return out.to(args.query.dtype), lse
