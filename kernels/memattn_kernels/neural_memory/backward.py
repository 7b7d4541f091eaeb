"""Backward of the neural memory: a program walks the chunks of a head of a row in reverse.

Weights and momentum at the start of each chunk of a group are computed again from the group's
checkpoint, in the same loop that then walks the group in reverse: both begin with the keys.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from memattn_kernels.neural_memory.backward_keys import (
    key_backward,
    store_gates,
    store_pending_gradients,
    weights_backward,
)
from memattn_kernels.neural_memory.backward_reads import (
    clear_chunk,
    coefficients_backward,
    end_backward,
    read_backward,
)
from memattn_kernels.neural_memory.forward import COPY_BLOCK, read_pass
from memattn_kernels.neural_memory.keys import (
    checkpoint_at,
    chunk_of,
    coefficients,
    end_of_chunk,
    key_pass,
    load_chunk,
    load_pending,
    row_of,
)
from memattn_kernels.neural_memory.tiles import (
    BACKWARD_SECTIONS,
    D_DECAY,
    D_ETA,
    Memory,
    RowArguments,
    Strided,
    copy,
    packed_size,
    scratch_of,
    total_product,
    weights_before,
)


class Cotangents(NamedTuple):
    """Gradients of results, arguments of the kernel; each pointer may be None."""

    out: Strided
    h: Any
    delta: Any
    decay: Any
    eta: Any


class Gradients(NamedTuple):
    """Gradients of inputs, arguments of the kernel; those after ``lr`` may be None."""

    q: Strided
    k: Strided
    v: Strided
    lr: Any
    decay: Any
    eta: Any
    pending_h: Any
    pending_delta: Any
    pending_decay: Any
    pending_eta: Any


@triton.jit
def chunk_backward(m, t, x, w, s, d_w, d_s, has_end, d, to):
    """Gradients of a chunk, from ``d_w`` and ``d_s`` after it to those before it."""
    HAS_READ: tl.constexpr = d.out.ptr is not None
    size = weights_before(m, m.depth)
    beta_end, sigma_end, mu_end = 0.0, 0.0, 0.0
    if has_end:
        end_backward(m, t, d_w, d_s)
        beta_end = total_product(d_w, w, size, COPY_BLOCK)
        if m.HAS_MOMENTUM:
            sigma_end = total_product(d_w, s, size, COPY_BLOCK)
            mu_end = total_product(d_s, s, size, COPY_BLOCK)
    else:
        clear_chunk(m, t, x, d)
    if HAS_READ:
        read_pass(m, t, x, w, s, None, True)
        read_backward(m, t, x, w, s, d, to)
    HAS_PAIRS: tl.constexpr = HAS_READ and not m.READ_CHUNK
    coefficients_backward(m, t, has_end, beta_end, sigma_end, mu_end, HAS_PAIRS)
    store_gates(m, t, x, D_DECAY, d.decay, to.decay, to.pending_decay)
    if m.HAS_MOMENTUM:
        store_gates(m, t, x, D_ETA, d.eta, to.eta, to.pending_eta)
    if to.pending_h is not None:
        store_pending_gradients(m, t, x, to)
    key_backward(m, t, x, w, to)
    weights_backward(m, t, has_end, d_w, d_s, HAS_READ)


@triton.jit
def walk_backward(m, x, start_w, start_s, states, d_w, d_s, d, to, HAS_END: tl.constexpr):
    """Walk the chunks of a head in reverse, group after group."""
    size, n_kept = weights_before(m, m.depth), x.n_kept
    n_chunks = tl.cdiv(x.total, m.chunk)
    n_groups = tl.cdiv(n_chunks, x.group)
    for index in tl.range(n_groups, disable_licm=True):
        first = (n_groups - 1 - index) * x.group
        n = tl.minimum(n_chunks - first, x.group)
        tl.debug_barrier()
        if first == 0:
            copy(start_w, states, size, COPY_BLOCK)
            if m.HAS_MOMENTUM:
                copy(start_s, states + size, size, COPY_BLOCK)
        else:
            copy(checkpoint_at(m, x, first), states, n_kept, COPY_BLOCK)
        tl.debug_barrier()
        # chunks forth to the last one, then back from it
        for step in tl.range(2 * n - 1, disable_licm=True):
            i = tl.minimum(step, 2 * n - 2 - step)
            t = chunk_of(m, x, first + i)
            w = states + i * n_kept
            load_chunk(m, t, x)
            key_pass(m, t, x, w, None, True)
            load_pending(m, t, x, True)
            coefficients(m, t)
            if step < n - 1:
                end_of_chunk(m, t, w, w + size, w + n_kept, w + n_kept + size, True)
            else:
                has_end = (t.n == m.chunk) & ((first + i + 1 < n_chunks) | HAS_END)
                chunk_backward(m, t, x, w, w + size, d_w, d_s, has_end, d, to)


@triton.jit(do_not_specialize=("first", "n_heads", "T", "group", "n_slots"))
def neural_memory_bwd_kernel(
    q_ptr, k_ptr, v_ptr, lr_ptr, eta_ptr, decay_ptr,  # inputs; the last two may be None
    place_ptr,  # int32 [all heads, 2], row and head
    start_w_ptr, start_s_ptr, pending_h_ptr, pending_delta_ptr,  # state, or None but the first
    pending_decay_ptr, pending_eta_ptr, count_ptr, row_start_ptr, row_end_ptr,
    do_ptr, d_end_w_ptr, d_end_s_ptr, d_end_h_ptr, d_end_delta_ptr,  # cotangents or None
    d_end_decay_ptr, d_end_eta_ptr,
    dq_ptr, dk_ptr, dv_ptr, d_lr_ptr, d_eta_ptr, d_decay_ptr,  # gradients, gates without gaps
    d_w_ptr, d_s_ptr, d_pending_h_ptr, d_pending_delta_ptr, d_pending_decay_ptr, d_pending_eta_ptr,
    checkpoints_ptr, scratch_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_dob, stride_doh, stride_dot,
    stride_dqb, stride_dqh, stride_dqt, stride_dkb, stride_dkh, stride_dkt,
    stride_dvb, stride_dvh, stride_dvt,
    stride_lrb, stride_lrh, stride_lrt, stride_etab, stride_etah, stride_etat,
    stride_decayb, stride_decayh, stride_decayt, stride_startr,
    first, n_heads, T, group, n_slots, program_floats, states_at,  # sizes
    huber_delta, max_norm,
    depth: tl.constexpr, width_0: tl.constexpr, width_1: tl.constexpr, width_2: tl.constexpr,
    width_3: tl.constexpr, width_4: tl.constexpr, chunk: tl.constexpr,
    all_inputs: tl.constexpr, all_outputs: tl.constexpr,
    IS_BATCH: tl.constexpr, READ_CHUNK: tl.constexpr, IS_SILU: tl.constexpr, RESIDUAL: tl.constexpr,
    IS_HUBER: tl.constexpr, CLAMP: tl.constexpr, SKIP: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    HAS_END: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (programs,). One program owns head ``first + program`` of all heads of all rows.

    ``d_w_ptr`` and ``d_s_ptr`` ``[rows, heads, size]`` carry the gradients from chunk to chunk.
    From ``states_at`` on scratch has weights and momentum of a group's chunks.
    """
    item = (first + tl.program_id(0)).to(tl.int64)
    row, h = item // n_heads, item % n_heads
    start, pending, total = row_of(row, T, count_ptr, row_start_ptr, row_end_ptr)
    size = packed_size(depth, width_0, width_1, width_2, width_3, width_4)
    d_w, d_s = d_w_ptr + item * size, d_s_ptr
    if d_end_w_ptr is not None:
        d_end_w_ptr += item * size
    copy(d_end_w_ptr, d_w, size, COPY_BLOCK)
    if HAS_MOMENTUM:
        d_s += item * size
        if start_s_ptr is not None:
            start_s_ptr += item * size
        if d_end_s_ptr is not None:
            d_end_s_ptr += item * size
        copy(d_end_s_ptr, d_s, size, COPY_BLOCK)
    x = RowArguments(
        place_ptr + 2 * item, IS_BATCH, n_heads, T,
        Strided(q_ptr, stride_qb, stride_qh, stride_qt),
        Strided(k_ptr, stride_kb, stride_kh, stride_kt),
        Strided(v_ptr, stride_vb, stride_vh, stride_vt),
        Strided(lr_ptr, stride_lrb, stride_lrh, stride_lrt),
        Strided(decay_ptr, stride_decayb, stride_decayh, stride_decayt),
        Strided(eta_ptr, stride_etab, stride_etah, stride_etat),
        pending_h_ptr, pending_delta_ptr, pending_decay_ptr, pending_eta_ptr, checkpoints_ptr,
        n_slots, 2 * size if HAS_MOMENTUM else size, group, start, pending, total,
    )  # fmt: skip
    d = Cotangents(Strided(do_ptr, stride_dob, stride_doh, stride_dot), d_end_h_ptr,
                   d_end_delta_ptr, d_end_decay_ptr, d_end_eta_ptr)  # fmt: skip
    to = Gradients(
        Strided(dq_ptr, stride_dqb, stride_dqh, stride_dqt),
        Strided(dk_ptr, stride_dkb, stride_dkh, stride_dkt),
        Strided(dv_ptr, stride_dvb, stride_dvh, stride_dvt),
        d_lr_ptr, d_decay_ptr, d_eta_ptr,
        d_pending_h_ptr, d_pending_delta_ptr, d_pending_decay_ptr, d_pending_eta_ptr,
    )  # fmt: skip
    inputs_ptr, outputs_ptr, pairs_ptr, lanes_ptr = scratch_of(
        scratch_ptr, program_floats, chunk, all_inputs, all_outputs, BACKWARD_SECTIONS
    )
    walk_backward(
        Memory(inputs_ptr, outputs_ptr, pairs_ptr, lanes_ptr, chunk, depth,
               width_0, width_1, width_2, width_3, width_4, all_inputs, all_outputs, huber_delta,
               max_norm, READ_CHUNK, IS_SILU, RESIDUAL, IS_HUBER, CLAMP, SKIP, HAS_MOMENTUM,
               BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_C, PRECISION),
        x, start_w_ptr + row * stride_startr + h * size, start_s_ptr, inputs_ptr + states_at, d_w,
        d_s, d, to, HAS_END,
    )  # fmt: skip
