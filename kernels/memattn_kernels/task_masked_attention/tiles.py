"""What a tile sees under a task's mask: steps through the listed tiles, and bits.

Positions count from the start of the sequence. A list names the tiles of TILE rows by TILE keys
that hold an allowed pair, full ones first, both kinds in ascending order. A program walks them in
*steps* of BLOCK columns, numbered through the list: step ``s`` lies in the tile at place
``s // (TILE // BLOCK)``. As tiles ascend, the steps of a kind that lie before a column come first.
"""

import triton
import triton.language as tl

from memattn_kernels._common import NO_END, store_tile

TILE: tl.constexpr = tl.constexpr(128)
WORD: tl.constexpr = tl.constexpr(32)  # queries in one word of bits
CHUNK: tl.constexpr = tl.constexpr(32)  # listed tiles read at once: one warp adds them up


@triton.jit
def bounds_of_sequence(b, seq_start_ptr, seq_end_ptr, T, S):
    """Start of the sequence, and how many queries and keys it has from there."""
    start = tl.full([], 0, tl.int32)
    end = tl.full([], NO_END, tl.int32)
    if seq_start_ptr is not None:
        start = tl.minimum(tl.load(seq_start_ptr + b), tl.maximum(T, S))
    if seq_end_ptr is not None:
        end = tl.load(seq_end_ptr + b)
    return start, tl.minimum(end, T) - start, tl.minimum(end, S) - start


@triton.jit
def load_rows(ptr, row, stride, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
              BLOCK_WIDTH: tl.constexpr):  # fmt: skip
    """Rows ``row ... row + BLOCK - 1``, zero where ``mask`` is not set, and past WIDTH."""
    offs_r = tl.arange(0, BLOCK)[:, None]
    offs_w = tl.arange(0, BLOCK_WIDTH)[None, :]
    ptrs = ptr + tl.cast(row, tl.int64) * stride + (offs_r * stride + offs_w)
    return tl.load(ptrs, mask=mask[:, None] & (offs_w < WIDTH), other=0.0)


@triton.jit
def empty_rows_before(ptr, t, stride, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                      BLOCK_WIDTH: tl.constexpr):  # fmt: skip
    """Write 0 to the rows of a tile from row ``t`` that lie before the start of the sequence."""
    zeros = tl.zeros([BLOCK, BLOCK_WIDTH], dtype=tl.float32)
    store_tile(ptr, t, stride, start, zeros, WIDTH, BLOCK, BLOCK_WIDTH)


