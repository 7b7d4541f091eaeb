"""Task-masked attention of the C++ extension.

Both passes go through the tiles of queries, so the mask's lists by tiles of keys are not read.
"""

from torch import Tensor

from memattn.cpp._register import register_cpp
from memattn_kernels.signatures import TaskMaskedAttentionArgs

_operator = register_cpp("task_masked_attention", TaskMaskedAttentionArgs)


def task_masked_attention(args: TaskMaskedAttentionArgs) -> tuple[Tensor, Tensor]:
    """Return ``out [B, H, T, Dv]`` and ``lse [B, H, T]``."""
    out, lse, _ = _operator(*args)
    return out, lse
