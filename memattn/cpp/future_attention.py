"""Future attention and its loss of the C++ extension: fake kernels and autograd."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import memattn._C  # noqa: F401  registers torch.ops.memattn_cpp
from memattn.cpp._once import differentiable_once

_forward = torch.ops.memattn_cpp.future_attention.default
_backward = torch.ops.memattn_cpp.future_attention_backward.default
_loss_forward = torch.ops.memattn_cpp.future_attention_loss.default
_loss_backward = torch.ops.memattn_cpp.future_attention_loss_backward.default
N_TENSORS = 6  # query, key, value, the table's pair, and future_query
N_BOUNDS = 3  # cu_seqlens, seq_start, seq_end


def future_attention(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``out``, ``out_future`` and ``lse``; the arguments are those of the reference."""
    return _forward(*inputs)[:3]


def future_attention_loss(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``out``, ``loss`` and ``lse``; the arguments are those of the reference."""
    return _loss_forward(*inputs)[:3]


def _wide(query: Tensor, *shape: int | torch.SymInt) -> Tensor:
    return query.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("memattn_cpp::future_attention")
def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shape = query.shape[:3]
    out, out_future = (query.new_empty(*shape, value.shape[-1]) for _ in range(2))
    return out, out_future, _wide(query, *shape), _wide(query, 2, *shape)


@torch.library.register_fake("memattn_cpp::future_attention_loss")
def _fake_loss(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shape, width = query.shape[:3], value.shape[-1]
    out_future, target = (_wide(query, *shape, width) for _ in range(2))
    lse2, target_lse2 = (_wide(query, 2, *shape) for _ in range(2))
    out = query.new_empty(*shape, width)
    return out, _wide(query), _wide(query, *shape), lse2, out_future, target, target_lse2


def _fake_gradients(*inputs: Any) -> tuple[Tensor, ...]:
    query, future_query = inputs[0], inputs[N_TENSORS - 1]
    shape = (0, *query.shape[1:]) if future_query is None else query.shape
    return (*[query.new_empty(t.shape) for t in inputs[: N_TENSORS - 1]], query.new_empty(shape))


@torch.library.register_fake("memattn_cpp::future_attention_backward")
def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(*arguments[6:])  # after 3 cotangents and 3 results


@torch.library.register_fake("memattn_cpp::future_attention_loss_backward")
def _fake_loss_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(*arguments[8:])  # after 3 cotangents and 5 results


def _setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = inputs[: N_TENSORS + N_BOUNDS], inputs[N_TENSORS + N_BOUNDS :]
    # the loss and lse, the third result, are not needed again
    results = [t for i, t in enumerate(output) if t.dim() and i != 2]
    ctx.n_results = len(results)
    ctx.save_for_backward(*results, *tensors)


def _gradients(ctx: Any, backward: Any, cotangents: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: non-reentrant checkpointing frees what it handed out
    grads = backward(*cotangents, *saved, *ctx.options)
    tensors = saved[ctx.n_results :]
    given = (g if t is not None else None for g, t in zip(grads, tensors, strict=False))
    return (*given, *[None] * (N_BOUNDS + len(ctx.options)))


def _backward_formula(
    ctx: Any, d_out: Tensor, d_out_future: Tensor, d_lse: Tensor, *unused: Tensor
) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, _backward, (d_out, d_out_future, d_lse))


def _loss_backward_formula(
    ctx: Any, d_out: Tensor, d_loss: Tensor, d_lse: Tensor, *unused: Tensor
) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, _loss_backward, (d_out, d_loss, d_lse))


torch.library.register_autograd(
    "memattn_cpp::future_attention", _backward_formula, setup_context=_setup_context
)
torch.library.register_autograd(
    "memattn_cpp::future_attention_loss", _loss_backward_formula, setup_context=_setup_context
)
differentiable_once("memattn_cpp::future_attention_backward")
differentiable_once("memattn_cpp::future_attention_loss_backward")
