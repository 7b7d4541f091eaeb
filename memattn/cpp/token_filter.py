"""A causal depthwise filter over tokens, SiLU and unit vectors, in one pass over memory.

What a neural memory does to its queries, keys and values behind their projections; torch runs some
twenty operations for it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from memattn.cpp._register import register_cpp


class TokenFilterArgs(NamedTuple):
    """Arguments of the filter, float32 on the CPU and contiguous."""

    gradients = "inputs weight"

    inputs: Tensor  # [B, S, F], of which the last `length` tokens are filtered
    weight: Tensor  # [size, F], the filter of a token itself first, then of those before it
    positions: Tensor | None  # int64 [length] in packed documents: before 0 nothing is seen
    length: int
    unit_features: int  # the first features, vectors that are divided by their length
    head_dim: int  # features of each of these vectors


def _empty_results(args: TokenFilterArgs) -> tuple[Tensor]:
    B, _, F = args.inputs.shape
    return (args.inputs.new_empty(B, args.length, F),)


_operator: Callable[..., Any] = register_cpp(
    "token_filter",
    TokenFilterArgs,
    results="out",
    cotangents="out",
    saved="",
    empty_results=_empty_results,
)


def token_filter(args: TokenFilterArgs) -> Tensor:
    """The filtered tokens ``[B, length, F]``; differentiable once."""
    return _operator(*args)
