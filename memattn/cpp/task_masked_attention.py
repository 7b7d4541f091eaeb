"""Task-masked attention of the C++ extension: fake kernels and autograd."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import memattn._C  # noqa: F401  registers torch.ops.memattn_cpp
from memattn.cpp._once import differentiable_once

_forward = torch.ops.memattn_cpp.task_masked_attention.default
_backward = torch.ops.memattn_cpp.task_masked_attention_backward.default
N_OPTIONS = 2  # is_causal and scale, after all tensors


def task_masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    task_id: Tensor,
    bits: Tensor,
    slots: Tensor | None,
    query_node: Tensor | None,
    key_node: Tensor | None,
    query_tiles: Tensor,
    query_counts: Tensor,
    key_tiles: Tensor,
    key_counts: Tensor,
    *bounds_and_options: Any,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse``; the mask is the fields of ``MaskTensors``.

    Both passes go through the tiles of queries, so the lists by tiles of keys are not read.
    """
    mask = (bits, slots, query_node, key_node, query_tiles, query_counts)
    return _forward(query, key, value, task_id, *mask, *bounds_and_options)[:2]


@torch.library.register_fake("memattn_cpp::task_masked_attention")
def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shape = query.shape[:3]
    lse, lse2 = (query.new_empty(s, dtype=torch.float32) for s in (shape, (2, *shape)))
    return query.new_empty(*shape, value.shape[-1]), lse, lse2


@torch.library.register_fake("memattn_cpp::task_masked_attention_backward")
def _fake_backward(
    d_out: Tensor, d_lse: Tensor, out: Tensor, lse2: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    return tuple(inputs[0].new_empty(t.shape) for t in inputs[:3])


def _setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = inputs[:-N_OPTIONS], inputs[-N_OPTIONS:]
    out, _, lse2 = output
    ctx.save_for_backward(out, lse2, *tensors)


def _backward_formula(
    ctx: Any, d_out: Tensor, d_lse: Tensor, d_lse2: Tensor
) -> tuple[Tensor | None, ...]:
    out, lse2, *tensors = ctx.saved_tensors
    grads = _backward(d_out, d_lse, out, lse2, *tensors, *ctx.options)
    return (*grads, *[None] * (len(tensors) - len(grads) + N_OPTIONS))


torch.library.register_autograd(
    "memattn_cpp::task_masked_attention", _backward_formula, setup_context=_setup_context
)
differentiable_once("memattn_cpp::task_masked_attention_backward")
