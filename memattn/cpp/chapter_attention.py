"""Attention to selected chapters of the C++ extension."""

from torch import Tensor

from memattn.cpp._register import empty_results, register_cpp
from memattn_kernels.signatures import ChapterAttentionArgs


def _empty_results(args: ChapterAttentionArgs) -> tuple[Tensor, ...]:
    """Uninitialised results and the index of both passes: bounds of lists, a flag, the lists."""
    n_slots, n_chapters = args.indices.numel(), args.key.shape[0]
    return *empty_results(args, args.value_dim), args.indices.new_empty(n_chapters + 2 + n_slots)


_operator = register_cpp(
    "chapter_attention",
    ChapterAttentionArgs,
    results="out lse lse2 index",
    cotangents="out lse",
    saved="out lse2 index",
    empty_results=_empty_results,
)


def chapter_attention(args: ChapterAttentionArgs) -> tuple[Tensor, Tensor]:
    """Return ``out [B, H, T, Dv]`` and ``lse [B, H, T]``."""
    out, lse, *_ = _operator(*args)
    return out, lse
