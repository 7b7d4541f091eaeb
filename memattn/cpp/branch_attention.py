"""Attention in branches of the C++ extension."""

import torch
from torch import Tensor

from memattn.cpp._register import register_cpp
from memattn_kernels.signatures import BranchAttentionArgs


def _empty_results(args: BranchAttentionArgs) -> tuple[Tensor, ...]:
    """``out``, ``lse`` and ``lse2`` as of other operators, and the results before the gates."""
    query, shape = args.query, args.query.shape[:4]
    lse, lse2 = (query.new_empty(s, dtype=torch.float32) for s in (shape, (2, *shape)))
    out, ungated = (query.new_empty(*shape, args.value.shape[-1]) for _ in range(2))
    return out, lse, lse2, ungated


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
