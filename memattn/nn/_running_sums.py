"""Running sums within each sequence of a row, in an order that the batch does not change."""

import torch
from torch import Tensor
from torch.nn import functional as F


def shift(x: Tensor, n: int, index: Tensor) -> Tensor:
    """``x [B, N, E]`` of the block ``n`` positions earlier; 0 if ``index [B, N]`` has none."""
    moved = F.pad(x, (0, 0, n, 0)).narrow(1, 0, x.shape[1])
    return torch.where((index >= n)[..., None], moved, 0.0)


def running_sum(x: Tensor, index: Tensor) -> Tensor:
    """Sum over all blocks up to each; its order depends only on ``index``.

    In a traced graph, whose steps cannot depend on the length, it is a difference of sums over
    the row.
    """
    if torch.compiler.is_compiling():
        total, columns = x.cumsum(1), torch.arange(x.shape[1], device=x.device)
        before = F.pad(total, (0, 0, 1, 0)).narrow(1, 0, x.shape[1])
        first = (columns - index.clamp(min=0)).clamp(min=0)[..., None]
        return total - before.gather(1, first.expand_as(x))
    span = 1
    while span < x.shape[1]:
        x = x + shift(x, span, index)
        span *= 2
    return x


def window_sum(x: Tensor, index: Tensor, n: int) -> Tensor:
    """Sum over the last ``n`` blocks up to each, in ``log n`` steps of a fixed order."""
    total, length = torch.zeros_like(x), 0
    power, span = x, 1  # sums over the last `span` blocks
    while n >= span:
        if n & span:
            total = total + shift(power, length, index) if length else power
            length += span
        if n >= 2 * span:
            power = power + shift(power, span, index)
        span *= 2
    return total
