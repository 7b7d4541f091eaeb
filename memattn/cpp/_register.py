"""Register an operator of ``memattn._C``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import memattn._C  # noqa: F401  the kernels of torch.ops.memattn_cpp
from memattn_kernels._operator import Named, register


def register_cpp(name: str, arguments: Any, **named: Any) -> Callable[..., tuple[Tensor, ...]]:
    """``register`` for the C++ operator of this name, whose gradients are contiguous.

    Arguments that ``named`` leaves out are those of an operator with the results of
    ``empty_results``. Quantised inputs have a gradient of size 0.
    """
    usual: Named = dict(
        results="out lse lse2",
        cotangents="out lse",
        saved="out lse2",
        empty_results=empty_results,
        empty_gradient=lambda _, tensor: tensor.new_empty(
            tensor.shape if tensor.is_floating_point() else 0
        ),
    )
    return register(f"memattn_cpp::{name}", arguments, **usual | named)


def empty_results(args: Any, value_dim: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised ``out``, ``lse`` and ``lse2``, the lse in units of log 2 as two floats."""
    query, shape = args.query, args.query.shape[:-1]
    lse, lse2 = (query.new_empty(s, dtype=torch.float32) for s in (shape, (2, *shape)))
    value_dim = args.value.shape[-1] if value_dim is None else value_dim
    return query.new_empty(*shape, value_dim), lse, lse2
