"""Helpers of the kernels of the neural memory: sizes, scratch, products of tiles.

A program computes one head of a row, chunk by chunk. The data of a chunk is in scratch memory of
the program, in the second-level cache: *inputs*, tokens by the inputs of all layers beside each
other; *outputs*, tokens by their outputs; *pairs*, tokens by tokens; *lanes*, one number for each
token. Layers are a loop at run time, and a kernel serves every depth. Strides of scratch are known
at compile time; otherwise their multiples would be kept in registers. Layer ``l`` has weights
``[width(l + 1), width(l)]``. All is float32.

Threads read data that other threads have written, so there is a barrier before every pass that
reads.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# sections of inputs: of keys, of queries, gradient of the first
_inputs = H, G, D_H = [tl.constexpr(n) for n in range(3)]
# sections of outputs: gradient of the inner loss, that times theta kappa, gradient of the second;
# phi', phi'' times the gradient of its value, phi' of queries; gradient of what queries have
# before phi, phi' times the gradient of delta
_outputs = [tl.constexpr(n) for n in range(8)]
DELTA, SCALED, D_SCALED, FIRST, SECOND, READ_FIRST, OWN, WIDE = _outputs
# sections of pairs: coefficients of weights and momentum, scratch, gradient of the first
_pairs = C, M, PAIRS, MASKED, D_C = [tl.constexpr(n) for n in range(5)]
# sections of lanes; RATE is theta kappa, CURVE the derivative of kappa over the norm
_lanes = [tl.constexpr(n) for n in range(15)]
LR, DECAY, ETA, BETA, SIGMA, MU, RATE, KAPPA, CURVE, *_gradients = _lanes
D_BETA, D_SIGMA, D_LAST_C, D_LAST_M, D_DECAY, D_ETA = _gradients
N_LANES = len(_lanes)
BACKWARD_SECTIONS: tl.constexpr = tl.constexpr((len(_inputs), len(_outputs), len(_pairs)))


class Memory(NamedTuple):
    """Sizes of a memory, its options and the scratch of a program.

    An assignment would turn the options into run-time values, so this is created inside a call.
    """

    inputs_ptr: Any
    outputs_ptr: Any
    pairs_ptr: Any
    lanes_ptr: Any
    chunk: Any
    depth: Any
    width_0: Any
    width_1: Any
    width_2: Any
    width_3: Any
    width_4: Any
    all_inputs: Any  # of all layers
    all_outputs: Any
    huber_delta: Any
    max_norm: Any
    READ_CHUNK: Any
    IS_SILU: Any
    RESIDUAL: Any
    IS_HUBER: Any
    CLAMP: Any  # 0: none, 1: hard, 2: soft
    SKIP: Any
    HAS_MOMENTUM: Any
    BLOCK_M: Any  # tokens
    BLOCK_N: Any  # features
    BLOCK_K: Any  # what a product sums over
    BLOCK_C: Any  # tokens of a chunk
    PRECISION: Any


class Strided(NamedTuple):
    """A tensor ``[B, H, T, ...]``: its pointer, which may be None, and strides."""

    ptr: Any
    b: Any
    h: Any
    t: Any


class RowArguments(NamedTuple):
    """Arguments of the kernel, and the tokens of the program's row."""

    place: Any  # where row and head of the program stand
    is_batch: Any  # rows are sequences of the batch, not documents of one
    n_heads: Any
    T: Any
    q: Strided
    k: Strided
    v: Strided
    lr: Strided
    decay: Strided  # its pointer may be None, as those that follow
    eta: Strided
    pending_h: Any
    pending_delta: Any
    pending_decay: Any
    pending_eta: Any
    checkpoints: Any
    n_slots: Any  # checkpoints of a head
    n_kept: Any  # numbers of one
    group: Any  # chunks between two
    start: Any  # first token of the row
    pending: Any
    total: Any  # pending and own tokens


class Tokens(NamedTuple):
    """The tokens of a chunk: ``pending`` whose factors are known, then new ones, ``n`` in all."""

    n: Any
    pending: Any
    base: Any  # slot i is token base + i


@triton.jit
def place_of(x):
    """Number of this head among all of all rows, its sequence, and its head.

    Every pass reads it again, and the compiler cannot know that it does not change. Otherwise all
    pointers derived from it would be kept in registers from the first chunk to the last.
    """
    row = tl.load(x.place, volatile=True).to(tl.int64)
    h = tl.load(x.place + 1, volatile=True).to(tl.int64)
    return row * x.n_heads + h, tl.where(x.is_batch, row, 0), h


@triton.jit
def at_head(x, b, h):
    """Where the tokens of a head of a sequence begin."""
    return x.ptr + b * x.b + h * x.h


@triton.jit
def width(m, l):
    """Features before layer ``l``."""
    later = tl.where(l == 2, m.width_2, tl.where(l == 3, m.width_3, m.width_4))
    return tl.where(l == 0, m.width_0, tl.where(l == 1, m.width_1, later))


