"""What the key-stationary backward reads: numbers of rows in its own order, and parts of chapters.

A *list* holds numbers of rows one after the other as the backward walks them, so that a tile reads
them without an address for each. It begins each chapter, and each entry or routing row that fills
tiles of its own, with a tile. Three are read together, ``[Hkv, n_list]`` each:

    shift  what is taken off the exponents of a row; infinite where a place has no row
    rest   float32 only: joint what is rounded off ``shift``; independent a factor of exponentials
    list   joint ``Delta - d_lse``; independent ``w_s Delta_s - d_lse exp(l_s - lse)``; ``d_lse``
           where keys compute their softmax
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memattn_kernels._common import cdiv, exponent_factor
from memattn_kernels._launch import MIN_PART, N_PROGRAMS
from memattn_kernels.chapter_attention.forward import RUNTIME_SIZES
from memattn_kernels.chapter_attention.index import ChapterIndex

LIST_CONFIG = {"BLOCK_M": 256, "num_warps": 4, "num_stages": 1}
SUM_CONFIG = {"BLOCK_N": 16, "num_warps": 4, "num_stages": 1}


class Parts(NamedTuple):
    """The rows of chapters, cut into parts of at most ``most`` tiles: a program adds up one.

    A chapter of one part has its gradient from it; of others the parts are added in their order.
    Sizes alone decide the length of a part.
    """

    tiles: Tensor  # int32 [C + 1]: the first tile of each chapter in the list of all
    chapter: Tensor  # int32 [n_programs], C where there is nothing to do
    first: Tensor  # int32 [n_programs], its first tile in the chapter
    sums: Tensor  # int32 [C]: where the parts of a chapter of several begin
    several: Tensor  # int32: the chapters of several parts, then others
    most: int
    n_tiles: int  # of all chapters, at most
    n_sums: int  # parts of chapters of several, at most


def parts_of_chapters(index: ChapterIndex, K: int, rows: int, block: int, n_owners: int) -> Parts:
    """Cut the entries of each chapter, of ``rows`` rows each, into parts.

    Args:
        index: The index of ``C`` chapters.
        K: Slots of a routing row.
        rows: Rows of an entry in the list.
        block: Rows of a tile.
        n_owners: Programs for each part: heads and tiles of keys.
    """
    bounds = index.offset[::K].contiguous()
    C, n_entries = bounds.numel() - 1, index.entry.numel()
    counts = (bounds.diff() * rows + (block - 1)) // block
    n_tiles = cdiv(n_entries * rows, block) + (C if rows % block else 0)
    most = max(MIN_PART // block, cdiv(n_tiles * n_owners, N_PROGRAMS))
    n_parts = ((counts + (most - 1)) // most).clamp(min=1)
    ends = torch.nn.functional.pad(n_parts.cumsum(0), (1, 0))
    program = torch.arange(C + n_tiles // most, device=ends.device)
    chapter = torch.searchsorted(ends[1:].contiguous(), program, right=True)
    is_several = n_parts > 1
    of_several = torch.where(is_several, n_parts, 0)
    order = is_several.int().argsort(descending=True)[: n_tiles // (most + 1)]
    return Parts(
        tiles=torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(),
        chapter=chapter.int(),
        first=((program - ends[chapter]) * most).int(),
        sums=(of_several.cumsum(0) - of_several).int(),
        several=order.int(),
        most=most,
        n_tiles=n_tiles,
        n_sums=2 * n_tiles // (most + 1),
    )


def places_of_entries(index: ChapterIndex, parts: Parts, K: int, rows: int, block: int) -> Tensor:
    """Where each entry, in the order of the index, begins in the list; -1 for an empty slot.

    Returns:
        int32 ``[n_entries]``.
    """
    bounds = index.offset[::K].contiguous()
    place = torch.arange(index.entry.numel(), device=bounds.device, dtype=torch.int32)
    chapter = torch.searchsorted(bounds[1:].contiguous(), place, right=True)
    begin = parts.tiles[chapter] * block + (place - bounds[chapter]) * rows
    return torch.where(place < bounds[-1], begin, -1).int()


@triton.jit(do_not_specialize=(*RUNTIME_SIZES, "n_rows", "n_entries"))
def chapter_attention_bwd_lists_kernel(
    q_ptr, lse_ptr, residual_ptr, number_ptr, weight_ptr,  # by row; weights of entries, or None
    sequence_ptr, start_ptr, length_ptr, place_ptr,  # of each entry, or routing row
    shift_ptr, rest_ptr, list_ptr,  # outputs [Hkv, n_list]; the second for float32
    H, T, n_rows, n_entries, n_list,
    G: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(n_entries * n_rows, BLOCK_M) * Hkv,), heads first.

    List what is taken off the exponents of a row, its ``lse`` less the logarithm of the weight, and
    another number of it. With ``residual_ptr``, in float32, weights are left to others.
    """
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    n_heads = H // G
    h_kv = tl.program_id(0) % n_heads
    i = tl.program_id(0) // n_heads * BLOCK_M + tl.arange(0, BLOCK_M)
    entry, i = i // n_rows, i % n_rows
    is_entry = entry < n_entries
    place = tl.load(place_ptr + entry, mask=is_entry, other=-1)
    is_entry &= place >= 0
    b = tl.load(sequence_ptr + entry, mask=is_entry, other=0)
    start = tl.load(start_ptr + entry, mask=is_entry, other=0)
    valid = is_entry & (i < tl.load(length_ptr + entry, mask=is_entry, other=0))
    row = (b * H + h_kv * G + i % G) * T + start + i // G
    lse = tl.load(lse_ptr + row, mask=valid, other=float("inf"))
    shift = lse * exponent_factor(dtype)
    if weight_ptr is not None and residual_ptr is None:
        shift -= tl.log2(tl.load(weight_ptr + entry, mask=valid, other=1.0))
    offs = tl.cast(h_kv, tl.int64) * n_list + place + i
    tl.store(shift_ptr + offs, shift, mask=is_entry)
    number = tl.load(number_ptr + row, mask=valid, other=0.0)
    tl.store(list_ptr + offs, number, mask=is_entry)
    if residual_ptr is not None:
        rest = tl.load(residual_ptr + row, mask=valid, other=0.0)
        tl.store(rest_ptr + offs, rest, mask=is_entry)


