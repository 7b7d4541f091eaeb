"""Convert attention masks to the bounds of sequences."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memattn.checks import check_tensor, must, plain_values
from memattn.parts.state import SequenceBounds
from memattn.parts.token_order import TokenOrder


class MaskBlocks(NamedTuple):
    """Bounds of each row's tokens, and the order of columns that they refer to."""

    start: Tensor  # int64 [B], column of the first token; the number of columns where there is none
    end: Tensor  # int64 [B], the column after the last token
    order: TokenOrder | None  # None means the columns as they are


def read_mask(
    attention_mask: Tensor, begun: Tensor | None = None, *, order_traced: bool = True
) -> MaskBlocks:
    """Bounds of each row's tokens; rows with holes get a new order of columns.

    Values are checked, which waits for the device. While a graph is traced they are not checked,
    and an order is always returned.

    Args:
        attention_mask: ``[B, T]``, 1 for tokens.
        begun: bool ``[B]``, rows that continue earlier calls, so that no padding may come before
            their tokens; None means no row.
        order_traced: False for a traced graph that cannot reorder columns; it raises for holes.

    Raises:
        ValueError: If a value is neither 0 nor 1.
    """
    ones = attention_mask != 0
    start, end = _bounds(ones)
    order = None
    if not torch.compiler.is_compiling():
        holes = ones.sum(1) != end - start
        if begun is not None:
            holes = holes | (begun & (start > 0) & (start < end))
        if (holes | (ones & (attention_mask != 1)).any(1)).any():
            _check_values(attention_mask)
            order = TokenOrder.of(ones, begun)
    elif not order_traced:
        whole = (ones.sum(1) == end - start).all()
        check = torch._assert_async  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
        check(whole, "attention_mask must have no holes in a compiled program")
    elif ones.shape[1] > 1:
        order = TokenOrder.of(ones, begun)
    if order is not None:
        start, end = _bounds(order.put(ones))
    return MaskBlocks(start, end, order)


def _bounds(ones: Tensor) -> tuple[Tensor, Tensor]:
    """First column of the ones of each row and the column after the last one, int64 ``[B]``.

    Both are the number of columns for a row without ones.
    """
    S = ones.shape[1]
    columns = torch.arange(S, device=ones.device)
    start = torch.where(ones, columns, S).amin(1)
    end = torch.where(ones, columns + 1, 0).amax(1)
    return start, torch.where(start == S, S, end)


def _check_values(attention_mask: Tensor) -> None:
    """Raise unless all values are 0 or 1."""
    wrong = ((attention_mask != 0) & (attention_mask != 1)).any(1)
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        got = f"{_shorten(plain_values(attention_mask[row]))} in row {row}"
        must("attention_mask", "be 1 for tokens and 0 for padding", got)


def check_mask(attention_mask: Tensor, batch_size: int, lengths: tuple[int, ...]) -> None:
    """Raise unless the mask is ``[B, S]`` with one of the ``lengths``."""
    check_tensor("attention_mask", attention_mask)
    shape = list(attention_mask.shape)
    # compared one by one: under tracing, "in" does not find a number among symbolic ones
    known = len(shape) == 2 and any(shape[1] == length for length in lengths)
    if not known or shape[0] != batch_size:
        allowed = " or ".join(f"[B={batch_size}, {length}]" for length in dict.fromkeys(lengths))
        must("attention_mask", f"have shape {allowed}", shape)


def mask_bounds(
    attention_mask: Tensor | None, B: int, T: int, cu_seqlens: Tensor | None
) -> tuple[SequenceBounds, TokenOrder | None]:
    """The bounds given by a mask without a cache, and the order of columns they refer to."""
    if attention_mask is None:
        return SequenceBounds(None, None), None
    if cu_seqlens is not None:
        must("attention_mask", "be None with cu_seqlens", "a tensor")
    check_mask(attention_mask, B, (T,))
    start, end, order = read_mask(attention_mask)
    if not torch.compiler.is_compiling() and not start.any() and (end == T).all():
        return SequenceBounds(None, None), None
    return SequenceBounds(start.to(torch.int32), end.to(torch.int32)), order


def check_positions(position_ids: Tensor, positions: Tensor, attention_mask: Tensor | None) -> None:
    """Raise unless ``position_ids`` equal the model's own positions, except for padding."""
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
    """Raise if a token is at a position for which the model has no parameters."""
    T = positions.shape[1]
    if max_length is None or max_length >= T or torch.compiler.is_compiling():
        return
    if attention_mask is not None:
        positions = positions.masked_fill(attention_mask == 0, 0)
    check_longest(positions + 1, max_length)


def check_longest(lengths: Tensor, max_length: int) -> None:
    """Raise if one of the lengths exceeds the model's maximum."""
    longest = int(lengths.max())
    if longest > max_length:
        limit = f"max_position_embeddings={max_length}"
        must("input_ids", f"have at most {limit} tokens a row", longest)


def _shorten(values: list[Any]) -> str:
    """The values as text, at most 16 of them."""
    return str(values) if len(values) <= 16 else f"{str(values[:16])[:-1]}, ...]"
