"""Forward of the neural memory: a program walks the chunks of a head of a row.

Weights and momentum are in global memory, read once by each product of a chunk and written at its
end, where the state that is returned lies. The order of chunks leaves only heads and rows to
compute side by side.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from memattn_kernels.neural_memory.keys import (
    checkpoint_at,
    chunk_of,
    coefficients,
    copy_rows,
    end_of_chunk,
    key_pass,
    load_chunk,
    load_pending,
    row_of,
)
from memattn_kernels.neural_memory.tiles import (
    BETA,
    DECAY,
    DELTA,
    ETA,
    N_LANES,
    PAIRS,
    READ_FIRST,
    SCALED,
    SIGMA,
    C,
    G,
    H,
    Memory,
    RowArguments,
    Strided,
    activate,
    at_head,
    copy,
    forth,
    inputs_at,
    lanes_at,
    load_block,
    outputs_at,
    packed_size,
    pairs_at,
    place_of,
    product,
    scratch_of,
    store_block,
    store_tokens,
    weights_before,
    width,
)

COPY_BLOCK: tl.constexpr = tl.constexpr(1024)
# sections of inputs, outputs and pairs; one of outputs is phi', delta and scaled delta in turn
FORWARD_SECTIONS: tl.constexpr = tl.constexpr((2, 1, 3))


def scratch_floats(chunk: int, sizes: list[int], sections: tl.constexpr) -> int:
    """Floats of scratch of a program with these sections, in whole lines of the cache."""
    n_inputs, n_outputs, n_pairs = sections.value
    row = n_inputs * sum(sizes[:-1]) + n_outputs * sum(sizes[1:]) + n_pairs * chunk + N_LANES
    return -(-chunk * row // 32) * 32


class Results(NamedTuple):
    """What a program writes, arguments of the kernel; those of the state may be None."""

    out: Strided
    surprise: Any
    end_h: Any
    end_delta: Any
    end_decay: Any
    end_eta: Any


@triton.jit
def read_pass(m, t, x, w_ptr, s_ptr, out, BACKWARD: tl.constexpr):
    """What queries read; the backward has no use for the last layer's outputs."""
    PH, PD = m.all_inputs, m.all_outputs
    if not BACKWARD:
        at, b, head = place_of(x)
        out_ptr = at_head(out.out, b, head)
    for l in tl.range(m.depth - 1 if BACKWARD else m.depth, disable_licm=True):
        n_in, n_out = width(m, l), width(m, l + 1)
        g, h = inputs_at(m, G, l), inputs_at(m, H, l)
        scaled = outputs_at(m, SCALED if BACKWARD else DELTA, l)
        if not m.READ_CHUNK:
            for row in tl.range(0, t.n, m.BLOCK_M, disable_licm=True):
                for col in tl.range(0, row + m.BLOCK_M, m.BLOCK_M, disable_licm=True):
                    pairs = tl.zeros([m.BLOCK_M, m.BLOCK_M], dtype=tl.float32)
                    pairs = product(
                        m, pairs, g, PH, h, PH, row, col, t.n, t.n, 0, n_in, None, False, True
                    )
                    c = load_block(
                        pairs_at(m, C), m.chunk, row, col, t.n, t.n, m.BLOCK_M, m.BLOCK_M
                    )
                    store_block(pairs_at(m, PAIRS), m.chunk, row, col, t.n, t.n, -(pairs * c))
            tl.debug_barrier()
        for row in tl.range(0, t.n, m.BLOCK_M, disable_licm=True):
            slots = row + tl.arange(0, m.BLOCK_M)
            beta = tl.load(lanes_at(m, BETA) + slots, mask=slots < t.n, other=0.0)
            sigma = tl.load(lanes_at(m, SIGMA) + slots, mask=slots < t.n, other=0.0)
            for col in tl.range(0, n_out, m.BLOCK_N, disable_licm=True):
                z = forth(m, t, g, w_ptr, l, row, col)
                if not m.READ_CHUNK:
                    z *= beta[:, None]
                    if m.HAS_MOMENTUM:
                        z += sigma[:, None] * forth(m, t, g, s_ptr, l, row, col)
                    last = tl.minimum(row + m.BLOCK_M, t.n)
                    z = product(
                        m, z, pairs_at(m, PAIRS), m.chunk, scaled, PD, row, col, t.n, n_out, 0,
                        last, None, False, False,
                    )  # fmt: skip
                if l + 1 < m.depth:
                    z, first, second = activate(z, m.IS_SILU)
                    store_block(inputs_at(m, G, l + 1), PH, row, col, t.n, n_out, z)
                    if BACKWARD:
                        store_block(outputs_at(m, READ_FIRST, l), PD, row, col, t.n, n_out, first)
                else:
                    if m.RESIDUAL:
                        z += load_block(
                            inputs_at(m, G, 0), PH, row, col, t.n, n_out, m.BLOCK_M, m.BLOCK_N
                        )
                    if not BACKWARD:
                        store_tokens(out_ptr, out.out.t, t, slots, n_out, col, z)
        tl.debug_barrier()


