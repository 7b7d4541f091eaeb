"""Attention under the mask of a task, forward and backward.

The definition is memattn.reference.task_masked_attention. A mask lists the tiles of 128 queries by
128 keys that hold an allowed pair, for tiles of queries and for tiles of keys, so both directions
walk only these (see ``tiles``).
"""

from torch import Tensor

from memattn_kernels._launch import call, register_triton
from memattn_kernels.signatures import TaskMaskedAttentionArgs
from memattn_kernels.task_masked_attention.backward import launch_backward
from memattn_kernels.task_masked_attention.forward import launch_forward

_operator = register_triton(
    "task_masked_attention",
    TaskMaskedAttentionArgs,
    forward=launch_forward,
    backward=launch_backward,
)


def task_masked_attention(args: TaskMaskedAttentionArgs) -> tuple[Tensor, Tensor]:
    """Return ``out [B, H, T, Dv]`` and ``lse [B, H, T]``."""
    out, lse, _ = call(_operator, args)
    return out.to(args.query.dtype), lse
