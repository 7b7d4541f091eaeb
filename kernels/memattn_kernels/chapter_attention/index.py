"""Slots in rising order, and which routing rows select a chapter: torch operations of static shape.

Nothing here waits for a device, so it can be captured in a CUDA graph. Routing row ``r`` is row
``r % N`` of sequence ``r // N``. An *entry* is a filled slot, numbered ``r * K + slot``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from memattn_kernels._launch import tiles_of_groups
from memattn_kernels.signatures import ChapterAttentionArgs


def sort_slots(args: ChapterAttentionArgs) -> tuple[Tensor, Tensor | None]:
    """Chapters of each row in rising order, C where a slot is empty, and what was where.

    A slot is empty if it names no chapter, if its row has no query, and, in the joint form, if its
    weight is 0 or less. Slots of one chapter are in the order of their weights, so that the order
    of slots is without effect.

    Returns:
        int32 ``[B, N, K]``, and, with weights, where the slots were, int64 ``[B, N, K]``.
    """
    C, weights = args.key.shape[0], args.weights
    filled = (args.indices >= 0) & (args.indices < C)
    filled &= (args.row_start < args.row_end)[..., None]
    if weights is not None and args.is_joint:
        filled &= ~(weights <= 0)  # NaN is no empty slot
    chapters = torch.where(filled, args.indices, C)
    if weights is None:
        return chapters.sort(-1).values, None
    bits = weights.contiguous().view(torch.int32)
    # integers that rise with the weight
    bits = bits ^ (bits >> 31 & 0x7FFFFFFF)
    keys, order = (chapters.long() << 32 | bits.long() + 2**31).sort(-1)
    return (keys >> 32).int(), order


class ChapterIndex(NamedTuple):
    """The entries of all rows of the batch, by chapter, then slot, then row."""

    entry: Tensor  # int32 [B * N * K], empty slots last
    offset: Tensor  # int32 [C * K + 1]: where the entries of (chapter, slot) begin


def fill_index(index: ChapterIndex, slots: Tensor, C: int) -> None:
    """Sort the entries of ``slots [B, N, K]`` by chapter and slot."""
    K = slots.shape[-1]
    slot = torch.arange(K, device=slots.device, dtype=torch.int32)
    keys, entry = (slots * K + slot).flatten().sort(stable=True)
    index.entry.copy_(entry)
    place = torch.arange(C * K + 1, device=slots.device, dtype=torch.int32)
    index.offset.copy_(torch.searchsorted(keys, place))


def rows_of_entries(
    args: ChapterAttentionArgs, index: ChapterIndex
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the routing row of each entry: sequence, first query, and queries times heads.

    Returns:
        int32 ``[B * N * K]`` each.
    """
    N, K = args.indices.shape[1:]
    row = index.entry // K
    start = args.row_start.flatten()[row]
    length = (args.row_end.flatten()[row] - start) * (args.query.shape[1] // args.key.shape[1])
    return row // N, start, length


def tiles_of_slots(
    index: ChapterIndex, C: int, K: int, row_width: int, block: int, n_tiles: int
) -> tuple[Tensor, Tensor]:
    """What the programs of each slot work on: the chapter, and the first of its rows.

    An entry has ``row_width`` rows: queries of its routing row, and their heads. A tile holds
    ``block`` rows of one chapter.

    Returns:
        int32 ``[K, n_tiles]`` each; the chapter is C for tiles that are not needed.
    """
    return tiles_of_groups(index.offset.diff().view(C, K).t().long() * row_width, block, n_tiles)
