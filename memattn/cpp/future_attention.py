"""Future attention and its loss of the C++ extension."""

import torch
from torch import Tensor

from memattn.cpp._register import empty_results, register_cpp
from memattn_kernels.signatures import FutureAttentionArgs


def _empty_results(args: FutureAttentionArgs) -> tuple[Tensor, ...]:
    """Uninitialised results; of size 0 for an absent loss, whose ``out_future`` is float32."""
    query, has_loss = args.query, args.loss_type is not None
    out, lse, lse2 = empty_results(args)
    dtype = torch.float32 if has_loss else query.dtype
    loss = lse.new_empty(() if has_loss else (0,))
    target = out.new_empty(out.shape if has_loss else (0,), dtype=torch.float32)
    target_lse2 = lse2.new_empty(lse2.shape if has_loss else (0,))
    return out, out.new_empty(out.shape, dtype=dtype), lse, loss, lse2, target, target_lse2


_operator = register_cpp(
    "future_attention",
    FutureAttentionArgs,
    results="out out_future lse loss lse2 target target_lse2",
    cotangents="out out_future? lse loss?",
    saved="out out_future lse2 target target_lse2",
    empty_results=_empty_results,
)


def future_attention(args: FutureAttentionArgs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``out``, ``out_future`` ``[B, H, T, Dv]``, ``lse [B, H, T]`` and the scalar ``loss``.

    Without ``loss_type`` the last has size 0, and ``out_future`` is rounded to the inputs' dtype.
    """
    out, out_future, lse, loss, *_ = _operator(*args)
    return out, out_future, lse, loss
