"""Backward of chapter attention: no atomics, every gradient has one owner.

    d_query, and partial sums of the weights' gradients    the owners of the forward's rows
    d_key, d_value                                         one program per tile of a chapter's keys

Where a chapter fits one tile, the independent form computes its softmax anew in the tile; for a
longer one the query-stationary kernel leaves three numbers of it for each query of a slot.
"""

import torch
import triton
from torch import Tensor

from memattn_kernels._common import block_length, rows, rows_ready
from memattn_kernels._launch import launch, lookup, residual_ptr
from memattn_kernels.chapter_attention.backward_dkdv import chapter_attention_bwd_dkdv_kernel
from memattn_kernels.chapter_attention.backward_dq import PART, chapter_attention_bwd_dq_kernel
from memattn_kernels.chapter_attention.forward import (
    index_inputs,
    index_of,
    is_by_chapter,
    kernel_inputs,
    launch_rows,
    rest_ptr,
    row_config,
)
from memattn_kernels.signatures import ChapterAttentionArgs


def launch_backward(
    args: ChapterAttentionArgs,
    cotangents: dict[str, Tensor | None],
    saved: dict[str, Tensor],
    grads: dict[str, Tensor],
) -> None:
    """Fill the gradients of ``query``, ``weights`` and, if not quantised, ``key``, ``value``."""
    query, lse, slots = args.query, saved["lse"], saved["slots"]
    grads["query"].zero_()
    grads["weights"].zero_()
    if not lse.numel() or not slots.numel():
        grads["key"].zero_()
        grads["value"].zero_()
        return
    (B, H, T, D), (C, Hkv, M, _), n_entries = query.shape, args.key.shape, slots.numel()
    weights = None if args.weights is None else args.weights.gather(-1, saved["order"])
    index = index_of(args, saved)
    d_out, d_lse = cotangents["out"], cotangents["lse"]
    d_out = torch.zeros_like(saved["out"]) if d_out is None else rows_ready(d_out)
    shared = kernel_inputs(args, slots, weights) | residual_ptr(query, saved["residual"])
    config_dkdv = lookup("chapter_attention_bwd_dkdv", query, shared)
    config_dkdv = config_dkdv | {"BLOCK_N": block_length(config_dkdv["BLOCK_N"], M)}
    needs_stats = not args.is_joint and config_dkdv["BLOCK_N"] < M
    stats = lse.new_empty(3, n_entries * Hkv * shared["row_width"]) if needs_stats else None
    shared |= rows("do", d_out, "bht") | dict(
        lse_ptr=lse,
        dlse_ptr=None if d_lse is None else d_lse.contiguous(),
        delta_ptr=torch.empty_like(lse) if args.is_joint else None,
        stat_ptr=stats,
        n_entries=n_entries,
    )
    of_index = index_inputs(args, index)

    own = rows("o", saved["out"], "bht") | rows("dq", grads["query"], "bht")
    own |= rest_ptr(saved["rest"]) | {"acc_ptr": None}
    by_chapter = is_by_chapter(args)
    config = row_config("chapter_attention_bwd_dq", args, shared, by_chapter)
    width = shared["row_width"] * Hkv
    if by_chapter:
        own |= of_index | {"acc_ptr": lse.new_empty(B * T * H, D)}
    else:
        n_inner = triton.cdiv(M, config["BLOCK_N"]) if args.is_joint else 1
        block = config["BLOCK_M"]
        n_parts = triton.cdiv(shared["row_width"], block) * (block // PART.value)
        width = n_inner * Hkv * n_parts
    # empty slots and rows without a query write nothing
    partial = None if weights is None else lse.new_zeros(n_entries, width)
    kernel = chapter_attention_bwd_dq_kernel
    launch_rows(
        kernel, config, args, index if by_chapter else None, shared, own, {"dw_ptr": partial}
    )
    if partial is not None:
        grads["weights"].scatter_(-1, saved["order"], partial.sum(-1).view(slots.shape))

    if args.key_scale is not None:
        return
    own = rows("dk", grads["key"], "chm") | rows("dv", grads["value"], "chm") | of_index
    width = shared["row_width"]
    own |= dict(
        # of each entry, in the order of the index
        weight_ptr=None if weights is None else weights.flatten()[index.entry],
        WIDTH=width if width < config_dkdv["BLOCK_M"] else None,
    )
    if args.row_len == 1 and own["WIDTH"]:  # the row of a filled slot has its query
        own["length_ptr"] = None
    n_programs = C * triton.cdiv(M, config_dkdv["BLOCK_N"]) * Hkv
    launch(chapter_attention_bwd_dkdv_kernel, n_programs, config_dkdv, shared, own)
