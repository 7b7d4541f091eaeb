"""Sublayers of a decoder for float32 training on the CPU, with few passes over memory and few saved
tensors.

Each operator is differentiable once. It runs the products with the weights and one pass between
them, where modules of torch run many operations. The backward pass recomputes norms and gates
instead of saving them.
"""

from typing import Any

import torch
from torch import Tensor

import memattn._C  # noqa: F401  the kernels of torch.ops.memattn_cpp
from memattn.cpp.products import product, product_add, weight_gradient
from memattn_kernels._operator import refuse_second_derivative

_rows = torch.ops.memattn_cpp


@torch.library.custom_op("memattn_cpp::attention_inputs", mutates_args=())
def attention_inputs(
    hidden: Tensor,
    norm: Tensor,
    q_proj: Tensor,
    k_proj: Tensor,
    v_proj: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query ``[B, H, T, D]``, key and value ``[B, Hkv, T, D]`` of normed ``hidden [B, T, E]``.

    Queries and keys are rotated by ``cos`` and ``sin [B or 1, 1, T, D/2]`` if these are given. The
    last result is the scale of each row, ``[B T]``, for the backward.
    """
    B, T, E = hidden.shape
    normed, scale = _rows.norm_rows(hidden.view(B * T, E), norm, eps)
    projected = (product(normed, weight) for weight in (q_proj, k_proj, v_proj))
    query, key, value = (x.view(B, T, -1, head_dim).transpose(1, 2) for x in projected)
    if cos is not None and sin is not None:
        _rows.rotate_heads(query, cos, sin)
        _rows.rotate_heads(key, cos, sin)
    return query, key, value, scale


@attention_inputs.register_fake
def _(hidden, norm, q_proj, k_proj, v_proj, cos, sin, eps, head_dim):
    B, T, _ = hidden.shape
    heads = (
        hidden.new_empty(B, T, len(w) // head_dim, head_dim).transpose(1, 2)
        for w in (q_proj, k_proj, v_proj)
    )
    return (*heads, hidden.new_empty(B * T))


@torch.library.custom_op("memattn_cpp::attention_inputs_backward", mutates_args=())
def _attention_inputs_backward(
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    scale: Tensor,
    hidden: Tensor,
    norm: Tensor,
    q_proj: Tensor,
    k_proj: Tensor,
    v_proj: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = hidden.view(-1, hidden.shape[-1])
    d_joined = _rows.join_heads(*map(_with_features_in_a_row, (d_query, d_key, d_value)), cos, sin)
    sizes = [len(w) for w in (q_proj, k_proj, v_proj)]
    d_normed = product(d_joined, torch.cat([q_proj, k_proj, v_proj]).t())
    d_hidden, d_norm = _rows.norm_rows_backward(d_normed, rows, norm, scale, None)
    if not weights:
        q, k, v = (norm.new_empty(0) for _ in sizes)
        return d_hidden.view_as(hidden), d_norm, q, k, v
    joined = weight_gradient(d_joined, _rows.norm_rows_again(rows, norm, scale))
    d_q, d_k, d_v = (x.clone() for x in joined.split(sizes))
    return d_hidden.view_as(hidden), d_norm, d_q, d_k, d_v


@_attention_inputs_backward.register_fake
def _(d_query, d_key, d_value, scale, hidden, norm, q_proj, k_proj, v_proj, cos, sin, weights):
    made = [torch.empty_like(w) if weights else norm.new_empty(0) for w in (q_proj, k_proj, v_proj)]
    return torch.empty_like(hidden), torch.empty_like(norm), *made


def _save_attention_inputs(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, norm, q_proj, k_proj, v_proj, cos, sin, _, ctx.head_dim = inputs
    ctx.save_for_backward(output[3], hidden, norm, q_proj, k_proj, v_proj, cos, sin)
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _differentiate_attention_inputs(ctx: Any, d_query, d_key, d_value, _) -> tuple:
    needed, kept = ctx.needs_input_grad, ctx.saved_tensors
    B, T, _ = kept[1].shape
    grads = []
    for grad, weight in zip((d_query, d_key, d_value), kept[3:6], strict=True):
        if grad is None:
            heads = len(weight) // ctx.head_dim
            grad = weight.new_zeros(B, T, heads, ctx.head_dim).transpose(1, 2)
        grads.append(grad)
    found = torch.ops.memattn_cpp.attention_inputs_backward(*grads, *kept, any(needed[2:5]))
    return *(x if need else None for x, need in zip(found, needed[:5], strict=True)), *[None] * 4


attention_inputs.register_autograd(
    _differentiate_attention_inputs, setup_context=_save_attention_inputs
)


@torch.library.custom_op("memattn_cpp::attention_output", mutates_args=())
def attention_output(attended: Tensor, o_proj: Tensor, residual: Tensor) -> Tensor:
    """``residual [B, T, E]`` and the projection of ``attended [B, H, T, D]``."""
    B, T, E = residual.shape
    merged = attended.transpose(1, 2).reshape(B * T, -1)
    return product_add(merged, o_proj, residual.view(B * T, E)).view(B, T, E)


@attention_output.register_fake
def _(attended, o_proj, residual):
    return torch.empty_like(residual)


@torch.library.custom_op("memattn_cpp::attention_output_backward", mutates_args=())
def _attention_output_backward(
    d_out: Tensor, attended: Tensor, o_proj: Tensor, weights: bool
) -> tuple[Tensor, Tensor]:
    B, H, T, D = attended.shape
    d_rows = d_out.contiguous().view(B * T, -1)
    d_attended = product(d_rows, o_proj.t()).view(B, T, H, D).transpose(1, 2)
    if not weights:
        return d_attended, o_proj.new_empty(0)
    return d_attended, weight_gradient(d_rows, attended.transpose(1, 2).reshape(B * T, -1))


@_attention_output_backward.register_fake
def _(d_out, attended, o_proj, weights):
    B, H, T, D = attended.shape
    d_attended = attended.new_empty(B, T, H, D).transpose(1, 2)
    return d_attended, torch.empty_like(o_proj) if weights else o_proj.new_empty(0)


def _save_attention_output(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate_attention_output(ctx: Any, d_out: Tensor) -> tuple:
    needed = ctx.needs_input_grad
    d_attended = d_weight = None
    if any(needed[:2]):
        d_attended, d_weight = torch.ops.memattn_cpp.attention_output_backward(
            d_out, *ctx.saved_tensors, needed[1]
        )
    return d_attended, d_weight if needed[1] else None, d_out


attention_output.register_autograd(
    _differentiate_attention_output, setup_context=_save_attention_output
)


@torch.library.custom_op("memattn_cpp::swiglu_layer", mutates_args=())
def swiglu_layer(
    hidden: Tensor,
    norm: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``hidden [B, T, E]`` and the MLP of its norm; scales, gates and ups for the backward."""
    rows = hidden.view(-1, hidden.shape[-1])
    normed, scale = _rows.norm_rows(rows, norm, eps)
    gate, up = product(normed, gate_proj), product(normed, up_proj)
    out = product_add(_rows.gate_rows(gate, up), down_proj, rows)
    return out.view_as(hidden), scale, gate, up


@swiglu_layer.register_fake
def _(hidden, norm, gate_proj, up_proj, down_proj, eps):
    n = hidden.shape[0] * hidden.shape[1]
    inner = [hidden.new_empty(n, len(gate_proj)) for _ in range(2)]
    return torch.empty_like(hidden), hidden.new_empty(n), *inner


@torch.library.custom_op("memattn_cpp::swiglu_layer_backward", mutates_args=())
def _swiglu_layer_backward(
    d_out: Tensor,
    scale: Tensor,
    gate: Tensor,
    up: Tensor,
    hidden: Tensor,
    norm: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = hidden.view(-1, hidden.shape[-1])
    d_rows = d_out.contiguous().view_as(rows)
    d_gate, d_up, inner = _rows.gate_rows_backward(product(d_rows, down_proj.t()), gate, up)
    d_normed = product_add(d_up, up_proj.t(), product(d_gate, gate_proj.t()))
    d_hidden, d_norm = _rows.norm_rows_backward(d_normed, rows, norm, scale, d_rows)
    if not weights:
        gate, up, down = (norm.new_empty(0) for _ in range(3))
        return d_hidden.view_as(hidden), d_norm, gate, up, down
    d_down = weight_gradient(d_rows, inner)
    normed = _rows.norm_rows_again(rows, norm, scale)
    d_weights = weight_gradient(d_gate, normed), weight_gradient(d_up, normed), d_down
    return d_hidden.view_as(hidden), d_norm, *d_weights


@_swiglu_layer_backward.register_fake
def _(d_out, scale, gate, up, hidden, norm, gate_proj, up_proj, down_proj, weights):
    all_weights = (gate_proj, up_proj, down_proj)
    made = [torch.empty_like(w) if weights else norm.new_empty(0) for w in all_weights]
    return torch.empty_like(hidden), torch.empty_like(norm), *made


def _save_swiglu_layer(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:5])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # the backward would get zeros as large as those


def _differentiate_swiglu_layer(ctx: Any, d_out: Tensor, *_: Any) -> tuple:
    needed = ctx.needs_input_grad
    found = torch.ops.memattn_cpp.swiglu_layer_backward(d_out, *ctx.saved_tensors, any(needed[2:5]))
    return *(x if need else None for x, need in zip(found, needed[:5], strict=True)), None


swiglu_layer.register_autograd(_differentiate_swiglu_layer, setup_context=_save_swiglu_layer)


for _name in ("attention_inputs", "attention_output", "swiglu_layer"):
    torch.library.register_autograd(f"memattn_cpp::{_name}_backward", refuse_second_derivative)


def _with_features_in_a_row(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
