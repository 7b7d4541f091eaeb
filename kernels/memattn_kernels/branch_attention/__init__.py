"""Attention in branches, forward and backward.

The definition is memattn.reference.branch_attention. A row is a slot of a token, for one head. Rows
of inactive slots are left out: the others are sorted once by branch and token (``index``), so that
a tile has rows of one branch of one sequence, which see its keys from the first to one of their
own.
"""

import torch
from torch import Tensor

from memattn_kernels._launch import call, empty_numbers
from memattn_kernels._operator import register
from memattn_kernels.branch_attention.backward import launch_backward
from memattn_kernels.branch_attention.forward import launch_forward
from memattn_kernels.branch_attention.index import n_units
from memattn_kernels.signatures import BranchAttentionArgs


def _empty_results(args: BranchAttentionArgs) -> tuple[Tensor, ...]:
    """Besides ``out`` and ``lse``: what is rounded off ``lse``, ``out`` before gates, the index."""
    query = args.query
    return (
        _empty_slots(query, args.value.shape[-1]),
        empty_numbers(query),
        empty_numbers(query, query.dtype == torch.float32),
        _empty_slots(query, args.value.shape[-1]),
        query.new_empty(args.gates.numel(), dtype=torch.int32),
        query.new_empty(n_units(args) + 1, dtype=torch.int32),
    )


def _empty_slots(like: Tensor, width: int) -> Tensor:
    """Uninitialised ``[B, A, H, T, width]`` in the memory order of ``like``."""
    order = sorted(range(4), key=lambda axis: -like.stride(axis))
    sizes = [like.shape[axis] for axis in order]
    return like.new_empty(*sizes, width).permute(*(order.index(axis) for axis in range(4)), 4)


def _empty_gradient(name: str, tensor: Tensor) -> Tensor:
    """The uninitialised gradient of an argument."""
    if name == "gates":
        return tensor.new_empty(tensor.shape)
    return _empty_slots(tensor, tensor.shape[-1])


_operator = register(
    "memattn_kernels::branch_attention",
    BranchAttentionArgs,
    results="out lse residual ungated entry bounds",
    cotangents="out? lse?",
    saved="lse residual ungated entry bounds",
    empty_results=_empty_results,
    empty_gradient=_empty_gradient,
    forward=launch_forward,
    backward=launch_backward,
)


def branch_attention(args: BranchAttentionArgs) -> tuple[Tensor, Tensor]:
    """Return ``out [B, A, H, T, Dv]`` and ``lse [B, A, H, T]``."""
    out, lse, *_ = call(_operator, args)
    return out.to(args.query.dtype), lse
