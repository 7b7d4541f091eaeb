"""Backward of future attention as an operator; what its kernels compute stands beside them.

A shared table is seen by all queries of the batch. Where its tiles alone would leave the card idle
several programs each take some of the queries and write partial sums, added up in a fixed order.
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
from memattn_kernels.future_attention.backward_kernels import (
    future_attention_bwd_dkdv_kernel,
    future_attention_bwd_dq_kernel,
    future_attention_bwd_table_kernel,
)
from memattn_kernels.future_attention.forward import (
    future_attention_op,
    kernel_inputs,
    tile_width,
)

# a partial sum by distance takes at least this many queries, and there are about this many programs
MIN_CHUNK = 1024
N_PROGRAMS = 512

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("memattn_kernels::future_attention_backward", mutates_args=())
def future_attention_backward_op(
    d_out: Tensor | None,
    d_out_future: Tensor | None,
    d_lse: Tensor | None,
    d_loss: Tensor | None,
    out: Tensor,
    out_future: Tensor,
    lse: Tensor,
    count: Tensor,
    target: Tensor,
    lse_target: Tensor,
    residual: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    future_key: Tensor,
    future_value: Tensor,
    future_query: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    table_len: int,
    by_distance: bool,
    future_dim: int,
    query_offset: int,
    scale: float,
    loss_type: str | None,
    detach_target: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six floating inputs, of size 0 for a future query that is not given."""
    tensors = (query, key, value, future_key, future_value, future_query)
    d_query, d_key, d_value, d_fk, d_fv, d_fq = grads = _empty_gradients(*tensors)
    inputs = kernel_inputs(
        *(*tensors, cu_seqlens, seq_start, seq_end, table_len, by_distance, future_dim),
        *(query_offset, scale),
    )
    B, H, T, _ = query.shape
    if loss_type is None:
        d_loss = None
    d_out = torch.zeros_like(out) if d_out is None else rows_ready(d_out)
    # the cotangent of the future part, where that of out is not all of it
    has_own = d_out_future is not None or d_loss is not None
    d_future = empty_rows(query, out.shape[-1]) if has_own else None
    has_target = d_loss is not None and not detach_target
    d_target = empty_rows(query, out.shape[-1]) if has_target else None
    # the key-stationary kernels read whole tiles of these
    n_numbers = lse.numel() + configs.MAX_BLOCK
    numbers = [lse.new_empty(n_numbers) for _ in range(4 if has_target else 2)]
    kept = {
        "residual_ptr": residual[0] if len(residual) else None,
        "residual_target_ptr": residual[1] if has_target and len(residual) else None,
        "scaled_lse_ptr": numbers[0],
        "delta_ptr": numbers[1],
        "scaled_lse_target_ptr": numbers[2] if has_target else None,
        "delta_target_ptr": numbers[3] if has_target else None,
        "dlse_ptr": None if d_lse is None else d_lse.contiguous(),
        **rows("dtarget", d_target, "bht"),
    }

    with device_guard(query):
        if lse.numel():
            config = _config("bwd_dq", has_target, query, inputs)
            future_attention_bwd_dq_kernel[(triton.cdiv(T, config["BLOCK_M"]) * B * H,)](
                **inputs,
                **config,
                **kept,
                **rows("do", d_out, "bht"),
                **rows("o", out, "bht"),
                **rows("of", out_future if has_own else None, "bht"),
                **rows("target", target if d_loss is not None else None, "bht"),
                **rows("dof", d_out_future, "bht"),
                **rows("dq", d_query, "bht"),
                **rows("dfq", None if future_query is None else d_fq, "bht"),
                **rows("df", d_future, "bht"),
                lse_ptr=lse,
                lse_target_ptr=lse_target if has_target else None,
                dloss_ptr=None if d_loss is None else d_loss / count,
                IS_COSINE=loss_type == "cosine",
            )
        _launch_dkdv(query, d_key, d_value, inputs, kept | rows("do", d_out, "bht"))
        kept |= rows("do", d_out if d_future is None else d_future, "bht")
        kept |= rows("q", query if future_query is None else future_query, "bht")
        _launch_table(query, future_key, future_value, cu_seqlens, d_fk, d_fv, inputs | kept)
    return grads


def _config(kernel: str, has_target: bool, query: Tensor, inputs: dict) -> dict[str, int]:
    """The configuration of a kernel, which needs smaller tiles for a target with a gradient."""
    name = f"future_attention_{kernel}" + "_target" * has_target
    return configs.lookup(name, query, tile_width(inputs))


