"""Backward of a chunk's end and of its reads, and of the coefficients of both."""

import triton
import triton.language as tl

from memattn_kernels.neural_memory.tiles import (
    BETA,
    D_BETA,
    D_C,
    D_DECAY,
    D_ETA,
    D_H,
    D_LAST_C,
    D_LAST_M,
    D_SCALED,
    D_SIGMA,
    DECAY,
    ETA,
    MASKED,
    MU,
    OWN,
    PAIRS,
    READ_FIRST,
    SCALED,
    SIGMA,
    C,
    G,
    H,
    M,
    at_head,
    back,
    forth,
    inputs_at,
    lanes_at,
    load_block,
    load_tokens,
    outputs_at,
    pairs_at,
    place_of,
    product,
    store_block,
    store_tokens,
    width,
)


@triton.jit
def clear_chunk(m, t, x, d):
    """Gradients of the factors of a chunk that does not end: those of the state at the end."""
    PH, PD = m.all_inputs, m.all_outputs
    n_open = tl.where(t.n < m.chunk, t.n, 0)
    first = place_of(x)[0] * (m.chunk - 1)
    d_h_ptr, d_delta_ptr = d.h, d.delta
    if d_h_ptr is not None:
        d_h_ptr += first * PH
    if d_delta_ptr is not None:
        d_delta_ptr += first * PD
    for row in tl.range(0, t.n, m.BLOCK_M, disable_licm=True):
        for col in tl.range(0, PH, m.BLOCK_N, disable_licm=True):
            d_x = tl.zeros([m.BLOCK_M, m.BLOCK_N], dtype=tl.float32)
            if d_h_ptr is not None:
                d_x = load_block(d_h_ptr, PH, row, col, n_open, PH, m.BLOCK_M, m.BLOCK_N)
            store_block(inputs_at(m, D_H, 0), PH, row, col, t.n, PH, d_x)
        for col in tl.range(0, PD, m.BLOCK_N, disable_licm=True):
            d_x = tl.zeros([m.BLOCK_M, m.BLOCK_N], dtype=tl.float32)
            if d_delta_ptr is not None:
                d_x = load_block(d_delta_ptr, PD, row, col, n_open, PD, m.BLOCK_M, m.BLOCK_N)
            store_block(outputs_at(m, D_SCALED, 0), PD, row, col, t.n, PD, d_x)
    tl.debug_barrier()


@triton.jit
def end_backward(m, t, d_w_ptr, d_s_ptr):
    """Gradients of the factors and of the last coefficients from those of the weights after."""
    PH, PD = m.all_inputs, m.all_outputs
    last = t.n - 1
    for row in tl.range(0, t.n, m.BLOCK_M, disable_licm=True):
        slots = row + tl.arange(0, m.BLOCK_M)
        mask = slots < t.n
        c = -tl.load(pairs_at(m, C) + last * m.chunk + slots, mask=mask, other=0.0)
        momentum = -tl.load(pairs_at(m, M) + last * m.chunk + slots, mask=mask, other=0.0)
        d_c = tl.zeros([m.BLOCK_M], dtype=tl.float32)
        d_m = tl.zeros([m.BLOCK_M], dtype=tl.float32)
        for l in tl.range(m.depth, disable_licm=True):
            n_in, n_out = width(m, l), width(m, l + 1)
            h, scaled = inputs_at(m, H, l), outputs_at(m, SCALED, l)
            for col in tl.range(0, n_out, m.BLOCK_N, disable_licm=True):
                delta = load_block(scaled, PD, row, col, t.n, n_out, m.BLOCK_M, m.BLOCK_N)
                v = forth(m, t, h, d_w_ptr, l, row, col)
                d_c -= tl.sum(v * delta, 1)
                d = c[:, None] * v
                if m.HAS_MOMENTUM:
                    v = forth(m, t, h, d_s_ptr, l, row, col)
                    d_m -= tl.sum(v * delta, 1)
                    d += momentum[:, None] * v
                store_block(outputs_at(m, D_SCALED, l), PD, row, col, t.n, n_out, d)
            for col in tl.range(0, n_in, m.BLOCK_N, disable_licm=True):
                d = c[:, None] * back(m, t, scaled, d_w_ptr, l, row, col)
                if m.HAS_MOMENTUM:
                    d += momentum[:, None] * back(m, t, scaled, d_s_ptr, l, row, col)
                store_block(inputs_at(m, D_H, l), PH, row, col, t.n, n_in, d)
        tl.store(lanes_at(m, D_LAST_C) + slots, d_c, mask=mask)
        tl.store(lanes_at(m, D_LAST_M) + slots, d_m, mask=mask)
    tl.debug_barrier()


