"""Few queries on many keys: programs share the keys of a row, and a second kernel adds them up.

A part has a fixed number of keys, counted from the first that its queries see, and parts are added
in their order: neither the batch nor room after the keys changes a bit. The query heads of a key
head stand in one tile, so that keys are read once for all of them.
"""

import triton
import triton.language as tl

from memattn_kernels import configs
from memattn_kernels._common import (
    MAX_LENGTH,
    NO_END,
    block_length,
    cdiv,
    finish_softmax,
    load_rows,
    power,
    scatter_rows,
    score_scale,
    sequence_of,
)
from memattn_kernels._launch import launch
from memattn_kernels._tiles import attend
from memattn_kernels.segmented_attention.intervals import memory_of_query, tokens_of_query
from memattn_kernels.segmented_attention.sinks import attend_sinks

SUM_CONFIG = {"BLOCK_M": 16, "num_warps": 4, "num_stages": 1}
RUNTIME_SIZES = ("T", "S", "P", "M", "n_memory", "L", "W", "n_sinks", "query_offset", "n_parts")
RUNTIME_SIZES += ("part_length",)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def segmented_attention_decode_parts_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, mk_ptr, mv_ptr,  # inputs
    documents_ptr, seq_start_ptr, seq_end_ptr,  # bounds of sequences, or None
    acc_ptr, l_ptr, m_ptr,  # float32 outputs, [n_parts, B * H * T, DV] and [n_parts, B * H * T]
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_pkh, stride_pkt, stride_pvh, stride_pvt,
    stride_mkb, stride_mkh, stride_mkt, stride_mvb, stride_mvh, stride_mvt,
    B, H, G, T, S, P, M, n_memory, L, W, n_sinks, query_offset, n_parts, part_length,  # sizes
    scale, softcap,
    IS_CAUSAL: tl.constexpr, MEMORY_IS_CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_NP: tl.constexpr,
    BLOCK_NM: tl.constexpr, BLOCK_NS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(G * T, BLOCK_M) * n_parts * B * Hkv,). Rows are the queries of a key head.

    Persistent, memory and sink keys belong to the first part.
    """
    n_tiles = tl.cdiv(G * T, BLOCK_M)
    pid = tl.program_id(0)
    r = pid % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    part = pid // n_tiles % n_parts
    H_kv = H // G
    b = (pid // n_tiles // n_parts // H_kv).to(tl.int64)
    h_kv = (pid // n_tiles // n_parts % H_kv).to(tl.int64)
    is_row = r < G * T
    h = h_kv * G + tl.where(is_row, r // T, 0)
    t = tl.where(is_row, r % T, 0)

    i = query_offset + t
    start, end, first_segment = sequence_of(i, b, documents_ptr, seq_start_ptr, seq_end_ptr, S)
    valid = is_row & (i >= start) & (i < end)
    q = load_rows(q_ptr, b * stride_qb + h * stride_qh + t * stride_qt, D, BLOCK_D)
    cap_scale = softcap
    if softcap is not None:
        cap_scale = scale / softcap
    scale = score_scale(scale, softcap, q.dtype)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    if pk_ptr is not None:
        lo = tl.zeros([BLOCK_M], dtype=tl.int32)
        acc, l_i, m_i = attend(
            acc, l_i, m_i, q, pk_ptr + h_kv * stride_pkh, pv_ptr + h_kv * stride_pvh,
            stride_pkt, stride_pvt, lo, lo + tl.where(part == 0, P, 0), valid, scale,
            D, DV, BLOCK_NP, BLOCK_D, BLOCK_DV, False, False, cap_scale,
        )  # fmt: skip
    if mk_ptr is not None:
        lo, hi = memory_of_query(i, start, first_segment, n_memory, L, M, MEMORY_IS_CAUSAL)
        acc, l_i, m_i = attend(
            acc, l_i, m_i, q, mk_ptr + b * stride_mkb + h_kv * stride_mkh,
            mv_ptr + b * stride_mvb + h_kv * stride_mvh, stride_mkt, stride_mvt,
            lo, tl.where(part == 0, hi, lo), valid, scale,
            D, DV, BLOCK_NM, BLOCK_D, BLOCK_DV, False, False, cap_scale,
        )  # fmt: skip
    if n_sinks is not None:
        acc, l_i, m_i = attend_sinks(
            acc, l_i, m_i, q, k_ptr + b * stride_kb + h_kv * stride_kh,
            v_ptr + b * stride_vb + h_kv * stride_vh, stride_kt, stride_vt, i, start, end, S, L, W,
            n_sinks, part == 0, valid, scale, IS_CAUSAL, documents_ptr is not None,
            D, DV, BLOCK_NS, BLOCK_D, BLOCK_DV, cap_scale,
        )  # fmt: skip
    lo, hi = tokens_of_query(i, start, end, S, L, W, n_sinks, IS_CAUSAL)
    first = tl.min(tl.where(valid & (lo < hi), lo, NO_END)).to(tl.int64)
    first += part.to(tl.int64) * part_length
    lo = tl.maximum(lo, tl.minimum(first, NO_END).to(tl.int32))
    hi = tl.minimum(hi, tl.minimum(first + part_length, NO_END).to(tl.int32))
    acc, l_i, m_i = attend(
        acc, l_i, m_i, q, k_ptr + b * stride_kb + h_kv * stride_kh,
        v_ptr + b * stride_vb + h_kv * stride_vh, stride_kt, stride_vt,
        lo, hi, valid, scale, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, False, True, cap_scale,
    )  # fmt: skip

    l_i = tl.where(valid, l_i, 0.0)
    row = (part.to(tl.int64) * B * H + b * H + h) * T + t
    scatter_rows(acc_ptr, row * DV, is_row, acc, DV, BLOCK_DV)
    tl.store(l_ptr + row, l_i, mask=is_row)
    tl.store(m_ptr + row, m_i, mask=is_row)


@triton.jit(do_not_specialize=("T", "n_parts", "n_rows"))
def segmented_attention_decode_sum_kernel(
    acc_ptr, l_ptr, m_ptr,  # float32 inputs, [n_parts, n_rows, DV] and [n_parts, n_rows]
    o_ptr, lse_ptr, residual_ptr,  # outputs
    stride_ob, stride_oh, stride_ot, H, T, n_parts, n_rows,  # sizes
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * T,). One program adds up the parts of one row, BLOCK_M at a time."""
    row = tl.program_id(0).to(tl.int64)
    offs_w = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], dtype=tl.float32)
    # of one row
    l_i = tl.zeros([1], dtype=tl.float32)
    m_i = tl.full([1], -float("inf"), dtype=tl.float32)
    dtype: tl.constexpr = o_ptr.dtype.element_ty
    for p in range(0, n_parts, BLOCK_M):
        parts = p + tl.arange(0, BLOCK_M)
        places = parts.to(tl.int64) * n_rows + row
        # a part without a key has not been filled with numbers that count
        l_p = tl.load(l_ptr + places, mask=parts < n_parts, other=0.0)
        m_p = tl.load(m_ptr + places, mask=(parts < n_parts), other=-float("inf"))
        m_p = tl.where(l_p > 0.0, m_p, -float("inf"))
        mask = (l_p > 0.0)[:, None] & (offs_w < DV)
        tile = tl.load(acc_ptr + places[:, None] * DV + offs_w, mask=mask, other=0.0)
        m_new = tl.maximum(m_i, tl.max(m_p, 0))
        m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
        alpha = power(m_i - m_safe, dtype)
        weight = power(m_p - m_safe, dtype)
        l_i = l_i * alpha + tl.sum(l_p * weight, 0)
        acc = acc * alpha + tl.sum(tile * weight[:, None], 0)
        m_i = m_new

    out, lse, residual = finish_softmax(acc[None, :], l_i, m_i, l_i == l_i, dtype)
    b, h, t = row // T // H, row // T % H, row % T
    o_ptr += b * stride_ob + h * stride_oh + t * stride_ot
    tl.store(o_ptr + offs_w[None, :], out.to(dtype), mask=(offs_w < DV)[None, :])
    one = tl.arange(0, 1)
    tl.store(lse_ptr + row + one, lse)
    if residual_ptr is not None:
        tl.store(residual_ptr + row + one, residual)


