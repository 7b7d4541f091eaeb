"""Attention in branches of the C++ extension."""

from torch import Tensor

from memattn.cpp._register import empty_results, register_cpp
from memattn_kernels.signatures import BranchAttentionArgs


def _empty_results(args: BranchAttentionArgs) -> tuple[Tensor, ...]:
    """Uninitialised results, those before the gates included."""
    out, lse, lse2 = empty_results(args)
    return out, lse, lse2, out.new_empty(out.shape)


_operator = register_cpp(
    "branch_attention",
    BranchAttentionArgs,
    results="out lse lse2 ungated",
    saved="lse2 ungated",
    empty_results=_empty_results,
)


def branch_attention(args: BranchAttentionArgs) -> tuple[Tensor, Tensor]:
    """Return ``out [B, A, H, T, Dv]`` and ``lse [B, A, H, T]``."""
    out, lse, *_ = _operator(*args)
    return out, lse