@triton.jit
def _pairs_backward(m, t, l):
    """Gradients of products of queries and keys, and of ``c``, from layer ``l``'s part."""
    PH, PD = m.all_inputs, m.all_outputs
    for row in tl.range(0, t.n, m.BLOCK_M, disable_licm=True):
        for col in tl.range(0, row + m.BLOCK_M, m.BLOCK_M, disable_licm=True):
            zero = tl.zeros([m.BLOCK_M, m.BLOCK_M], dtype=tl.float32)
            pairs = product(m, zero, inputs_at(m, G, l), PH, inputs_at(m, H, l), PH, row, col, t.n,
                            t.n, 0, width(m, l), None, False, True)  # fmt: skip
            masked = -product(m, zero, outputs_at(m, OWN, l), PD, outputs_at(m, SCALED, l), PD, row,
                              col, t.n, t.n, 0, width(m, l + 1), None, False, True)  # fmt: skip
            c = load_block(pairs_at(m, C), m.chunk, row, col, t.n, t.n, m.BLOCK_M, m.BLOCK_M)
            d_c = pairs * masked
            if l + 1 < m.depth:
                d_c += load_block(
                    pairs_at(m, D_C), m.chunk, row, col, t.n, t.n, m.BLOCK_M, m.BLOCK_M
                )
            store_block(pairs_at(m, D_C), m.chunk, row, col, t.n, t.n, d_c)
            store_block(pairs_at(m, MASKED), m.chunk, row, col, t.n, t.n, c * masked)
            store_block(pairs_at(m, PAIRS), m.chunk, row, col, t.n, t.n, -(c * pairs))
    tl.debug_barrier()


@triton.jit
def read_backward(m, t, x, w_ptr, s_ptr, d_results, to):
    """Gradients of what the queries of a chunk read."""
    PH, PD = m.all_inputs, m.all_outputs
    at, b, h = place_of(x)
    do_ptr, dq_ptr = at_head(d_results.out, b, h), at_head(to.q, b, h)
    n_out = width(m, m.depth)
    for row in tl.range(0, t.n, m.BLOCK_M, disable_licm=True):
        slots = row + tl.arange(0, m.BLOCK_M)
        mask = slots < t.n
        zero = tl.zeros([m.BLOCK_M], dtype=tl.float32)
        tl.store(lanes_at(m, D_BETA) + slots, zero, mask=mask)
        tl.store(lanes_at(m, D_SIGMA) + slots, zero, mask=mask)
        for col in tl.range(0, n_out, m.BLOCK_N, disable_licm=True):
            d = load_tokens(do_ptr, d_results.out.t, t, slots, n_out, col, m.BLOCK_N)
            store_block(outputs_at(m, OWN, m.depth - 1), PD, row, col, t.n, n_out, d)
    tl.debug_barrier()
    for index in tl.range(m.depth, disable_licm=True):
        l = m.depth - 1 - index
        n_in, n_out = width(m, l), width(m, l + 1)
        own = outputs_at(m, OWN, l)
        if not m.READ_CHUNK:
            _pairs_backward(m, t, l)
        for row in tl.range(0, t.n, m.BLOCK_M, disable_licm=True):
            slots = row + tl.arange(0, m.BLOCK_M)
            mask = slots < t.n
            beta = tl.load(lanes_at(m, BETA) + slots, mask=mask, other=0.0)
            sigma = tl.load(lanes_at(m, SIGMA) + slots, mask=mask, other=0.0)
            d_beta = tl.zeros([m.BLOCK_M], dtype=tl.float32)
            d_sigma = tl.zeros([m.BLOCK_M], dtype=tl.float32)
            for col in tl.range(0, n_in, m.BLOCK_N, disable_licm=True):
                d = back(m, t, own, w_ptr, l, row, col)
                if not m.READ_CHUNK:
                    g = load_block(
                        inputs_at(m, G, l), PH, row, col, t.n, n_in, m.BLOCK_M, m.BLOCK_N
                    )
                    d_beta += tl.sum(d * g, 1)
                    d *= beta[:, None]
                    if m.HAS_MOMENTUM:
                        u = back(m, t, own, s_ptr, l, row, col)
                        d_sigma += tl.sum(u * g, 1)
                        d += sigma[:, None] * u
                    d = product(
                        m, d, pairs_at(m, MASKED), m.chunk, inputs_at(m, H, l), PH, row, col, t.n,
                        n_in, 0, tl.minimum(row + m.BLOCK_M, t.n), None, False, False,
                    )  # fmt: skip
                    d_h = inputs_at(m, D_H, l)
                    d_x = load_block(d_h, PH, row, col, t.n, n_in, m.BLOCK_M, m.BLOCK_N)
                    d_x = product(
                        m, d_x, pairs_at(m, MASKED), m.chunk, inputs_at(m, G, l), PH, row, col, t.n,
                        n_in, row, t.n, None, True, False,
                    )  # fmt: skip
                    store_block(d_h, PH, row, col, t.n, n_in, d_x)
                if l > 0:
                    first = load_block(
                        outputs_at(m, READ_FIRST, l - 1), PD, row, col, t.n, n_in, m.BLOCK_M,
                        m.BLOCK_N,
                    )  # fmt: skip
                    store_block(outputs_at(m, OWN, l - 1), PD, row, col, t.n, n_in, first * d)
                else:
                    if m.RESIDUAL:
                        d += load_block(
                            outputs_at(m, OWN, m.depth - 1), PD, row, col, t.n, n_in, m.BLOCK_M,
                            m.BLOCK_N,
                        )  # fmt: skip
                    store_tokens(dq_ptr, to.q.t, t, slots, n_in, col, d)
            if not m.READ_CHUNK:
                d_beta += tl.load(lanes_at(m, D_BETA) + slots, mask=mask, other=0.0)
                d_sigma += tl.load(lanes_at(m, D_SIGMA) + slots, mask=mask, other=0.0)
                tl.store(lanes_at(m, D_BETA) + slots, d_beta, mask=mask)
                tl.store(lanes_at(m, D_SIGMA) + slots, d_sigma, mask=mask)
                for col in tl.range(0, n_out, m.BLOCK_N, disable_licm=True):
                    d_scaled = outputs_at(m, D_SCALED, l)
                    d_x = load_block(d_scaled, PD, row, col, t.n, n_out, m.BLOCK_M, m.BLOCK_N)
                    d_x = product(
                        m, d_x, pairs_at(m, PAIRS), m.chunk, own, PD, row, col, t.n, n_out, row,
                        t.n, None, True, False,
                    )  # fmt: skip
                    store_block(d_scaled, PD, row, col, t.n, n_out, d_x)
        tl.debug_barrier()