def _launch_dkdv(query: Tensor, d_key: Tensor, d_value: Tensor, inputs: dict, kept: dict) -> None:
    """Launch the kernel that owns the token keys."""
    config = _config("bwd_dkdv", kept["dtarget_ptr"] is not None, query, inputs)
    B, Hkv, S, _ = d_key.shape
    n_programs = triton.cdiv(S, config["BLOCK_N"]) * B * Hkv
    if n_programs == 0:
        return
    kernel = future_attention_bwd_dkdv_kernel
    kernel[(n_programs,)](
        **_arguments(kernel, inputs | kept),
        **config,
        **rows("dk", d_key, "bht"),
        **rows("dv", d_value, "bht"),
    )


def _arguments(kernel: triton.JITFunction, inputs: dict) -> dict:
    """Those of the inputs that the kernel has."""
    return {name: value for name, value in inputs.items() if name in kernel.arg_names}


def _launch_table(
    query: Tensor,
    future_key: Tensor,
    future_value: Tensor,
    cu_seqlens: Tensor | None,
    d_key: Tensor,
    d_value: Tensor,
    inputs: dict,
) -> None:
    """Launch the kernel that owns the rows of the table, and add up its parts."""
    config = _config("bwd_table", False, query, inputs)
    table_len, by_distance, T = inputs["table_len"], inputs["BY_DISTANCE"], inputs["T"]
    n_tables, n_sequences = 1, query.shape[0]
    if inputs["PER_DOCUMENT"]:
        n_tables, n_sequences = future_key.shape[-2] // table_len, 1
    elif future_key.dim() == 4:
        n_tables, n_sequences = n_sequences, 1
    elif cu_seqlens is not None and by_distance:  # all queries see all rows
        inputs["seq_end_ptr"], cu_seqlens = cu_seqlens[-1:], None
    elif cu_seqlens is not None:
        n_sequences = cu_seqlens.numel() - 1

    Hf = future_key.shape[-3]
    n_programs = triton.cdiv(table_len, config["BLOCK_N"]) * Hf * n_tables
    if n_programs == 0:
        return
    wanted = triton.cdiv(N_PROGRAMS, n_programs)
    sequences_per_part = max(triton.cdiv(n_sequences, wanted), 1)
    n_parts = max(triton.cdiv(n_sequences, sequences_per_part), 1)
    n_query_parts = 1
    if by_distance:
        n_query_parts = min(triton.cdiv(T, MIN_CHUNK), triton.cdiv(wanted, n_parts))
        n_query_parts = max(n_query_parts, 1)
    n_parts *= n_query_parts
    grads = [t.view(-1, *t.shape[-3:]) for t in (d_key, d_value)]
    sums = grads
    if n_parts > 1:
        sums = [
            torch.empty(n_parts * len(t), *t.shape[1:], dtype=torch.float32, device=t.device)
            for t in grads
        ]
    tables = [t.expand(len(grads[0]), -1, -1, -1) for t in (future_key, future_value)]
    inputs |= rows("k", tables[0], "bht") | rows("v", tables[1], "bht")
    kernel = future_attention_bwd_table_kernel
    kernel[(n_programs * n_parts,)](
        **_arguments(kernel, inputs),
        **config,
        **rows("dk", sums[0], "bht"),
        **rows("dv", sums[1], "bht"),
        cu_seqlens_ptr=cu_seqlens,
        n_tables=n_tables,
        n_sequences=n_sequences,
        n_query_parts=n_query_parts,
        sequences_per_part=sequences_per_part,
        queries_per_part=triton.cdiv(T, n_query_parts),
    )
    if n_parts > 1:
        for grad, parts in zip(grads, sums, strict=True):
            torch.sum(parts.unflatten(0, (n_parts, -1)), 0, out=grad)


def _empty_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    future_key: Tensor,
    future_value: Tensor,
    future_query: Tensor | None,
) -> Gradients:
    """Uninitialised gradients of the six floating inputs."""
    return (
        *(empty_rows(t, t.shape[-1]) for t in (query, key, value)),
        *(t.new_empty(t.shape) for t in (future_key, future_value)),
        query.new_empty(0) if future_query is None else empty_rows(query, query.shape[-1]),
    )


@future_attention_backward_op.register_fake
def _(d_out, d_out_future, d_lse, d_loss, out, out_future, lse, count, target, lse_target, residual,
      *inputs):  # fmt: skip
    return _empty_gradients(*inputs[:6])


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    """Keep the tensors but the loss, and the options as they are."""
    out, out_future, lse, _, *rest = output
    ctx.save_for_backward(out, out_future, lse, *rest, *inputs[:9])
    ctx.options = inputs[9:]
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, d_out_future, d_lse, d_loss, *_) -> tuple:
    """One gradient or None for each argument of the forward operator."""
    tensors = ctx.saved_tensors
    grads = future_attention_backward_op(d_out, d_out_future, d_lse, d_loss, *tensors, *ctx.options)
    given = zip(grads, tensors[7:13], strict=True)
    return *(None if t is None else grad for grad, t in given), *(None,) * 10


future_attention_op.register_autograd(_backward, setup_context=_setup_context)
future_attention_backward_op.register_autograd(refuse_second_derivative)