@triton.jit
def sum_before(l, x_0, x_1, x_2, x_3):
    """The sum of the first ``l`` of four numbers."""
    total = tl.where(l > 0, x_0, 0) + tl.where(l > 1, x_1, 0)
    return total + tl.where(l > 2, x_2, 0) + tl.where(l > 3, x_3, 0)


@triton.jit
def packed_size(l, width_0, width_1, width_2, width_3, width_4):
    """Numbers of the weights of the first ``l`` layers."""
    return sum_before(l, width_0 * width_1, width_1 * width_2, width_2 * width_3, width_3 * width_4)


@triton.jit
def weights_before(m, l):
    """Where layer ``l`` lies in packed weights; of ``depth``, their size."""
    return packed_size(l, m.width_0, m.width_1, m.width_2, m.width_3, m.width_4)


@triton.jit
def scratch_of(scratch_ptr, program_floats, chunk, all_inputs, all_outputs,
               SECTIONS: tl.constexpr):  # fmt: skip
    """Inputs, outputs, pairs and lanes of this program."""
    inputs_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * program_floats
    outputs_ptr = inputs_ptr + SECTIONS[0] * chunk * all_inputs
    pairs_ptr = outputs_ptr + SECTIONS[1] * chunk * all_outputs
    return inputs_ptr, outputs_ptr, pairs_ptr, pairs_ptr + SECTIONS[2] * chunk * chunk


@triton.jit
def inputs_at(m, section, l):
    """Inputs of layer ``l`` in a section; rows are ``all_inputs`` apart."""
    before = sum_before(l, m.width_0, m.width_1, m.width_2, m.width_3)
    return m.inputs_ptr + section * m.chunk * m.all_inputs + before


@triton.jit
def outputs_at(m, section, l):
    """Outputs of layer ``l`` in a section; rows are ``all_outputs`` apart."""
    before = sum_before(l, m.width_1, m.width_2, m.width_3, m.width_4)
    return m.outputs_ptr + section * m.chunk * m.all_outputs + before


@triton.jit
def pairs_at(m, section):
    """A section of pairs; rows are ``chunk`` apart."""
    return m.pairs_ptr + section * m.chunk * m.chunk


@triton.jit
def lanes_at(m, section):
    """A section of lanes."""
    return m.lanes_ptr + section * m.chunk


@triton.jit
def load_block(ptr, stride, row, col, n_rows, n_cols, BLOCK_R: tl.constexpr,
               BLOCK_C: tl.constexpr):  # fmt: skip
    """A tile from ``row``, ``col``, zero outside ``[n_rows, n_cols]``."""
    rows = row + tl.arange(0, BLOCK_R)[:, None]
    cols = col + tl.arange(0, BLOCK_C)[None, :]
    return tl.load(ptr + rows * stride + cols, mask=(rows < n_rows) & (cols < n_cols), other=0.0)


@triton.jit
def store_block(ptr, stride, row, col, n_rows, n_cols, tile):
    """Write the part of a tile inside ``[n_rows, n_cols]``."""
    rows = row + tl.arange(0, tile.shape[0])[:, None]
    cols = col + tl.arange(0, tile.shape[1])[None, :]
    tl.store(ptr + rows * stride + cols, tile, mask=(rows < n_rows) & (cols < n_cols))


@triton.jit
def product(m, acc, x_ptr, stride_x, y_ptr, stride_y, row, col, n_rows, n_cols, first, last,
            factor_ptr, TURN_X: tl.constexpr, TURN_Y: tl.constexpr):  # fmt: skip
    """Add the sum over ``i`` in ``[first, last)`` of ``x[row + r, i] factor[i] y[i, col + c]``.

    TURN_X: ``x`` lies as ``[i, rows]``; TURN_Y: ``y`` lies as ``[columns, i]``. The factor may be
    None where ``y`` is not turned.
    """
    for i in range(first, last, m.BLOCK_K):
        if TURN_X:
            x = tl.trans(load_block(x_ptr, stride_x, i, row, last, n_rows, m.BLOCK_K, acc.shape[0]))
        else:
            x = load_block(x_ptr, stride_x, row, i, n_rows, last, acc.shape[0], m.BLOCK_K)
        if TURN_Y:
            y = tl.trans(load_block(y_ptr, stride_y, col, i, n_cols, last, acc.shape[1], m.BLOCK_K))
        else:
            y = load_block(y_ptr, stride_y, i, col, last, n_cols, m.BLOCK_K, acc.shape[1])
            if factor_ptr is not None:
                inner = i + tl.arange(0, m.BLOCK_K)
                y *= tl.load(factor_ptr + inner, mask=inner < last, other=0.0)[:, None]
        acc = tl.dot(x, y, acc, input_precision=m.PRECISION)
    return acc