@triton.jit
def coefficients_backward(m, t, has_end, beta_end, sigma_end, mu_end, HAS_READ: tl.constexpr):
    """Reverse recurrences: gradients of decay and momentum from those of the coefficients."""
    columns = tl.arange(0, m.BLOCK_C)
    c = tl.zeros([m.BLOCK_C], dtype=tl.float32)
    momentum = tl.zeros([m.BLOCK_C], dtype=tl.float32)
    beta, sigma, mu = 0.0, 0.0, 0.0
    if has_end:
        c += tl.load(lanes_at(m, D_LAST_C) + columns, mask=columns < t.n, other=0.0)
        momentum += tl.load(lanes_at(m, D_LAST_M) + columns, mask=columns < t.n, other=0.0)
        beta, sigma, mu = beta_end, sigma_end, mu_end
    for index in tl.range(t.n, disable_licm=True):
        j = t.n - 1 - index
        keep = 1.0 - tl.load(lanes_at(m, DECAY) + j)
        eta = tl.load(lanes_at(m, ETA) + j)
        if HAS_READ:
            mask = columns <= j
            c += tl.load(pairs_at(m, D_C) + j * m.chunk + columns, mask=mask, other=0.0)
            beta += tl.load(lanes_at(m, D_BETA) + j)
            sigma += tl.load(lanes_at(m, D_SIGMA) + j)
        momentum += c
        mu += sigma
        # coefficients of the token before; before the first one 0, 0, 1, 0, 1
        before = (columns < j) & (j > 0)
        at = tl.maximum(j - 1, 0)
        c_before = tl.load(pairs_at(m, C) + at * m.chunk + columns, mask=before, other=0.0)
        m_before = tl.load(pairs_at(m, M) + at * m.chunk + columns, mask=before, other=0.0)
        beta_before = tl.where(j > 0, tl.load(lanes_at(m, BETA) + at), 1.0)
        sigma_before = tl.where(j > 0, tl.load(lanes_at(m, SIGMA) + at), 0.0)
        mu_before = tl.where(j > 0, tl.load(lanes_at(m, MU) + at), 1.0)
        d_decay = tl.sum(c_before * c, 0) + beta_before * beta + sigma_before * sigma
        d_eta = tl.sum(m_before * momentum, 0) + mu_before * mu
        tl.store(lanes_at(m, D_DECAY) + j, -d_decay)
        tl.store(lanes_at(m, D_ETA) + j, d_eta)
        c = tl.where(columns < j, keep * c, 0.0)
        momentum = tl.where(columns < j, eta * momentum, 0.0)
        beta *= keep
        sigma *= keep
        mu *= eta
    tl.debug_barrier()
