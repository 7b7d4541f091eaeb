"""What a program works on: a tile of rows, and the chapters that they see.

A *row* is one query of one head. With ``G`` query heads for each key head, row ``i`` of an entry of
the index, or of a routing row, is head ``i % G`` of its query ``i // G``: heads that share keys
share a tile.
"""

import triton
import triton.language as tl

from memattn_kernels._common import power
from memattn_kernels._products import dot


@triton.jit
def entries_of(chapter, slot, n_slots, K, offset_ptr):
    """Where the entries of ``n_slots`` slots of a chapter begin and end."""
    offset_ptr += chapter * K + slot
    return tl.load(offset_ptr), tl.load(offset_ptr + n_slots)


@triton.jit
def rows_of_entries(i, begin, end, sequence_ptr, start_ptr, length_ptr, WIDTH: tl.constexpr):
    """Rows counted from entry ``begin``, of WIDTH in each entry.

    Returns:
        ``place, b, start, i, valid``: the entry's place in the index, sequence and first query of
        its routing row, and the row within it.
    """
    place = begin + i // WIDTH
    i = i % WIDTH
    valid = place < end
    b = tl.load(sequence_ptr + place, mask=valid, other=0)
    start = tl.load(start_ptr + place, mask=valid, other=0)
    if length_ptr is not None:
        valid &= i < tl.load(length_ptr + place, mask=valid, other=0)
    return place, b, start, i, valid


@triton.jit
def rows_of_program(tile, slot, N, K, C, row_width, n_tiles, n_slots_ptr, row_start_ptr,
                    row_end_ptr, entry_ptr, sequence_ptr, start_ptr, length_ptr, offset_ptr,
                    chapter_ptr, first_ptr, G: tl.constexpr, WIDTH: tl.constexpr,
                    BLOCK_M: tl.constexpr):  # fmt: skip
    """Rows of a tile, by chapter with an index, else by row, and the chapters that they see.

    Returns:
        ``n_slots, chapter, entry, b, start, i, valid``: how many chapters the program walks, none
        if its tile is not needed; by chapter which one; by row the first entry of the routing row,
        by chapter that of each row; the sequence and first query of the routing row, and the row
        within it.
    """
    offs_m = tl.arange(0, BLOCK_M)
    if entry_ptr is not None:
        chapter = tl.load(chapter_ptr + slot * n_tiles + tile)
        n_slots = (chapter < C).to(tl.int32)
        begin, end = entries_of(tl.minimum(chapter, C - 1), slot, 1, K, offset_ptr)
        i = tl.load(first_ptr + slot * n_tiles + tile) + offs_m
        place, b, start, i, valid = rows_of_entries(
            i, begin, end, sequence_ptr, start_ptr, length_ptr, WIDTH
        )  # fmt: skip
        entry = tl.load(entry_ptr + place, mask=valid, other=0)
    else:
        n_row_tiles = tl.cdiv(row_width, BLOCK_M)
        row = tile // n_row_tiles
        start = tl.load(row_start_ptr + row)
        n_rows = (tl.load(row_end_ptr + row) - start) * G
        i = tile % n_row_tiles * BLOCK_M + offs_m
        valid = i < n_rows
        n_slots = tl.load(n_slots_ptr + row)
        n_slots = tl.where(tile % n_row_tiles * BLOCK_M < n_rows, n_slots, 0)
        b = row // N
        entry = row * K
        chapter = C
    return n_slots, chapter, entry, b, start, i, valid


@triton.jit
def chapter_pointers(chapter, h_kv, n_heads, k_ptr, v_ptr, stride_kc, stride_kh, stride_vc,
                     stride_vh):  # fmt: skip
    """Where the keys and values of a chapter begin, and its number among all key heads."""
    chapter = chapter.to(tl.int64)
    k_ptr += chapter * stride_kc + h_kv * stride_kh
    v_ptr += chapter * stride_vc + h_kv * stride_vh
    return k_ptr, v_ptr, chapter * n_heads + h_kv


@triton.jit
def gather_rows(ptr, offsets, valid, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """The rows at these offsets, zero where they are not valid, and past WIDTH."""
    offs_w = tl.arange(0, BLOCK_WIDTH)[None, :]
    mask = valid[:, None] & (offs_w < WIDTH)
    return tl.load(ptr + offsets[:, None] + offs_w, mask=mask, other=0.0)


@triton.jit
def load_bank_tile(ptr, scale_ptr, head, n, stride, dtype: tl.constexpr, M: tl.constexpr,
                   WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                   BLOCK_WIDTH: tl.constexpr):  # fmt: skip
    """Keys or values ``n ... n + BLOCK - 1`` of a chapter, zero past M and WIDTH, in ``dtype``.

    With scales, of which M are those of this chapter's ``head``, they are int8, or uint8 with
    feature ``2i`` in the lower four bits.
    """
    IS_PACKED: tl.constexpr = ptr.dtype.element_ty == tl.uint8
    offs_r = n + tl.arange(0, BLOCK)
    STORED: tl.constexpr = BLOCK_WIDTH // 2 if IS_PACKED else BLOCK_WIDTH
    N_STORED: tl.constexpr = WIDTH // 2 if IS_PACKED else WIDTH
    offs_w = tl.arange(0, STORED)[None, :]
    ptrs = ptr + (offs_r[:, None] * stride + offs_w)
    if M % BLOCK != 0 and N_STORED < STORED:
        tile = tl.load(ptrs, mask=(offs_r < M)[:, None] & (offs_w < N_STORED), other=0)
    elif M % BLOCK != 0:
        tile = tl.load(ptrs, mask=(offs_r < M)[:, None], other=0)
    elif N_STORED < STORED:
        tile = tl.load(ptrs, mask=offs_w < N_STORED, other=0)
    else:
        tile = tl.load(ptrs)
    if scale_ptr is not None:
        if IS_PACKED:
            # four bits in two's complement
            low = (tile & 15).to(tl.int32)
            high = (tile >> 4).to(tl.int32)
            tile = tl.interleave(low - ((low & 8) << 1), high - ((high & 8) << 1))
        scale = tl.load(scale_ptr + head * M + offs_r, mask=offs_r < M, other=0.0)
        tile = (tile.to(tl.float32) * scale[:, None]).to(dtype)
    return tile


@triton.jit
def chapter_scores(q, k, n, M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``q k^T``, with ``-inf`` past the last key of the chapter."""
    scores = dot(q, tl.trans(k))
    if M % BLOCK_N != 0:
        scores = tl.where((n + tl.arange(0, BLOCK_N) < M)[None, :], scores, -float("inf"))
    return scores


@triton.jit
def exp_lse(m, l, lse, residual, dtype: tl.constexpr):
    """``exp(l_s - lse)`` of a chapter with the largest exponent ``m`` and the sum ``l``."""
    x = m - lse
    if dtype == tl.float32:
        x -= residual
    return l * power(x, dtype)
