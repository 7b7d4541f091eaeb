"""Backward of segmented attention: no atomics, every gradient has one owner.

With P the softmax's weights, dS = P * (d_out V^T - rowsum(out * d_out) + d_lse):

    d_query = scale * dS K        one program per tile of queries, in ``backward_dq``
    d_key = scale * dS^T Q        one program per tile of keys, in ``backward_dkdv``,
    d_value = P^T d_out           which loops over the query heads of its group

A persistent key is seen by all queries of the batch: its programs each take a chunk of queries and
write a partial sum, added up in a fixed order.
"""

import torch
import triton
from torch import Tensor

from memattn_kernels import configs
from memattn_kernels._common import (
    block_length,
    device_guard,
    empty_rows,
    refuse_second_derivative,
    rows,
    rows_ready,
)
from memattn_kernels.segmented_attention.backward_dkdv import segmented_attention_bwd_dkdv_kernel
from memattn_kernels.segmented_attention.backward_dq import segmented_attention_bwd_dq_kernel
from memattn_kernels.segmented_attention.forward import (
    kernel_inputs,
    row_tiles,
    segmented_attention_op,
)
from memattn_kernels.segmented_attention.intervals import segment_table

# a partial sum of the persistent gradients takes at least this many queries, and there are about
# this many partial sums, which fill any card
MIN_CHUNK = 1024
N_PARTIALS = 512


