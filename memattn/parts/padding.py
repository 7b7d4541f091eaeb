"""Where sequences begin and end: from attention masks to bounds."""

import torch
from torch import Tensor

from memattn.checks import check_tensor, must
from memattn.parts.state import SequenceBounds

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
    # one by one: a traced "in" does not find a number among symbolic ones
    known = len(shape) == 2 and any(shape[1] == length for length in lengths)
    if not known or shape[0] != batch_size:
        allowed = " or ".join(f"[B={batch_size}, {length}]" for length in dict.fromkeys(lengths))
        must("attention_mask", f"have shape {allowed}", shape)


def mask_bounds(
    attention_mask: Tensor | None, B: int, T: int, cu_seqlens: Tensor | None
) -> SequenceBounds:
    """The bounds that a padding mask describes, without a cache."""
    if attention_mask is None:
        return SequenceBounds(None, None)
    if cu_seqlens is not None:
        must("attention_mask", "be None with cu_seqlens", "a tensor")
    check_mask(attention_mask, B, (T,))
    start, end = block_bounds(attention_mask)
    if not torch.compiler.is_compiling() and not start.any() and (end == T).all():
        return SequenceBounds(None, None)
    return SequenceBounds(start.to(torch.int32), end.to(torch.int32))


def check_positions(position_ids: Tensor, positions: Tensor, attention_mask: Tensor | None) -> None:
    """Raise unless ``position_ids`` are the positions that the model counts, but for padding."""
    T = positions.shape[1]
    if position_ids.dim() != 2 or position_ids.shape[1] != T:
        must("position_ids", f"have shape [B, T={T}]", list(position_ids.shape))
    if torch.compiler.is_compiling():
        return
    wrong = position_ids != positions
    if attention_mask is not None:
        wrong = wrong & (attention_mask[:, -T:] != 0)
    if wrong.any():
        must(
            "position_ids",
            "count from the start of each sequence (packed documents are given by cu_seqlens)",
            f"others in row {int(wrong.nonzero()[0, 0])}",
        )


def check_lengths(positions: Tensor, attention_mask: Tensor | None, max_length: int | None) -> None:
    """Raise if a token stands at a position that the model has no parameters for."""
    T = positions.shape[1]
    if max_length is None or max_length >= T or torch.compiler.is_compiling():
        return
    if attention_mask is not None:
        positions = positions.masked_fill(attention_mask == 0, 0)
    check_longest(positions + 1, max_length)


def check_longest(lengths: Tensor, max_length: int) -> None:
    """Raise if one of the lengths is above the model's longest."""
    longest = int(lengths.max())
    if longest > max_length:
        limit = f"max_position_embeddings={max_length}"
        must("input_ids", f"have at most {limit} tokens a row", longest)


def _shorten(values: list) -> str:
    """The values as text, at most 16 of them."""
    return str(values) if len(values) <= 16 else f"{str(values[:16])[:-1]}, ...]"
