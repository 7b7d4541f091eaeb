"""The pass over the keys of a chunk, its coefficients, and its end; memory tokens in and out."""

import triton
import triton.language as tl

from memattn_kernels.neural_memory.tiles import (
    BETA,
    CURVE,
    DECAY,
    DELTA,
    ETA,
    FIRST,
    KAPPA,
    LR,
    MU,
    RATE,
    SCALED,
    SECOND,
    SIGMA,
    C,
    G,
    H,
    M,
    Tokens,
    activate,
    add_outer,
    at_head,
    back,
    clamp_of,
    forth,
    inputs_at,
    lanes_at,
    load_block,
    load_tokens,
    outputs_at,
    pairs_at,
    place_of,
    store_block,
    weights_before,
    width,
)


@triton.jit
def row_of(row, T, count_ptr, row_start_ptr, row_end_ptr):
    """First token of a row, pending tokens, and the sum of these and its own."""
    start, end = 0, T
    pending = 0
    if row_start_ptr is not None:
        start = tl.load(row_start_ptr + row)
        end = tl.load(row_end_ptr + row)
    if count_ptr is not None:
        pending = tl.load(count_ptr + row)
    return start, pending, pending + tl.maximum(end - start, 0)


@triton.jit
def chunk_of(m, x, i):
    """The tokens of chunk ``i`` of a row."""
    n = tl.minimum(x.total - i * m.chunk, m.chunk)
    return Tokens(n, tl.where(i == 0, x.pending, 0), x.start - x.pending + i * m.chunk)


@triton.jit
def checkpoint_at(m, x, i):
    """Where weights and momentum before chunk ``i``, the first of a group, are kept."""
    at, b, h = place_of(x)
    slot = (x.start - x.pending + i * m.chunk) // (x.group * m.chunk)
    if x.pending_h is None:
        slot -= 1
    return x.checkpoints + ((b * x.n_slots + slot) * x.n_heads + h) * x.n_kept


@triton.jit
def _gate(ptr, stride, pending_ptr, t, slots):
    """One number for each slot, 0 where there is none."""
    x = tl.zeros(slots.shape, dtype=tl.float32)
    if ptr is not None:
        is_new = (slots >= t.pending) & (slots < t.n)
        x += tl.load(ptr + (t.base + slots).to(tl.int64) * stride, mask=is_new, other=0.0)
        if pending_ptr is not None:
            x += tl.load(pending_ptr + slots, mask=slots < t.pending, other=0.0)
    return x


@triton.jit
def load_chunk(m, t, x):
    """Keys and queries as inputs of the first layer, rates as lanes."""
    at, b, h = place_of(x)
    q_ptr, k_ptr, lr_ptr = at_head(x.q, b, h), at_head(x.k, b, h), at_head(x.lr, b, h)
    decay_ptr, eta_ptr = x.decay.ptr, x.eta.ptr
    if decay_ptr is not None:
        decay_ptr = at_head(x.decay, b, h)
    if eta_ptr is not None:
        eta_ptr = at_head(x.eta, b, h)
    pending_decay_ptr, pending_eta_ptr = x.pending_decay, x.pending_eta
    if x.pending_h is not None:
        pending_decay_ptr += at * (m.chunk - 1)
        pending_eta_ptr += at * (m.chunk - 1)
    for row in tl.range(0, t.n, m.BLOCK_M, disable_licm=True):
        slots = row + tl.arange(0, m.BLOCK_M)
        for col in tl.range(0, m.width_0, m.BLOCK_N, disable_licm=True):
            k = load_tokens(k_ptr, x.k.t, t, slots, m.width_0, col, m.BLOCK_N)
            store_block(inputs_at(m, H, 0), m.all_inputs, row, col, t.n, m.width_0, k)
            q = load_tokens(q_ptr, x.q.t, t, slots, m.width_0, col, m.BLOCK_N)
            store_block(inputs_at(m, G, 0), m.all_inputs, row, col, t.n, m.width_0, q)
        mask = slots < t.n
        tl.store(lanes_at(m, LR) + slots, _gate(lr_ptr, x.lr.t, None, t, slots), mask=mask)
        decay = _gate(decay_ptr, x.decay.t, pending_decay_ptr, t, slots)
        tl.store(lanes_at(m, DECAY) + slots, decay, mask=mask)
        eta = _gate(eta_ptr, x.eta.t, pending_eta_ptr, t, slots)
        tl.store(lanes_at(m, ETA) + slots, eta, mask=mask)
    tl.debug_barrier()


