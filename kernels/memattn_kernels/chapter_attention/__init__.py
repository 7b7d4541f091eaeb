"""Attention to selected chapters of a bank that the whole batch shares, forward and backward.

The definition is memattn.reference.chapter_attention. The slots of all rows are sorted once into an
index from chapters to rows (``index``), by which the forward finds rows with a chapter in common,
and the gradients of keys and values the rows of a chapter.
"""

import torch
from torch import Tensor

from memattn_kernels._common import check_head_dim, empty_rows
from memattn_kernels._launch import call, empty_gradient, empty_numbers
from memattn_kernels._operator import register
from memattn_kernels.chapter_attention.backward import launch_backward
from memattn_kernels.chapter_attention.forward import launch_forward
from memattn_kernels.signatures import ChapterAttentionArgs


def _empty_results(args: ChapterAttentionArgs) -> tuple[Tensor, ...]:
    """Besides ``out`` and ``lse``: what is rounded off them, sorted slots and the index.

    The gradients of weights, sums in which much cancels, show what half precision rounds off.
    """
    query, (B, N, K), C = args.query, args.indices.shape, args.key.shape[0]
    is_float = query.dtype == torch.float32
    has_rest = args.weights is not None and args.is_joint and not is_float
    new = args.indices.new_empty
    return (
        empty_rows(query, args.value_dim),
        empty_numbers(query),
        empty_numbers(query, is_float),
        empty_rows(query, args.value_dim) if has_rest else query.new_empty(0),
        new(B, N, K),
        new((B, N, K) if args.weights is not None else (0,), dtype=torch.int64),
        new(B * N * K),
        new(C * K + 1),
    )


_operator = register(
    "memattn_kernels::chapter_attention",
    ChapterAttentionArgs,
    results="out lse residual rest slots order entry offset",
    cotangents="out? lse?",
    saved="out lse residual rest slots order entry offset",
    empty_results=_empty_results,
    empty_gradient=empty_gradient,
    forward=launch_forward,
    backward=launch_backward,
)


def chapter_attention(args: ChapterAttentionArgs) -> tuple[Tensor, Tensor]:
    """Return ``out [B, H, T, Dv]`` and ``lse [B, H, T]``."""
    check_head_dim("chapter_value", args.value_dim)
    out, lse, *_ = call(_operator, args)
    return out.to(args.query.dtype), lse
