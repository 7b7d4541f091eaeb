"""Backward of the pass over the keys, and the gradients of weights and momentum."""

import triton
import triton.language as tl

from memattn_kernels.neural_memory.keys import row_squares
from memattn_kernels.neural_memory.tiles import (
    BETA,
    CURVE,
    D_H,
    D_SCALED,
    DELTA,
    FIRST,
    KAPPA,
    LR,
    MU,
    OWN,
    RATE,
    SECOND,
    SIGMA,
    WIDE,
    G,
    H,
    add_outer,
    at_head,
    back,
    inputs_at,
    lanes_at,
    load_block,
    outputs_at,
    place_of,
    product,
    store_block,
    store_tokens,
    weights_before,
    width,
)


@triton.jit
def _take_rows(m, t, x_ptr, to_ptr, n_cols):
    """Move the rows of pending tokens, and leave zeros."""
    for row in tl.range(0, t.pending, m.BLOCK_M, disable_licm=True):
        for col in tl.range(0, n_cols, m.BLOCK_N, disable_licm=True):
            x = load_block(x_ptr, n_cols, row, col, t.pending, n_cols, m.BLOCK_M, m.BLOCK_N)
            store_block(to_ptr, n_cols, row, col, t.pending, n_cols, x)
    tl.debug_barrier()
    for row in tl.range(0, t.pending, m.BLOCK_M, disable_licm=True):
        for col in tl.range(0, n_cols, m.BLOCK_N, disable_licm=True):
            zero = tl.zeros([m.BLOCK_M, m.BLOCK_N], dtype=tl.float32)
            store_block(x_ptr, n_cols, row, col, t.pending, n_cols, zero)


@triton.jit
def store_pending_gradients(m, t, x, to):
    """The gradients of pending factors leave."""
    if t.pending > 0:
        first = place_of(x)[0] * (m.chunk - 1)
        d_h_ptr = to.pending_h + first * m.all_inputs
        _take_rows(m, t, inputs_at(m, D_H, 0), d_h_ptr, m.all_inputs)
        d_delta_ptr = to.pending_delta + first * m.all_outputs
        _take_rows(m, t, outputs_at(m, D_SCALED, 0), d_delta_ptr, m.all_outputs)
    tl.debug_barrier()


@triton.jit
def store_gates(m, t, x, section, end_ptr, ptr, pending_ptr):
    """The gradient of a gate, to new tokens and pending ones, with that of the state at the end."""
    at, b, h = place_of(x)
    if end_ptr is not None:
        end_ptr += at * (m.chunk - 1)
    if ptr is not None:
        ptr += (b * x.n_heads + h) * x.T
    if pending_ptr is not None:
        pending_ptr += at * (m.chunk - 1)
    for row in tl.range(0, t.n, m.BLOCK_M, disable_licm=True):
        slots = row + tl.arange(0, m.BLOCK_M)
        mask = slots < t.n
        d = tl.load(lanes_at(m, section) + slots, mask=mask, other=0.0)
        if end_ptr is not None:
            d += tl.load(end_ptr + slots, mask=mask & (t.n < m.chunk), other=0.0)
        if ptr is not None:
            tl.store(ptr + (t.base + slots), d, mask=mask & (slots >= t.pending))
        if pending_ptr is not None:
            tl.store(pending_ptr + slots, d, mask=slots < t.pending)


@triton.jit
def _finish(m, t, d, l, row, col, dv_ptr, stride_dv):
    """Store what becomes of the gradient of delta: of ``a`` in its place, and ``WIDE``."""
    PD, n_out = m.all_outputs, width(m, l + 1)
    if l + 1 < m.depth:
        first = load_block(outputs_at(m, FIRST, l), PD, row, col, t.n, n_out, m.BLOCK_M, m.BLOCK_N)
        second = load_block(
            outputs_at(m, SECOND, l), PD, row, col, t.n, n_out, m.BLOCK_M, m.BLOCK_N
        )
        store_block(outputs_at(m, WIDE, l), PD, row, col, t.n, n_out, first * d)
        store_block(outputs_at(m, D_SCALED, l), PD, row, col, t.n, n_out, second * d)
    else:
        if m.IS_HUBER:
            e = load_block(outputs_at(m, SECOND, l), PD, row, col, t.n, n_out, m.BLOCK_M, m.BLOCK_N)
            d = tl.where(tl.abs(e) <= m.huber_delta, d, 0.0)
        slots = row + tl.arange(0, m.BLOCK_M)
        store_tokens(dv_ptr, stride_dv, t, slots, n_out, col, -d)
        store_block(outputs_at(m, D_SCALED, l), PD, row, col, t.n, n_out, d)