@triton.jit
def key_pass(m, t, x, w_ptr, surprise_ptr, BACKWARD: tl.constexpr):
    """Gradients of the inner loss at the weights ``w_ptr``; returns how many tokens are skipped.

    The forward has one section for phi', delta and scaled delta, one after the other.
    """
    FIRST_: tl.constexpr = FIRST if BACKWARD else DELTA
    SCALED_: tl.constexpr = SCALED if BACKWARD else DELTA
    PH, PD = m.all_inputs, m.all_outputs
    at, b, head = place_of(x)
    v_ptr = at_head(x.v, b, head)
    for l in tl.range(m.depth, disable_licm=True):
        n_out = width(m, l + 1)
        for row in tl.range(0, t.n, m.BLOCK_M, disable_licm=True):
            slots = row + tl.arange(0, m.BLOCK_M)
            for col in tl.range(0, n_out, m.BLOCK_N, disable_licm=True):
                a = forth(m, t, inputs_at(m, H, l), w_ptr, l, row, col)
                if l + 1 < m.depth:
                    h, first, second = activate(a, m.IS_SILU)
                    store_block(inputs_at(m, H, l + 1), PH, row, col, t.n, n_out, h)
                    store_block(outputs_at(m, FIRST_, l), PD, row, col, t.n, n_out, first)
                    if BACKWARD:
                        store_block(outputs_at(m, SECOND, l), PD, row, col, t.n, n_out, second)
                else:
                    if m.RESIDUAL:
                        a += load_block(
                            inputs_at(m, H, 0), PH, row, col, t.n, n_out, m.BLOCK_M, m.BLOCK_N
                        )
                    a -= load_tokens(v_ptr, x.v.t, t, slots, n_out, col, m.BLOCK_N)
                    if m.IS_HUBER:
                        if BACKWARD:
                            store_block(outputs_at(m, SECOND, l), PD, row, col, t.n, n_out, a)
                        a = tl.where(a > m.huber_delta, m.huber_delta, a)
                        a = tl.where(a < -m.huber_delta, -m.huber_delta, a)
                    store_block(outputs_at(m, DELTA, l), PD, row, col, t.n, n_out, a)
        tl.debug_barrier()
    for index in tl.range(1, m.depth, disable_licm=True):
        l = m.depth - 1 - index
        n_out = width(m, l + 1)
        for row in tl.range(0, t.n, m.BLOCK_M, disable_licm=True):
            for col in tl.range(0, n_out, m.BLOCK_N, disable_licm=True):
                d = back(m, t, outputs_at(m, DELTA, l + 1), w_ptr, l + 1, row, col)
                first = load_block(
                    outputs_at(m, FIRST_, l), PD, row, col, t.n, n_out, m.BLOCK_M, m.BLOCK_N
                )
                store_block(outputs_at(m, DELTA, l), PD, row, col, t.n, n_out, first * d)
                if BACKWARD:
                    second = load_block(
                        outputs_at(m, SECOND, l), PD, row, col, t.n, n_out, m.BLOCK_M, m.BLOCK_N
                    )
                    store_block(outputs_at(m, SECOND, l), PD, row, col, t.n, n_out, second * d)
        tl.debug_barrier()

    skipped = 0
    if surprise_ptr is not None:
        at, b, head = place_of(x)
        surprise_ptr += (b * x.n_heads + head) * x.T
    for row in tl.range(0, t.n, m.BLOCK_M, disable_licm=True):
        slots = row + tl.arange(0, m.BLOCK_M)
        mask = slots < t.n
        is_new = mask & (slots >= t.pending)
        square = tl.zeros([m.BLOCK_M], dtype=tl.float32)
        for l in tl.range(m.depth, disable_licm=True):
            square += row_squares(m, t, inputs_at(m, H, l), PH, row, width(m, l)) * row_squares(
                m, t, outputs_at(m, DELTA, l), PD, row, width(m, l + 1)
            )
        norm = tl.sqrt_rn(square)
        kappa, curve = clamp_of(m, norm)
        rate = tl.load(lanes_at(m, LR) + slots, mask=mask, other=0.0) * kappa
        if surprise_ptr is not None:
            tl.store(surprise_ptr + (t.base + slots), norm, mask=is_new)
        ok = norm < float("inf")
        if m.SKIP:
            rate = tl.where(ok, rate, 0.0)
            kappa = tl.where(ok, kappa, 0.0)
            curve = tl.where(ok, curve, 0.0)
            skipped += tl.sum((is_new & (ok == 0)).to(tl.int32), 0)
        if BACKWARD:
            tl.store(lanes_at(m, RATE) + slots, rate, mask=mask)
            tl.store(lanes_at(m, KAPPA) + slots, kappa, mask=mask)
            tl.store(lanes_at(m, CURVE) + slots, curve, mask=mask)
        tl.debug_barrier()  # all have read
        for l in tl.range(m.depth, disable_licm=True):
            n_out = width(m, l + 1)
            for col in tl.range(0, n_out, m.BLOCK_N, disable_licm=True):
                delta = load_block(
                    outputs_at(m, DELTA, l), PD, row, col, t.n, n_out, m.BLOCK_M, m.BLOCK_N
                )
                scaled = rate[:, None] * delta
                if m.SKIP:
                    scaled = tl.where(ok[:, None], scaled, 0.0)
                store_block(outputs_at(m, SCALED_, l), PD, row, col, t.n, n_out, scaled)
            if m.SKIP:
                _clear(m, t, ok, inputs_at(m, H, l), PH, row, width(m, l))
                if BACKWARD:
                    _clear(m, t, ok, outputs_at(m, DELTA, l), PD, row, n_out)
                    if l + 1 < m.depth:
                        _clear(m, t, ok, outputs_at(m, FIRST, l), PD, row, n_out)
                    if l + 1 < m.depth or m.IS_HUBER:
                        _clear(m, t, ok, outputs_at(m, SECOND, l), PD, row, n_out)
    tl.debug_barrier()
    return skipped


