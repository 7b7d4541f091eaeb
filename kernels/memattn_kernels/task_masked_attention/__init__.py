"""Attention under the mask of a task, forward and backward.

The definition is memattn.reference.task_masked_attention. A mask lists the tiles of 128 queries by
128 keys that hold an allowed pair, for tiles of queries and for tiles of keys, so both directions
walk only these (see ``tiles``).
"""

from memattn_kernels.task_masked_attention.backward import task_masked_attention_backward_op
from memattn_kernels.task_masked_attention.forward import (
    task_masked_attention,
    task_masked_attention_op,
)

__all__ = [
    "task_masked_attention",
    "task_masked_attention_backward_op",
    "task_masked_attention_op",
]
