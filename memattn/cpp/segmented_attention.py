"""Segmented attention of the C++ extension."""

from torch import Tensor

from memattn.cpp._register import empty_results, register_cpp
from memattn_kernels.signatures import SegmentedAttentionArgs

_operator = register_cpp(
    "segmented_attention",
    SegmentedAttentionArgs,
    results="out lse lse2",
    cotangents="out lse",
    saved="out lse2",
    gradients="query key value persistent_key persistent_value memory_key memory_value",
    empty_results=empty_results,
)


def segmented_attention(args: SegmentedAttentionArgs) -> tuple[Tensor, Tensor]:
    """Return ``out [B, H, T, Dv]`` and ``lse [B, H, T]``."""
    out, lse, _ = _operator(*args)
    return out, lse
