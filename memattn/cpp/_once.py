"""Operators that are differentiable once say so, instead of giving wrong second derivatives."""

from typing import Any

import torch
from torch import Tensor


def differentiable_once(backward: str) -> None:
    """Let the gradients that an operator named ``backward`` gives refuse to be differentiated."""
    torch.library.register_autograd(backward, _refuse)


def _refuse(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    raise RuntimeError(
        "memattn's kernels are differentiable once; backend='reference' is as often as you like"
    )
