"""Segmented attention of the C++ extension: fake kernels and autograd."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import memattn._C  # noqa: F401  registers torch.ops.memattn_cpp
from memattn.cpp._once import differentiable_once

_forward = torch.ops.memattn_cpp.segmented_attention.default
_backward = torch.ops.memattn_cpp.segmented_attention_backward.default
N_TENSORS = 7  # query, key, value, and the persistent and memory pairs
N_BOUNDS = 3  # cu_seqlens, seq_start, seq_end


def segmented_attention(*inputs: Any) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse``; the arguments are those of the reference, in its order."""
    return _forward(*inputs)[:2]


@torch.library.register_fake("memattn_cpp::segmented_attention")
def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shape = query.shape[:3]
    lse, lse2 = (query.new_empty(s, dtype=torch.float32) for s in (shape, (2, *shape)))
    return query.new_empty(*shape, value.shape[-1]), lse, lse2


@torch.library.register_fake("memattn_cpp::segmented_attention_backward")
def _fake_backward(
    d_out: Tensor, d_lse: Tensor, out: Tensor, lse2: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    query = inputs[0]
    grads = [query.new_empty(t.shape) for t in inputs[:3]]
    for t in inputs[3:5]:
        grads.append(query.new_empty((0, 0, query.shape[-1]) if t is None else t.shape))
    for t in inputs[5:N_TENSORS]:
        grads.append(query.new_empty((0, 0, 0, 0, query.shape[-1]) if t is None else t.shape))
    return tuple(grads)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = inputs[: N_TENSORS + N_BOUNDS], inputs[N_TENSORS + N_BOUNDS :]
    out, _, lse2 = output
    ctx.save_for_backward(out, lse2, *tensors)


def _backward_formula(
    ctx: Any, d_out: Tensor, d_lse: Tensor, d_lse2: Tensor
) -> tuple[Tensor | None, ...]:
    out, lse2, *tensors = ctx.saved_tensors
    grads = _backward(d_out, d_lse, out, lse2, *tensors, *ctx.options)
    given = (g if t is not None else None for g, t in zip(grads, tensors, strict=False))
    return (*given, *[None] * (N_BOUNDS + len(ctx.options)))


torch.library.register_autograd(
    "memattn_cpp::segmented_attention", _backward_formula, setup_context=_setup_context
)
differentiable_once("memattn_cpp::segmented_attention_backward")
