"""Segmented sliding-window attention with persistent and memory keys, forward and backward.

The definition is memattn.reference.segmented_attention. What a query may see is one interval of
columns in each of three key sources, and what sees a key is one interval of queries, so both
directions walk only tiles that hold an allowed pair (see ``intervals``).
"""

from torch import Tensor

from memattn_kernels._launch import call, register_triton
from memattn_kernels.segmented_attention.backward import launch_backward
from memattn_kernels.segmented_attention.forward import launch_forward
from memattn_kernels.signatures import SegmentedAttentionArgs

_operator = register_triton(
    "segmented_attention",
    SegmentedAttentionArgs,
    forward=launch_forward,
    backward=launch_backward,
)


def segmented_attention(args: SegmentedAttentionArgs) -> tuple[Tensor, Tensor]:
    """Return ``out [B, H, T, Dv]`` and ``lse [B, H, T]``."""
    out, lse, _ = call(_operator, args)
    return out.to(args.query.dtype), lse