@triton.jit
def key_backward(m, t, x, w_ptr, to):
    """Gradients of keys, values and learning rates."""
    PH, PD = m.all_inputs, m.all_outputs
    at, b, head = place_of(x)
    dk_ptr, dv_ptr, stride_dv = at_head(to.k, b, head), at_head(to.v, b, head), to.v.t
    d_lr_ptr = to.lr + (b * x.n_heads + head) * x.T
    for row in tl.range(0, t.n, m.BLOCK_M, disable_licm=True):
        slots = row + tl.arange(0, m.BLOCK_M)
        mask = slots < t.n
        along = tl.zeros([m.BLOCK_M], dtype=tl.float32)
        for l in tl.range(m.depth, disable_licm=True):
            n_out = width(m, l + 1)
            for col in tl.range(0, n_out, m.BLOCK_N, disable_licm=True):
                d = load_block(
                    outputs_at(m, D_SCALED, l), PD, row, col, t.n, n_out, m.BLOCK_M, m.BLOCK_N
                )
                delta = load_block(
                    outputs_at(m, DELTA, l), PD, row, col, t.n, n_out, m.BLOCK_M, m.BLOCK_N
                )
                along += tl.sum(d * delta, 1)
        kappa = tl.load(lanes_at(m, KAPPA) + slots, mask=mask, other=0.0)
        rate = tl.load(lanes_at(m, RATE) + slots, mask=mask, other=0.0)
        is_new = mask & (slots >= t.pending)
        tl.store(d_lr_ptr + (t.base + slots), along * kappa, mask=is_new)
        factor = tl.load(lanes_at(m, LR) + slots, mask=mask, other=0.0) * along
        factor *= tl.load(lanes_at(m, CURVE) + slots, mask=mask, other=0.0)
        tl.debug_barrier()  # all have read
        for l in tl.range(m.depth, disable_licm=True):
            n_in, n_out = width(m, l), width(m, l + 1)
            d_scaled, delta = outputs_at(m, D_SCALED, l), outputs_at(m, DELTA, l)
            length = tl.zeros([m.BLOCK_M], dtype=tl.float32)
            if m.CLAMP:
                length = row_squares(m, t, inputs_at(m, H, l), PH, row, n_in)
            for col in tl.range(0, n_out, m.BLOCK_N, disable_licm=True):
                d = load_block(d_scaled, PD, row, col, t.n, n_out, m.BLOCK_M, m.BLOCK_N)
                d *= rate[:, None]
                if m.CLAMP:
                    y = load_block(delta, PD, row, col, t.n, n_out, m.BLOCK_M, m.BLOCK_N)
                    d += (factor * length)[:, None] * y
                if l == 0:
                    _finish(m, t, d, l, row, col, dv_ptr, stride_dv)
                else:
                    store_block(d_scaled, PD, row, col, t.n, n_out, d)
            if m.CLAMP:
                length = row_squares(m, t, delta, PD, row, n_out)
                d_h = inputs_at(m, D_H, l)
                for col in tl.range(0, n_in, m.BLOCK_N, disable_licm=True):
                    y = load_block(
                        inputs_at(m, H, l), PH, row, col, t.n, n_in, m.BLOCK_M, m.BLOCK_N
                    )
                    d = load_block(d_h, PH, row, col, t.n, n_in, m.BLOCK_M, m.BLOCK_N)
                    d += (factor * length)[:, None] * y
                    store_block(d_h, PH, row, col, t.n, n_in, d)
    tl.debug_barrier()
    for l in tl.range(1, m.depth, disable_licm=True):
        n_out = width(m, l + 1)
        for row in tl.range(0, t.n, m.BLOCK_M, disable_licm=True):
            for col in tl.range(0, n_out, m.BLOCK_N, disable_licm=True):
                d = tl.zeros([m.BLOCK_M, m.BLOCK_N], dtype=tl.float32)
                d = product(
                    m, d, outputs_at(m, WIDE, l - 1), PD, w_ptr + weights_before(m, l),
                    width(m, l), row, col, t.n, n_out, 0, width(m, l), None, False, True,
                )  # fmt: skip
                d += load_block(
                    outputs_at(m, D_SCALED, l), PD, row, col, t.n, n_out, m.BLOCK_M, m.BLOCK_N
                )
                _finish(m, t, d, l, row, col, dv_ptr, stride_dv)
        tl.debug_barrier()
    for index in tl.range(m.depth, disable_licm=True):
        l = m.depth - 1 - index
        n_in = width(m, l)
        for row in tl.range(0, t.n, m.BLOCK_M, disable_licm=True):
            slots = row + tl.arange(0, m.BLOCK_M)
            for col in tl.range(0, n_in, m.BLOCK_N, disable_licm=True):
                d = back(m, t, outputs_at(m, D_SCALED, l), w_ptr, l, row, col)
                d += load_block(inputs_at(m, D_H, l), PH, row, col, t.n, n_in, m.BLOCK_M, m.BLOCK_N)
                if l > 0:
                    first = load_block(
                        outputs_at(m, FIRST, l - 1), PD, row, col, t.n, n_in, m.BLOCK_M, m.BLOCK_N
                    )
                    d_a = outputs_at(m, D_SCALED, l - 1)
                    d *= first
                    d += load_block(d_a, PD, row, col, t.n, n_in, m.BLOCK_M, m.BLOCK_N)
                    store_block(d_a, PD, row, col, t.n, n_in, d)
                else:
                    if m.RESIDUAL:
                        error = outputs_at(m, D_SCALED, m.depth - 1)
                        d += load_block(error, PD, row, col, t.n, n_in, m.BLOCK_M, m.BLOCK_N)
                    store_tokens(dk_ptr, to.k.t, t, slots, n_in, col, d)
        tl.debug_barrier()


