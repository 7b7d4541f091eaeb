"""What the attention kernels share: tile ranges, loads, the online softmax, launch helpers.

Every operator describes what a row may see as one interval ``[lo, hi)`` of columns for each *key
source* (tokens, a parameter table, memory tokens). A tile of rows then walks the columns from the
smallest ``lo`` to the largest ``hi``, and only columns that some row does not see need a mask.
"""

from functools import cache

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from memattn_kernels._products import dot

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)  # log2(e)
NO_END: tl.constexpr = tl.constexpr(2**31 - 1)  # the end of a sequence that is not cut short

# largest row stride for which the offsets inside a tile surely fit 32 bits
MAX_ROW_STRIDE = 2**22
# lengths above this mean "everything"; sums with a position stay below 2**31
MAX_LENGTH = 2**30


# whether kernels run in Triton's interpreter, on CPU tensors; settled when a kernel is defined
IS_INTERPRETED = bool(knobs.runtime.interpret)


@triton.jit
def load_tile(ptr, row, stride, end, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
              BLOCK_WIDTH: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Rows ``row ... row + BLOCK - 1``, zero from row ``end`` on if MASKED, and past WIDTH."""
    offs_r = tl.arange(0, BLOCK)[:, None]
    offs_w = tl.arange(0, BLOCK_WIDTH)[None, :]
    # the tile's own offset in 64 bits, those inside the tile in 32
    ptrs = ptr + tl.cast(row, tl.int64) * stride + (offs_r * stride + offs_w)
    if MASKED and WIDTH < BLOCK_WIDTH:
        return tl.load(ptrs, mask=(row + offs_r < end) & (offs_w < WIDTH), other=0.0)
    elif MASKED:
        return tl.load(ptrs, mask=row + offs_r < end, other=0.0)
    elif WIDTH < BLOCK_WIDTH:
        return tl.load(ptrs, mask=offs_w < WIDTH, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_tile(ptr, row, stride, end, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
               BLOCK_WIDTH: tl.constexpr):  # fmt: skip
    """Write the rows before ``end`` in the dtype of ``ptr``."""
    offs_r = tl.arange(0, BLOCK)[:, None]
    offs_w = tl.arange(0, BLOCK_WIDTH)[None, :]
    ptrs = ptr + tl.cast(row, tl.int64) * stride + (offs_r * stride + offs_w)
    mask = (row + offs_r < end) & (offs_w < WIDTH)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(ptr, offsets, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """The rows at these offsets, zero past WIDTH."""
    offs_w = tl.arange(0, BLOCK_WIDTH)[None, :]
    if WIDTH < BLOCK_WIDTH:
        return tl.load(ptr + offsets[:, None] + offs_w, mask=offs_w < WIDTH, other=0.0)
    else:
        return tl.load(ptr + offsets[:, None] + offs_w)


@triton.jit
def scatter_rows(ptr, offsets, valid, tile, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Write the valid rows in the dtype of ``ptr``."""
    offs_w = tl.arange(0, BLOCK_WIDTH)[None, :]
    mask = valid[:, None] & (offs_w < WIDTH)
    tl.store(ptr + offsets[:, None] + offs_w, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def sequence_of(i, b, documents_ptr, seq_start_ptr, seq_end_ptr, S):
    """Start, end and number of the first segment of the sequence that holds position ``i``."""
    if documents_ptr is not None:
        mask = i < S
        start = tl.load(documents_ptr + i, mask=mask, other=0)
        end = tl.load(documents_ptr + S + i, mask=mask, other=0)
        first_segment = tl.load(documents_ptr + 2 * S + i, mask=mask, other=0)
    else:
        start = tl.full([], 0, tl.int32)
        end = tl.full([], NO_END, tl.int32)
        first_segment = tl.full([], 0, tl.int32)
        if seq_start_ptr is not None:
            start = tl.load(seq_start_ptr + b)
        if seq_end_ptr is not None:
            end = tl.load(seq_end_ptr + b)
    return start, end, first_segment


@triton.jit
def tile_ranges(lo, hi, valid, BLOCK: tl.constexpr):
    """Columns that a tile of rows walks, in steps of BLOCK.

    Row ``r`` sees columns ``[lo[r], hi[r])``; rows that are not ``valid`` count for nothing.

    Returns:
        ``first, full_first, full_last, last``: columns ``[full_first, full_last)`` are whole tiles
        that every valid row sees, ``[first, full_first)`` and ``[full_last, last)`` need a mask,
        and a column outside ``[first, last)`` is seen by no row.
    """
    sees = valid & (lo < hi)
    first = tl.min(tl.where(sees, lo, NO_END))
    last = tl.max(tl.where(sees, hi, 0))
    first = tl.minimum(first, last)
    # a valid row that sees nothing makes this range empty
    full_lo = tl.minimum(tl.max(tl.where(valid, lo, 0)), last)
    full_hi = tl.minimum(tl.min(tl.where(valid, hi, NO_END)), last)
    full_first = first + tl.cdiv(tl.maximum(full_lo - first, 0), BLOCK) * BLOCK
    full_last = full_first + tl.maximum(full_hi - full_first, 0) // BLOCK * BLOCK
    return first, full_first, full_last, last


@triton.jit
def partial_tile(index, first, full_first, full_last, BLOCK: tl.constexpr):
    """First column of the ``index``-th tile that needs a mask: before the whole tiles, or after."""
    n_before = (full_first - first) // BLOCK
    return tl.where(index < n_before, first + index * BLOCK, full_last + (index - n_before) * BLOCK)


@triton.jit
def n_partial_tiles(first, full_first, full_last, last, BLOCK: tl.constexpr):
    """How many tiles need a mask."""
    return (full_first - first) // BLOCK + tl.cdiv(tl.maximum(last - full_last, 0), BLOCK)


@triton.jit
def exponent_factor(dtype: tl.constexpr):
    """What turns a natural exponent into that of ``power``, for inputs of this dtype."""
    return 1.0 if dtype == tl.float32 else LOG2E


@triton.jit
def power(x, dtype: tl.constexpr):
    """``exp(x)`` for float32 inputs, else ``exp2(x)``.

    Powers of two save a multiplication for each score, but ``log2(e)`` in the scale costs a
    rounding of the exponent, which float32 results would show.
    """
    return tl.exp(x) if dtype == tl.float32 else tl.exp2(x)


@triton.jit
def score_scale(scale, softcap, dtype: tl.constexpr):
    """The factor that makes exponents of ``power`` from ``cap_products``."""
    if softcap is None:
        return scale * exponent_factor(dtype)
    else:
        return softcap * exponent_factor(dtype)


@triton.jit
def cap_products(products, cap_scale, dtype: tl.constexpr):
    """What ``softcap`` is multiplied by for capped scores, ``tanh(cap_scale * product)``.

    With None as ``cap_scale`` the products as they are. Near 0 it is a polynomial, since a large
    cap multiplies the error of ``1 - 2 / (1 + exp(2 x))`` there; in half precision one that is
    short enough to hide after the powers and divisions of other scores.
    """
    if cap_scale is None:
        return products
    elif dtype == tl.float32:
        x = products * cap_scale
        size = tl.abs(x)
        square = x * x
        p = -5.70498872745e-3 * square + 2.06390887954e-2
        p = p * square - 5.37397155531e-2
        p = p * square + 1.33314422036e-1
        p = p * square - 3.33332819422e-1
        u = tl.exp2(size * (-2.0 * LOG2E))
        large = 1.0 - 2.0 * u / (1.0 + u)
        return tl.where(size < 0.625, p * square * x + x, tl.where(x < 0.0, -large, large))
    else:
        x = products * cap_scale
        square = x * x
        small = (0.13333333 * square - 0.33333333) * square * x + x
        large = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
        return tl.where(square < 0.015625, small, large)


@triton.jit
def online_softmax_step(acc, l_i, m_i, scores, v, scale, HIDE_UNSEEN: tl.constexpr = False):
    """Add one tile of keys to the running softmax.

    Args:
        acc: Sum of ``power(scale * score - m_i) * value``, ``[BLOCK_M, BLOCK_DV]``.
        l_i: Sum of the weights, ``[BLOCK_M]``.
        m_i: Largest ``scale * score`` so far, ``-inf`` before the first key, ``[BLOCK_M]``.
        scores: ``[BLOCK_M, BLOCK_N]``, ``-inf`` where a row does not see the key.
        v: ``[BLOCK_N, BLOCK_DV]``, finite where no row sees the key, unless HIDE_UNSEEN.
        scale: Positive, with ``exponent_factor`` in it.
        HIDE_UNSEEN: Whether ``v`` may be NaN where no row sees the key.
    """
    m_new = tl.maximum(m_i, tl.max(scores, 1) * scale)
    # finite for a row without a key so far: -inf - -inf is NaN
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
    alpha = power(m_i - m_safe, v.dtype)
    p = power(scores * scale - m_safe[:, None], v.dtype)
    l_i = l_i * alpha + tl.sum(p, 1)
    if HIDE_UNSEEN:
        v = tl.where((tl.max(p, 0) > 0.0)[:, None], v, 0.0)
    acc = dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, l_i, m_new


@triton.jit
def finish_softmax(acc, l_i, m_i, valid, dtype: tl.constexpr):
    """Output and natural log-sum-exp of the running softmax; 0 and -inf for a row without keys.

    Returns:
        ``out, lse, residual``: the residual is what float32 rounds off ``lse``, for a backward of
        float32 inputs, whose weights ``exp(score - lse - residual)`` are then as good as those of
        the forward.
    """
    empty = (l_i == 0.0) | (valid == 0)
    safe = tl.where(empty, 1.0, l_i)
    out = tl.where(empty[:, None], 0.0, acc / safe[:, None])
    m_i = tl.where(empty, 0.0, m_i / exponent_factor(dtype))
    log_l = tl.log(safe)
    lse = m_i + log_l
    # exact: the error of a sum of two floats is a float
    m_part = lse - log_l
    residual = (m_i - m_part) + (log_l - (lse - m_part))
    return out, tl.where(empty, -float("inf"), lse), residual


def rows_ready(tensor: Tensor) -> Tensor:
    """The tensor itself if kernels can read its rows, else a contiguous copy.

    Rows must have adjacent elements and lie near enough for 32-bit offsets inside a tile.
    """
    if tensor.stride(-1) == 1 and tensor.stride(-2) <= MAX_ROW_STRIDE:
        return tensor
    return tensor.contiguous()


@cache
def _row_names(name: str, axes: str) -> tuple[str, ...]:
    """The kernels' argument names of a tensor of rows: its pointer, then its strides."""
    return f"{name}_ptr", *(f"stride_{name}{axis}" for axis in axes)


def rows(name: str, tensor: Tensor | None, axes: str) -> dict:
    """The pointer and the strides of a tensor of rows, by the kernels' argument names."""
    if tensor is None:
        return dict(zip(_row_names(name, axes), (None, *(0 for _ in axes)), strict=True))
    tensor = rows_ready(tensor)
    # all strides but the last
    return dict(zip(_row_names(name, axes), (tensor, *tensor.stride()), strict=False))


def empty_rows(like: Tensor, width: int) -> Tensor:
    """Uninitialised ``[B, H, T, width]`` with heads and tokens in the memory order of ``like``."""
    B, H, T, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(B, T, H, width).transpose(1, 2)
    return like.new_empty(B, H, T, width)


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up; that of Triton is made for kernels, and slow on the host."""
    return -(-a // b)


def block_width(width: int) -> int:
    """The power of two, at least 16, that a row of this width is padded to in a tile."""
    return max(16, 1 << (width - 1).bit_length())


def block_length(block: int, length: int) -> int:
    """The tile length: ``block``, less where ``length`` rows are all there is."""
    return min(block, block_width(length))


def check_head_dim(name: str, width: int) -> None:
    """Raise NotImplementedError for a head dimension that no tile holds."""
    if width > 256:
        raise NotImplementedError(
            f'{name} must have a head dimension of at most 256 for backend "triton", got {width}; '
            'backend "reference" takes it'
        )