@triton.jit
def row_squares(m, t, x_ptr, stride, row, n_cols):
    """The squared lengths of a tile's rows."""
    total = tl.zeros([m.BLOCK_M], dtype=tl.float32)
    for col in tl.range(0, n_cols, m.BLOCK_N, disable_licm=True):
        x = load_block(x_ptr, stride, row, col, t.n, n_cols, m.BLOCK_M, m.BLOCK_N)
        total += tl.sum(x * x, 1)
    return total


@triton.jit
def _clear(m, t, ok, x_ptr, stride, row, n_cols):
    """Zero the rows of a tile that are not ``ok``."""
    for col in tl.range(0, n_cols, m.BLOCK_N, disable_licm=True):
        x = load_block(x_ptr, stride, row, col, t.n, n_cols, m.BLOCK_M, m.BLOCK_N)
        store_block(x_ptr, stride, row, col, t.n, n_cols, tl.where(ok[:, None], x, 0.0))


@triton.jit
def copy_rows(m, from_ptr, to_ptr, n_rows, n_cols):
    """Copy rows that lie without gaps."""
    for row in tl.range(0, n_rows, m.BLOCK_M, disable_licm=True):
        for col in tl.range(0, n_cols, m.BLOCK_N, disable_licm=True):
            x = load_block(from_ptr, n_cols, row, col, n_rows, n_cols, m.BLOCK_M, m.BLOCK_N)
            store_block(to_ptr, n_cols, row, col, n_rows, n_cols, x)