@triton.jit
def weights_backward(m, t, has_end, d_w_ptr, d_s_ptr, HAS_READ: tl.constexpr):
    """The gradients of the weights at a chunk's start, from those after it, in place."""
    last, PD = t.n - 1, m.all_outputs
    for l in tl.range(m.depth, disable_licm=True):
        n_out, n_in, at = width(m, l + 1), width(m, l), weights_before(m, l)
        for row in tl.range(0, n_out, m.BLOCK_N, disable_licm=True):
            for col in tl.range(0, n_in, m.BLOCK_N, disable_licm=True):
                d_w = load_block(d_w_ptr + at, n_in, row, col, n_out, n_in, m.BLOCK_N, m.BLOCK_N)
                if m.HAS_MOMENTUM:
                    d_s = load_block(
                        d_s_ptr + at, n_in, row, col, n_out, n_in, m.BLOCK_N, m.BLOCK_N
                    )
                    if has_end:
                        d_s *= tl.load(lanes_at(m, MU) + last)
                        d_s += tl.load(lanes_at(m, SIGMA) + last) * d_w
                    if HAS_READ and not m.READ_CHUNK:
                        d_s = add_outer(
                            m, t, d_s, outputs_at(m, OWN, l), inputs_at(m, G, l),
                            lanes_at(m, SIGMA), l, row, col,
                        )  # fmt: skip
                    store_block(d_s_ptr + at, n_in, row, col, n_out, n_in, d_s)
                if has_end:
                    d_w *= tl.load(lanes_at(m, BETA) + last)
                if HAS_READ:
                    factor = None if m.READ_CHUNK else lanes_at(m, BETA)
                    d_w = add_outer(
                        m, t, d_w, outputs_at(m, OWN, l), inputs_at(m, G, l), factor, l, row, col
                    )
                d_w = add_outer(
                    m, t, d_w, outputs_at(m, D_SCALED, l), inputs_at(m, H, l), None, l, row, col
                )
                if l > 0:
                    d_w = product(
                        m, d_w, outputs_at(m, DELTA, l), PD, outputs_at(m, WIDE, l - 1), PD, row,
                        col, n_out, n_in, 0, t.n, None, True, False,
                    )  # fmt: skip
                store_block(d_w_ptr + at, n_in, row, col, n_out, n_in, d_w)
    tl.debug_barrier()
