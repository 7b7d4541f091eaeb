"""Future attention and its loss, forward and backward.

The definition is memattn.reference.future_attention. A query sees one interval of token keys and
one of the table's rows, and what sees a key or a row is one interval of queries, so both
directions walk only tiles that hold an allowed pair (see ``intervals``).
"""

import torch
from torch import Tensor

from memattn_kernels._launch import call, empty_numbers, empty_results, register_triton
from memattn_kernels.future_attention.backward import launch_backward
from memattn_kernels.future_attention.forward import launch_forward
from memattn_kernels.signatures import FutureAttentionArgs


def _empty_results(args: FutureAttentionArgs) -> tuple[Tensor, ...]:
    """Besides ``out``, ``out_future``, ``lse`` and ``loss``: what the backward needs.

    That is the number of positions in the loss, the target, its ``lse`` and what float32 rounds
    off the two ``lse``. Of size 0 are ``loss``, number and target without ``loss_type``, the
    target's ``lse`` also if it is detached, and the last but for float32 inputs.
    """
    out, lse, _ = empty_results(args)
    has_loss = args.loss_type is not None
    has_lse = has_loss and not args.detach_target
    n_residuals = 1 + has_lse if out.dtype == torch.float32 else 0
    return (
        out,
        torch.empty_like(out),
        lse,
        lse.new_empty(() if has_loss else (0,)),
        lse.new_empty(() if has_loss else (0,)),
        torch.empty_like(out) if has_loss else out.new_empty(0),
        empty_numbers(out, has_lse),
        lse.new_empty(n_residuals, *lse.shape),
    )


_operator = register_triton(
    "future_attention",
    FutureAttentionArgs,
    results="out out_future lse loss count target lse_target residual",
    cotangents="out? out_future? lse? loss?",
    saved="out out_future lse count target lse_target residual",
    empty_results=_empty_results,
    forward=launch_forward,
    backward=launch_backward,
)


def future_attention(args: FutureAttentionArgs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``out``, ``out_future`` ``[B, H, T, Dv]``, ``lse [B, H, T]`` and the scalar ``loss``.

    Without ``loss_type`` the last has size 0.
    """
    out, out_future, lse, loss, *_ = call(_operator, args)
    return out.to(args.query.dtype), out_future.to(args.query.dtype), lse, loss
