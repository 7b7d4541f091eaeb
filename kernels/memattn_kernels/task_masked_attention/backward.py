"""Backward of task-masked attention: no atomics, every gradient has one owner.

With P the softmax's weights, dS = P * (d_out V^T - rowsum(out * d_out) + d_lse):

    d_query = scale * dS K        one program per tile of queries, in ``backward_dq``
    d_key = scale * dS^T Q        one program per tile of keys, in ``backward_dkdv``,
    d_value = P^T d_out           which loops over the query heads of its group
"""

import torch
import triton
from torch import Tensor

from memattn_kernels import configs
from memattn_kernels._common import (
    device_guard,
    empty_rows,
    refuse_second_derivative,
    rows,
    rows_ready,
)
from memattn_kernels.task_masked_attention.backward_dkdv import (
    task_masked_attention_bwd_dkdv_kernel,
)
from memattn_kernels.task_masked_attention.backward_dq import task_masked_attention_bwd_dq_kernel
from memattn_kernels.task_masked_attention.forward import mask_inputs, task_masked_attention_op


@torch.library.custom_op("memattn_kernels::task_masked_attention_backward", mutates_args=())
def task_masked_attention_backward_op(
    d_out: Tensor | None,
    d_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    residual: Tensor,
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
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``query``, ``key`` and ``value``."""
    d_query, d_key, d_value = grads = _empty_gradients(query, key, value)
    B, H, T, _ = query.shape
    d_out = torch.zeros_like(out) if d_out is None else rows_ready(d_out)
    # the key-stationary kernel reads whole tiles of these
    scaled_lse = lse.new_empty(lse.numel() + configs.MAX_BLOCK)
    delta = torch.empty_like(scaled_lse)
    inputs = mask_inputs(
        *(query, key, value, task_id, bits, slots, query_node, key_node, query_tiles),
        *(seq_start, seq_end, scale),
    )
    inputs |= rows("do", d_out, "bht") | dict(
        scaled_lse_ptr=scaled_lse,
        delta_ptr=delta,
        dlse_ptr=None if d_lse is None else d_lse.contiguous(),
        residual_ptr=residual if query.dtype == torch.float32 else None,
        IS_CAUSAL=is_causal,
    )
    width = max(inputs["BLOCK_D"], inputs["BLOCK_DV"])
    with device_guard(query):
        if lse.numel():
            config = configs.lookup("task_masked_attention_bwd_dq", query, width)
            task_masked_attention_bwd_dq_kernel[(triton.cdiv(T, config["BLOCK_M"]) * B * H,)](
                **inputs,
                **config,
                **rows("o", rows_ready(out), "bht"),
                **rows("dq", d_query, "bht"),
                tiles_ptr=query_tiles,
                counts_ptr=query_counts,
                lse_ptr=lse,
            )
        config = configs.lookup("task_masked_attention_bwd_dkdv", query, width)
        n_programs = triton.cdiv(key.shape[2], config["BLOCK_N"]) * key.shape[0] * key.shape[1]
        if n_programs:
            task_masked_attention_bwd_dkdv_kernel[(n_programs,)](
                **inputs,
                **config,
                **rows("dk", d_key, "bht"),
                **rows("dv", d_value, "bht"),
                tiles_ptr=key_tiles,
                counts_ptr=key_counts,
            )
    return grads


def _empty_gradients(
    query: Tensor, key: Tensor, value: Tensor, *rest: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients."""
    d_query, d_key, d_value = (empty_rows(t, t.shape[-1]) for t in (query, key, value))
    return d_query, d_key, d_value


@task_masked_attention_backward_op.register_fake
def _(d_out, d_lse, out, lse, residual, query, key, value, *rest):
    return _empty_gradients(query, key, value)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    """Keep the tensors, and the options as they are."""
    ctx.save_for_backward(*output, *inputs[:14])
    ctx.options = inputs[14:]
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out: Tensor | None, d_lse: Tensor | None, _) -> tuple:
    """One gradient or None for each argument of the forward operator."""
    grads = task_masked_attention_backward_op(d_out, d_lse, *ctx.saved_tensors, *ctx.options)
    return *grads, *(None,) * 13


task_masked_attention_op.register_autograd(_backward, setup_context=_setup_context)
task_masked_attention_backward_op.register_autograd(refuse_second_derivative)