@torch.library.custom_op("memattn_kernels::segmented_attention_backward", mutates_args=())
def segmented_attention_backward_op(
    d_out: Tensor | None,
    d_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    residual: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    persistent_key: Tensor | None,
    persistent_value: Tensor | None,
    memory_key: Tensor | None,
    memory_value: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    segment_len: int | None,
    window_size: int | None,
    is_causal: bool,
    memory_is_causal: bool,
    query_offset: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the seven floating inputs, of size 0 for those not given."""
    tensors = (query, key, value, persistent_key, persistent_value, memory_key, memory_value)
    bounds = (cu_seqlens, seq_start, seq_end)
    d_query, d_key, d_value, d_pk, d_pv, d_mk, d_mv = grads = _empty_gradients(*tensors)
    B, H, T, D = query.shape
    d_out = torch.zeros_like(out) if d_out is None else rows_ready(d_out)
    d_lse = None if d_lse is None else d_lse.contiguous()
    # the key-stationary kernel reads whole tiles of these
    scaled_lse = lse.new_empty(lse.numel() + configs.MAX_BLOCK)
    delta = torch.empty_like(scaled_lse)
    inputs = kernel_inputs(*tensors, *bounds, segment_len, window_size, query_offset, scale)
    cotangents = rows("do", d_out, "bht") | {
        "scaled_lse_ptr": scaled_lse,
        "delta_ptr": delta,
        "dlse_ptr": d_lse,
        "residual_ptr": residual if query.dtype == torch.float32 else None,
    }

    with device_guard(query):
        if lse.numel():
            tiles = row_tiles("segmented_attention_bwd_dq", query, inputs)
            segmented_attention_bwd_dq_kernel[(triton.cdiv(T, tiles["BLOCK_M"]) * B * H,)](
                **inputs,
                **tiles,
                **cotangents,
                **rows("o", rows_ready(out), "bht"),
                **rows("dq", d_query, "bht"),
                lse_ptr=lse,
                IS_CAUSAL=is_causal,
                MEMORY_IS_CAUSAL=memory_is_causal,
            )
        shared = inputs | cotangents | {"B": B, "chunk": 0, "segments_ptr": None}
        _launch_dkdv("token", query, key, value, d_key, d_value, key.shape[2], 1, is_causal, shared)
        if persistent_key is not None and persistent_value is not None:
            Hkv, P, _ = persistent_key.shape
            wanted = min(triton.cdiv(T, MIN_CHUNK), triton.cdiv(N_PARTIALS, max(B * Hkv, 1)))
            chunk = triton.cdiv(T, max(wanted, 1))
            n_parts = triton.cdiv(T, max(chunk, 1))
            # [n_parts * B, Hkv, P, D]
            sums = [
                torch.empty(n_parts * B, *t.shape, dtype=torch.float32, device=t.device)
                for t in (persistent_key, persistent_value)
            ]
            _launch_dkdv(
                "persistent", query, persistent_key.expand(B, -1, -1, -1),
                persistent_value.expand(B, -1, -1, -1), *sums, P, n_parts, is_causal,
                shared | {"chunk": chunk},
            )  # fmt: skip
            d_pk.copy_(sums[0].sum(0))
            d_pv.copy_(sums[1].sum(0))
        if memory_key is not None and memory_value is not None:
            n_segments, M = memory_key.shape[2:4]
            if cu_seqlens is not None and segment_len is not None:
                shared["segments_ptr"] = segment_table(cu_seqlens, n_segments, segment_len)
            _launch_dkdv(
                "memory", query, memory_key.flatten(2, 3), memory_value.flatten(2, 3),
                d_mk.flatten(2, 3), d_mv.flatten(2, 3), M, n_segments, memory_is_causal, shared,
            )  # fmt: skip
    return grads


def _launch_dkdv(source: str, query: Tensor, key: Tensor, value: Tensor, d_key: Tensor,
                 d_value: Tensor, n_keys: int, n_parts: int, is_causal: bool,
                 shared: dict) -> None:  # fmt: skip
    """Launch the key-stationary kernel for one source of keys ``[B, Hkv, rows, D]``.

    ``shared`` has the arguments that are the same for all sources; what the kernel does not take
    stays behind.
    """
    # a loop over the query heads of a group holds registers that other tiles need
    name = "segmented_attention_bwd_dkdv" + "_grouped" * (shared["G"] > 1)
    config = configs.lookup(name, query, max(shared["BLOCK_D"], shared["BLOCK_DV"]))
    if source != "token":
        config = config | {"BLOCK_N": block_length(config["BLOCK_N"], n_keys)}
    n_programs = triton.cdiv(n_keys, config["BLOCK_N"]) * n_parts * key.shape[0] * key.shape[1]
    if n_programs == 0:
        return
    arguments = shared | rows("k", key, "bht") | rows("v", value, "bht")
    arguments |= rows("dk", d_key, "bht") | rows("dv", d_value, "bht")
    arguments |= dict(n_keys=n_keys, n_parts=n_parts, SOURCE=source, IS_CAUSAL=is_causal)
    kernel = segmented_attention_bwd_dkdv_kernel
    taken = {name: value for name, value in arguments.items() if name in kernel.arg_names}
    kernel[(n_programs,)](**taken, **config)


def _empty_gradients(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor | None) -> tuple:
    """Uninitialised gradients of the seven floating inputs."""
    grads = [empty_rows(t, t.shape[-1]) for t in (query, key, value)]
    grads += [query.new_empty(0) if t is None else t.new_empty(t.shape) for t in rest]
    return tuple(grads)


@segmented_attention_backward_op.register_fake
def _(d_out, d_lse, out, lse, residual, query, key, value, pk, pv, mk, mv, *rest):
    return _empty_gradients(query, key, value, pk, pv, mk, mv)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    """Keep the tensors, and the options as they are."""
    ctx.save_for_backward(*output, *inputs[:10])
    ctx.options = inputs[10:]
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out: Tensor | None, d_lse: Tensor | None, _) -> tuple:
    """One gradient or None for each argument of the forward operator."""
    tensors = ctx.saved_tensors
    grads = segmented_attention_backward_op(d_out, d_lse, *tensors, *ctx.options)
    given = zip(grads, tensors[3:], strict=False)
    return *(None if t is None else grad for grad, t in given), *(None,) * 9


segmented_attention_op.register_autograd(_backward, setup_context=_setup_context)
segmented_attention_backward_op.register_autograd(refuse_second_derivative)