def n_parts_of(inputs: dict, part_length: int) -> int:
    """How many parts the keys of any tile of queries may have."""
    reach = [inputs[name] for name in ("L", "W") if inputs[name] is not None]
    T, S = inputs["T"], inputs["S"]
    # sinks may adjoin what is near
    reach_in_all = 2 * max(reach, default=0) + (inputs["n_sinks"] or 0)
    longest = min(S, T + reach_in_all) if reach and max(reach) < MAX_LENGTH else S
    return max(cdiv(longest, part_length), 1)


def launch_decode_parts(inputs: dict, config: dict) -> None:
    """Launch both kernels with the inputs of the forward and a configuration with ``part``."""
    config = dict(config)
    part_length = config.pop("part")
    q = inputs["q_ptr"]
    B, H, T, _ = q.shape
    n_parts, n_rows = n_parts_of(inputs, part_length), B * H * T
    numbers = [q.new_empty(n_parts, n_rows, dtype=inputs["lse_ptr"].dtype) for _ in range(2)]
    sums = dict(
        acc_ptr=q.new_empty(n_parts, n_rows, inputs["DV"], dtype=inputs["lse_ptr"].dtype),
        l_ptr=numbers[0],
        m_ptr=numbers[1],
        B=B,
        n_parts=n_parts,
        n_rows=n_rows,
        part_length=part_length,
    )
    lengths = dict(BLOCK_NP=inputs["P"], BLOCK_NM=inputs["M"], BLOCK_NS=inputs["n_sinks"] or 0)
    tiles = {name: block_length(config["BLOCK_N"], length) for name, length in lengths.items()}
    n_tiles = cdiv(inputs["G"] * T, config["BLOCK_M"])
    n_programs = n_tiles * n_parts * B * (H // inputs["G"])
    launch(segmented_attention_decode_parts_kernel, n_programs, config | tiles, inputs, sums)
    launch(segmented_attention_decode_sum_kernel, n_rows, SUM_CONFIG, inputs, sums)


# what ``memattn bench --retune`` times for half precision; the gate compiles all of it
CANDIDATES = tuple(
    dict(zip((*configs.OPTIONS, *configs.DECODE_OPTIONS), values, strict=True))
    for values in ((16, 64, 4, 2, 512), (16, 64, 4, 2, 1024), (16, 32, 4, 2, 1024))
)
