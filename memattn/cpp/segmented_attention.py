"""Segmented attention of the C++ extension."""

from torch import Tensor

from memattn.cpp._register import register_cpp
from memattn_kernels.signatures import SegmentedAttentionArgs

_operator = register_cpp("segmented_attention", SegmentedAttentionArgs)


def segmented_attention(args: SegmentedAttentionArgs) -> tuple[Tensor, Tensor]:
    """Return ``out [B, H, T, Dv]`` and ``lse [B, H, T]``."""
    out, lse, _ = _operator(*args)
    return out, lse