@triton.jit
def load_pending(m, t, x, BACKWARD: tl.constexpr):
    """The factors of pending tokens take their rows."""
    if x.pending_h is not None:
        if t.pending > 0:
            first = place_of(x)[0] * (m.chunk - 1)
            h_ptr = x.pending_h + first * m.all_inputs
            delta_ptr = x.pending_delta + first * m.all_outputs
            copy_rows(m, h_ptr, inputs_at(m, H, 0), t.pending, m.all_inputs)
            section = outputs_at(m, SCALED if BACKWARD else DELTA, 0)
            copy_rows(m, delta_ptr, section, t.pending, m.all_outputs)
        tl.debug_barrier()


@triton.jit
def coefficients(m, t):
    """beta, sigma, mu, c and m of a chunk, by recurrence."""
    columns = tl.arange(0, m.BLOCK_C)
    c = tl.zeros([m.BLOCK_C], dtype=tl.float32)
    momentum = tl.zeros([m.BLOCK_C], dtype=tl.float32)
    beta, sigma, mu = 1.0, 0.0, 1.0
    for j in tl.range(t.n, disable_licm=True):
        keep = 1.0 - tl.load(lanes_at(m, DECAY) + j)
        eta = tl.load(lanes_at(m, ETA) + j)
        momentum = eta * momentum + tl.where(columns == j, 1.0, 0.0)
        c = keep * c + momentum
        beta *= keep
        mu *= eta
        sigma = keep * sigma + mu
        tl.store(lanes_at(m, BETA) + j, beta)
        tl.store(lanes_at(m, SIGMA) + j, sigma)
        tl.store(lanes_at(m, MU) + j, mu)
        mask = columns < m.chunk
        tl.store(pairs_at(m, C) + j * m.chunk + columns, c, mask=mask)
        tl.store(pairs_at(m, M) + j * m.chunk + columns, momentum, mask=mask)
    tl.debug_barrier()


@triton.jit
def end_of_chunk(m, t, w_ptr, s_ptr, to_w_ptr, to_s_ptr, BACKWARD: tl.constexpr):
    """The weights after a full chunk; where they go may be where they come from."""
    last = t.n - 1
    beta = tl.load(lanes_at(m, BETA) + last)
    sigma = tl.load(lanes_at(m, SIGMA) + last)
    mu = tl.load(lanes_at(m, MU) + last)
    for l in tl.range(m.depth, disable_licm=True):
        n_out, n_in, at = width(m, l + 1), width(m, l), weights_before(m, l)
        delta = outputs_at(m, SCALED if BACKWARD else DELTA, l)
        h = inputs_at(m, H, l)
        for row in tl.range(0, n_out, m.BLOCK_N, disable_licm=True):
            for col in tl.range(0, n_in, m.BLOCK_N, disable_licm=True):
                zero = tl.zeros([m.BLOCK_N, m.BLOCK_N], dtype=tl.float32)
                u = add_outer(m, t, zero, delta, h, pairs_at(m, C) + last * m.chunk, l, row, col)
                w = load_block(w_ptr + at, n_in, row, col, n_out, n_in, m.BLOCK_N, m.BLOCK_N)
                w = beta * w - u
                if m.HAS_MOMENTUM:
                    s = load_block(s_ptr + at, n_in, row, col, n_out, n_in, m.BLOCK_N, m.BLOCK_N)
                    w += sigma * s
                    factor = pairs_at(m, M) + last * m.chunk
                    s = mu * s - add_outer(m, t, zero, delta, h, factor, l, row, col)
                    store_block(to_s_ptr + at, n_in, row, col, n_out, n_in, s)
                store_block(to_w_ptr + at, n_in, row, col, n_out, n_in, w)
    tl.debug_barrier()