@triton.jit
def forth(m, t, x_ptr, w_ptr, l, row, col):
    """A tile of ``x W^T`` for rows ``x`` of inputs of layer ``l``."""
    acc = tl.zeros([m.BLOCK_M, m.BLOCK_N], dtype=tl.float32)
    K = width(m, l)
    return product(m, acc, x_ptr, m.all_inputs, w_ptr + weights_before(m, l), K, row, col, t.n,
                   width(m, l + 1), 0, K, None, False, True)  # fmt: skip


@triton.jit
def back(m, t, y_ptr, w_ptr, l, row, col):
    """A tile of ``y W`` for rows ``y`` of outputs of layer ``l``."""
    acc = tl.zeros([m.BLOCK_M, m.BLOCK_N], dtype=tl.float32)
    K = width(m, l)
    return product(m, acc, y_ptr, m.all_outputs, w_ptr + weights_before(m, l), K, row, col, t.n,
                   K, 0, width(m, l + 1), None, False, False)  # fmt: skip


@triton.jit
def add_outer(m, t, acc, y_ptr, x_ptr, factor_ptr, l, row, col):
    """Add a tile of ``sum_i factor_i y_i x_i^T``, of the shape of the weights of layer ``l``."""
    return product(m, acc, y_ptr, m.all_outputs, x_ptr, m.all_inputs, row, col,
                   width(m, l + 1), width(m, l), 0, t.n, factor_ptr, True, False)  # fmt: skip


@triton.jit
def copy(from_ptr, to_ptr, n, BLOCK: tl.constexpr):
    """Copy ``n`` numbers, zeros where ``from_ptr`` is None."""
    for i in range(0, n, BLOCK):
        at = i + tl.arange(0, BLOCK)
        x = tl.zeros([BLOCK], dtype=tl.float32)
        if from_ptr is not None:
            x = tl.load(from_ptr + at, mask=at < n, other=0.0)
        tl.store(to_ptr + at, x, mask=at < n)


@triton.jit
def total_product(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """The sum of ``x y`` over ``n`` numbers."""
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(0, n, BLOCK):
        at = i + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < n, other=0.0)
        total += x * tl.load(y_ptr + at, mask=at < n, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def token_rows(ptr, stride, t, slots, width, col, BLOCK_N: tl.constexpr):
    """Pointers to the new tokens in slots, ``[slots, BLOCK_N]``, and a mask."""
    cols = col + tl.arange(0, BLOCK_N)[None, :]
    is_new = (slots >= t.pending) & (slots < t.n)
    at = (t.base + slots).to(tl.int64)[:, None] * stride + cols
    return ptr + at, is_new[:, None] & (cols < width)


@triton.jit
def load_tokens(ptr, stride, t, slots, width, col, BLOCK_N: tl.constexpr):
    """Features of the new tokens in slots, zero for others, in float32."""
    ptrs, mask = token_rows(ptr, stride, t, slots, width, col, BLOCK_N)
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tokens(ptr, stride, t, slots, width, col, tile):
    """Write the new tokens of a tile in the dtype of ``ptr``."""
    ptrs, mask = token_rows(ptr, stride, t, slots, width, col, tile.shape[1])
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def activate(a, IS_SILU: tl.constexpr):
    """The activation and its first two derivatives."""
    if IS_SILU:
        s = 1.0 / (1.0 + tl.exp(-a))
        slope = s * (1.0 - s)
        return a * s, s + a * slope, slope * (2.0 + a * (1.0 - 2.0 * s))
    else:
        below = 0.5 + 0.5 * tl.erf(a * 0.7071067811865476)
        density = tl.exp(-0.5 * a * a) * 0.3989422804014327
        return a * below, below + a * density, density * (2.0 - a * a)


@triton.jit
def clamp_of(m, n):
    """``kappa`` of a norm, and its derivative over the norm."""
    kappa = tl.full(n.shape, 1.0, dtype=tl.float32)
    curve = tl.zeros(n.shape, dtype=tl.float32)
    if m.CLAMP == 1:
        # not n > max_norm: NaN goes on
        kappa = tl.where(n <= m.max_norm, 1.0, m.max_norm / n)
        curve = tl.where(n <= m.max_norm, 0.0, -m.max_norm / n / n / n)
    if m.CLAMP == 2:
        x = n / m.max_norm
        square = x * x
        e = tl.exp(-2.0 * x)
        tanh = (1.0 - e) / (1.0 + e)
        # near 0 the power series, as the differences would cancel
        near = 62.0 / 2835.0 - square * (1382.0 / 155925.0)
        near = 2.0 / 15.0 - square * (17.0 / 315.0 - square * near)
        near = 1.0 - square * (1.0 / 3.0 - square * near)
        bend = 496.0 / 2835.0 - square * (2764.0 / 31185.0)
        bend = -2.0 / 3.0 + square * (8.0 / 15.0 - square * (34.0 / 105.0 - square * bend))
        is_near = x < 0.3
        kappa = tl.where(is_near, near, tanh / x)
        far = (1.0 - tanh * tanh - tanh / x) / n / n
        curve = tl.where(is_near, bend / (m.max_norm * m.max_norm), far)
    return kappa, curve