@triton.jit(do_not_specialize=("most",))
def chapter_attention_bwd_sum_kernel(
    part_dk_ptr, part_dv_ptr, chapter_ptr, tiles_ptr, sums_ptr,  # of parts
    dk_ptr, dv_ptr,  # outputs
    stride_dkc, stride_dkh, stride_dkm, stride_dvc, stride_dvh, stride_dvm,
    H, most, scale, G: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: (n * cdiv(M, BLOCK_N) * Hkv,), heads first. Adds the parts of a chapter in order."""
    n_key_tiles: tl.constexpr = (M + BLOCK_N - 1) // BLOCK_N
    n_heads = H // G
    pid = tl.program_id(0)
    h_kv = pid % n_heads
    offs_n = pid // n_heads % n_key_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    chapter = tl.load(chapter_ptr + pid // n_heads // n_key_tiles)
    n_tiles = tl.load(tiles_ptr + chapter + 1) - tl.load(tiles_ptr + chapter)
    if n_tiles <= most:
        return
    chapter = chapter.to(tl.int64)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    offs_dv = tl.arange(0, BLOCK_DV)[None, :]
    mask_d = (offs_n < M)[:, None] & (offs_d < D)
    mask_dv = (offs_n < M)[:, None] & (offs_dv < DV)
    first = tl.load(sums_ptr + chapter)
    for part in range(first, first + tl.cdiv(n_tiles, most)):
        row = (tl.cast(part, tl.int64) * n_heads + h_kv) * M + offs_n[:, None]
        dk += tl.load(part_dk_ptr + row * D + offs_d, mask=mask_d, other=0.0)
        dv += tl.load(part_dv_ptr + row * DV + offs_dv, mask=mask_dv, other=0.0)
    dk_ptr += chapter * stride_dkc + h_kv * stride_dkh
    dv_ptr += chapter * stride_dvc + h_kv * stride_dvh
    dk = (dk * scale).to(dk_ptr.dtype.element_ty)
    tl.store(dk_ptr + offs_n[:, None] * stride_dkm + offs_d, dk, mask=mask_d)
    dv = dv.to(dv_ptr.dtype.element_ty)
    tl.store(dv_ptr + offs_n[:, None] * stride_dvm + offs_dv, dv, mask=mask_dv)