@triton.jit
def _steps_before(tiles_ptr, n_tiles, column, BLOCK: tl.constexpr, ROUND_UP: tl.constexpr):
    """How many steps end at ``column`` or before it; with ROUND_UP, how many begin before it."""
    n_steps = tl.full([], 0, tl.int32)
    for place in range(0, n_tiles, CHUNK):
        mask = place + tl.arange(0, CHUNK) < n_tiles
        tile = tl.load(tiles_ptr + place + tl.arange(0, CHUNK), mask=mask, other=0)
        columns = tl.maximum(column - tile * TILE, 0)
        if ROUND_UP:
            columns += BLOCK - 1
        n_steps += tl.sum(tl.where(mask, tl.minimum(columns // BLOCK, TILE // BLOCK), 0))
    return n_steps


@triton.jit
def listed_steps(tiles_ptr, counts_ptr, row, n_listed, first, whole_first, whole_last, last,
                 BLOCK: tl.constexpr, IS_CUT_BEFORE: tl.constexpr):  # fmt: skip
    """Steps that a program walks of row ``row`` of a list.

    Args:
        tiles_ptr, counts_ptr: A list, with ``n_listed`` places in a row.
        first, last: Columns outside ``[first, last)`` are seen by no row of the program.
        whole_first, whole_last: Columns in between are seen by all, in a full tile.
        BLOCK: Columns of a step.
        IS_CUT_BEFORE: False if ``first`` and ``whole_first`` are 0.

    Returns:
        ``tiles_ptr`` of the row, and steps ``before, whole_first, whole_last, full_last,
        partial, n_masked``: see ``masked_step``. Steps from ``whole_first`` to ``whole_last``
        need no mask, and ``n_masked`` need one.
    """
    n_full = tl.load(counts_ptr + 2 * row)
    n_partial = tl.load(counts_ptr + 2 * row + 1)
    tiles_ptr += row * n_listed
    partial_ptr = tiles_ptr + n_full
    full_last = _steps_before(tiles_ptr, n_full, last, BLOCK, True)
    partial_last = _steps_before(partial_ptr, n_partial, last, BLOCK, True)
    whole = _steps_before(tiles_ptr, n_full, whole_last, BLOCK, False)
    before = tl.full([], 0, tl.int32)
    begin = before
    partial = before
    if IS_CUT_BEFORE:
        before = _steps_before(tiles_ptr, n_full, first, BLOCK, False)
        before = tl.minimum(before, full_last)
        begin = _steps_before(tiles_ptr, n_full, whole_first, BLOCK, True)
        begin = tl.minimum(begin, full_last)
        partial = _steps_before(partial_ptr, n_partial, first, BLOCK, False)
        partial = tl.minimum(partial, partial_last)
        whole = tl.maximum(whole, begin)
    n_masked = begin - before + full_last - whole + partial_last - partial
    partial += n_full * (TILE // BLOCK)
    return tiles_ptr, before, begin, whole, full_last, partial, n_masked


@triton.jit
def masked_step(index, before, whole_first, whole_last, full_last, partial):
    """The ``index``-th step that needs a mask, and whether it lies in a partial tile.

    First come those of full tiles that are cut, from ``before`` to ``whole_first`` and from
    ``whole_last`` to ``full_last``, then partial tiles from step ``partial``.
    """
    step = before + index
    step = tl.where(step < whole_first, step, step + whole_last - whole_first)
    is_partial = step >= full_last
    return tl.where(is_partial, step - full_last + partial, step), is_partial


@triton.jit
def step_tile(tiles_ptr, step, BLOCK: tl.constexpr):
    """The tile that a step lies in, and the step's first column."""
    tile = tl.load(tiles_ptr + step // (TILE // BLOCK))
    return tile, tile * TILE + step % (TILE // BLOCK) * BLOCK


@triton.jit
def query_bits(query_node_ptr, t, T, BLOCK: tl.constexpr):
    """Where the bits of queries from row ``t`` are in the row of a key: word, and a bit of it.

    The word is a sum of a scalar and a tensor; so is ``key_bits``. Short of registers: added to a
    pointer first, a scalar leaves one address for a thread.
    """
    offs = tl.arange(0, BLOCK)
    if query_node_ptr is not None:
        place = tl.load(query_node_ptr + t + offs, mask=t + offs < T, other=0)
        return 0, place // WORD, 1 << place % WORD
    else:  # steps begin at multiples of BLOCK, so a short one lies in one word
        return t % TILE // WORD, offs // WORD, 1 << (t + offs) % WORD


@triton.jit
def key_bits(key_node_ptr, n, S, n_words, BLOCK: tl.constexpr):
    """Offsets of the rows of keys from column ``n``, in their tile, or in the graph."""
    offs = tl.arange(0, BLOCK)
    if key_node_ptr is not None:
        return 0, tl.load(key_node_ptr + n + offs, mask=n + offs < S, other=0) * n_words
    else:
        return n % TILE * (TILE // WORD), offs * (TILE // WORD)


@triton.jit
def load_allowed(bits_ptr, slots_ptr, slot, word, words, bit, is_partial):
    """Whether the mask allows each pair, in the shape of ``words`` and ``bit``.

    ``word + words`` is the offset in the tile at ``slot`` of the slots, or in the graph. A tile
    that is not partial allows all.
    """
    if slots_ptr is not None:
        bits_ptr += tl.load(slots_ptr + slot).to(tl.int64) * (TILE * TILE // WORD)
    loaded = tl.load(bits_ptr + word + words, mask=is_partial, other=-1)
    return loaded & bit != 0


@triton.jit
def _bits_from(first):
    """A word with all bits from ``first`` on, of which there may be none."""
    return tl.where(first < WORD, -(1 << tl.minimum(first, WORD - 1)), 0)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def seen_keys(bits_ptr, slots_ptr, slot, n, n_keys, t, n_queries, is_partial,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr):  # fmt: skip
    """Whether some query of a tile from row ``t`` sees each key from column ``n``, by the slots.

    What no query sees may be NaN, which a weight of 0 does not hide.
    """
    N_WORDS: tl.constexpr = BLOCK_M // WORD if BLOCK_M > WORD else 1
    words = tl.arange(0, N_WORDS)[None, :]
    offs = tl.arange(0, BLOCK_N)[:, None]
    bits_ptr += tl.load(slots_ptr + slot).to(tl.int64) * (TILE * TILE // WORD)
    bits_ptr += n % TILE * (TILE // WORD) + t % TILE // WORD
    loaded = tl.load(bits_ptr + (offs * (TILE // WORD) + words), mask=is_partial, other=-1)
    # queries [first, last) of a word that begins at query ``begin``
    begin = t // WORD * WORD + words * WORD
    first = tl.maximum(t - begin, 0)
    if IS_CAUSAL:
        first = tl.maximum(n + offs - begin, first)
    last = tl.maximum(tl.minimum(n_queries, t + BLOCK_M) - begin, 0)
    loaded &= _bits_from(first) & ~_bits_from(last)
    return (tl.reduce(loaded, 1, _or) != 0) & (n + tl.arange(0, BLOCK_N) < n_keys)