@triton.jit
def store_pending(m, t, x, out):
    """Everything of the open chunk that the state keeps."""
    first = place_of(x)[0] * (m.chunk - 1)
    copy_rows(m, inputs_at(m, H, 0), out.end_h + first * m.all_inputs, t.n, m.all_inputs)
    delta_ptr = out.end_delta + first * m.all_outputs
    copy_rows(m, outputs_at(m, DELTA, 0), delta_ptr, t.n, m.all_outputs)
    copy(lanes_at(m, DECAY), out.end_decay + first, t.n, COPY_BLOCK)
    copy(lanes_at(m, ETA), out.end_eta + first, t.n, COPY_BLOCK)


@triton.jit
def walk_forward(m, x, w, s, out):
    """Walk the chunks of a head; returns how many tokens are skipped."""
    size = weights_before(m, m.depth)
    n_chunks = tl.cdiv(x.total, m.chunk)
    skipped = 0
    for i in tl.range(n_chunks, disable_licm=True):
        t = chunk_of(m, x, i)
        if (i > 0) & (i % x.group == 0):
            copy(w, checkpoint_at(m, x, i), size, COPY_BLOCK)
            if m.HAS_MOMENTUM:
                copy(s, checkpoint_at(m, x, i) + size, size, COPY_BLOCK)
        load_chunk(m, t, x)
        skipped += key_pass(m, t, x, w, out.surprise, False)
        load_pending(m, t, x, False)
        coefficients(m, t)
        read_pass(m, t, x, w, s, out, False)
        if t.n == m.chunk:
            if (i + 1 < n_chunks) | (out.end_h is not None):
                end_of_chunk(m, t, w, s, w, s, False)
        else:
            if out.end_h is not None:
                store_pending(m, t, x, out)
        tl.debug_barrier()
    return skipped


@triton.jit(do_not_specialize=("first", "n_heads", "T", "group", "n_slots"))
def neural_memory_fwd_kernel(
    q_ptr, k_ptr, v_ptr, lr_ptr, eta_ptr, decay_ptr,  # inputs; the last two may be None
    place_ptr,  # int32 [all heads, 2], row and head
    start_w_ptr, start_s_ptr, pending_h_ptr, pending_delta_ptr,  # state, or None but the first
    pending_decay_ptr, pending_eta_ptr, count_ptr, row_start_ptr, row_end_ptr,
    o_ptr, surprise_ptr, w_ptr, s_ptr, end_h_ptr, end_delta_ptr,  # results
    end_decay_ptr, end_eta_ptr, skipped_ptr, checkpoints_ptr, scratch_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot,
    stride_lrb, stride_lrh, stride_lrt, stride_etab, stride_etah, stride_etat,
    stride_decayb, stride_decayh, stride_decayt, stride_startr,
    first, n_heads, T, group, n_slots, program_floats,  # sizes
    huber_delta, max_norm,
    depth: tl.constexpr, width_0: tl.constexpr, width_1: tl.constexpr, width_2: tl.constexpr,
    width_3: tl.constexpr, width_4: tl.constexpr, chunk: tl.constexpr,
    all_inputs: tl.constexpr, all_outputs: tl.constexpr,
    IS_BATCH: tl.constexpr, READ_CHUNK: tl.constexpr, IS_SILU: tl.constexpr, RESIDUAL: tl.constexpr,
    IS_HUBER: tl.constexpr, CLAMP: tl.constexpr, SKIP: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (programs,). One program owns head ``first + program`` of all heads of all rows.

    ``w_ptr`` and ``s_ptr`` ``[rows, heads, size]`` have the newest weights and momentum.
    """
    item = (first + tl.program_id(0)).to(tl.int64)
    row, h = item // n_heads, item % n_heads
    start, pending, total = row_of(row, T, count_ptr, row_start_ptr, row_end_ptr)
    size = packed_size(depth, width_0, width_1, width_2, width_3, width_4)
    w, s = w_ptr + item * size, s_ptr
    copy(start_w_ptr + row * stride_startr + h * size, w, size, COPY_BLOCK)
    if HAS_MOMENTUM:
        s += item * size
        if start_s_ptr is not None:
            start_s_ptr += item * size
        copy(start_s_ptr, s, size, COPY_BLOCK)
    tl.debug_barrier()
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
    out = Results(Strided(o_ptr, stride_ob, stride_oh, stride_ot), surprise_ptr, end_h_ptr,
                  end_delta_ptr, end_decay_ptr, end_eta_ptr)  # fmt: skip
    inputs_ptr, outputs_ptr, pairs_ptr, lanes_ptr = scratch_of(
        scratch_ptr, program_floats, chunk, all_inputs, all_outputs, FORWARD_SECTIONS
    )
    skipped = walk_forward(
        Memory(inputs_ptr, outputs_ptr, pairs_ptr, lanes_ptr, chunk, depth,
               width_0, width_1, width_2, width_3, width_4, all_inputs, all_outputs, huber_delta,
               max_norm, READ_CHUNK, IS_SILU, RESIDUAL, IS_HUBER, CLAMP, SKIP, HAS_MOMENTUM,
               BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_C, PRECISION),
        x, w, s, out,
    )  # fmt: skip
    tl.store(skipped_ptr + item, skipped)
