"""Where sequences begin and end: from attention masks to bounds."""

import torch
from torch import Tensor

from memattn.ops._checks import check_tensor, must

BLOCK = "be 0 or 1, with one contiguous block of ones in each row"


def block_bounds(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """First column of the ones of each row and the column after the last one, int64 ``[B]``.

    A row without ones gives the number of columns twice. Values are checked on the way, which
    waits for the device, but not while a graph is traced.

    Raises:
        ValueError: If a row's ones are not one contiguous block.
    """
    S = attention_mask.shape[1]
    ones = attention_mask != 0
    columns = torch.arange(S, device=ones.device)
    start = torch.where(ones, columns, S).amin(1)
    end = torch.where(ones, columns + 1, 0).amax(1)
    end = torch.where(start == S, S, end)
    if not torch.compiler.is_compiling():
        holes = ones.sum(1) != end - start
        wrong = holes | (ones & (attention_mask != 1)).any(1)
        if wrong.any():
            row = int(wrong.nonzero()[0, 0])
            must("attention_mask", BLOCK, f"{_shorten(attention_mask[row].tolist())} in row {row}")
    return start, end


def check_mask(attention_mask: Tensor, batch_size: int, lengths: tuple[int, ...]) -> None:
    """Raise unless the mask is ``[B, S]`` with one of the ``lengths``."""
    check_tensor("attention_mask", attention_mask)
    shape = list(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch_size or shape[1] not in lengths:
        allowed = " or ".join(f"[B={batch_size}, {length}]" for length in dict.fromkeys(lengths))
        must("attention_mask", f"have shape {allowed}", shape)


def _shorten(values: list) -> str:
    """The values as text, at most 16 of them."""
    return str(values) if len(values) <= 16 else f"{str(values[:16])[:-1]}, ...]"
