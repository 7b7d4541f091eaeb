"""Forward of chapter attention: every query has one owner, and adds its chapters in rising order.

    joint:        out = sum_sm w_s exp(S_sm - lse) v_sm,    lse = log sum_sm w_s exp S_sm
    independent:  out = sum_s w_s sum_m exp(S_sm - l_s) v_sm,    lse = log sum_sm exp S_sm

There are two forms of one kernel (``is_by_chapter`` chooses by sizes that are the same for every
batch). *By row*, a program owns rows of one routing row and walks its chapters: the rate of dense
attention where many queries and heads share their chapters. *By chapter*, a program owns rows that
have the same chapter in the same slot, and adds this chapter to what these rows have so far, a
running softmax in float32; there is a launch for each slot, so each row is updated once in a
launch. See docs/kernels/log.md for the arithmetic.
"""

import triton
import triton.language as tl
from torch import Tensor

from memattn_kernels import configs
from memattn_kernels._common import (
    block_length,
    block_width,
    cdiv,
    exponent_factor,
    finish_softmax,
    power,
    rows,
    scatter_rows,
)
from memattn_kernels._launch import launch, lookup, residual_ptr
from memattn_kernels._products import dot
from memattn_kernels.chapter_attention.index import (
    ChapterIndex,
    fill_index,
    rows_of_entries,
    sort_slots,
    tiles_of_slots,
)
from memattn_kernels.chapter_attention.tiles import (
    chapter_pointers,
    chapter_scores,
    gather_rows,
    load_bank_tile,
    rows_of_program,
)
from memattn_kernels.signatures import ChapterAttentionArgs

# sizes that change from call to call: compile once for all their values
RUNTIME_SIZES = ("T", "N", "K", "C", "row_width", "n_tiles", "slot", "n_list")
# what a kernel by row has not
INDEX = ("entry_ptr", "sequence_ptr", "start_ptr", "length_ptr", "offset_ptr", "chapter_ptr",
         "first_ptr")  # fmt: skip


@triton.jit
def _add_softmax(m_i, l_i, m, l, dtype: tl.constexpr):
    """Largest exponent and sum of two sets of scores."""
    m_new = tl.maximum(m_i, m)
    return m_new, l_i * power(m_i - m_new, dtype) + l * power(m - m_new, dtype)


@triton.jit
def _joint_step(acc, l_i, m_i, scores, v, weight, scale, HAS_WEIGHTS: tl.constexpr):
    """Add keys with their weight to the running softmax."""
    top = tl.max(scores, 1) * scale
    if HAS_WEIGHTS:
        bias = tl.log(weight) * exponent_factor(v.dtype)
        m_new = tl.maximum(m_i, top + bias)
        # not m_new - bias: its rounding may leave an exponent above 0
        shift = tl.maximum(m_i - bias, top)
    else:
        m_new = tl.maximum(m_i, top)
        shift = m_new
    alpha = power(m_i - m_new, v.dtype)
    p = power(scores * scale - shift[:, None], v.dtype)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, l_i, m_new


@triton.jit
def _independent_chapter(acc, l_i, m_i, q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, head, stride_k,
                         stride_v, weight, scale, M: tl.constexpr, D: tl.constexpr,
                         DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                         BLOCK_DV: tl.constexpr):  # fmt: skip
    """Add a chapter of several tiles, whose softmax must be known first."""
    m = tl.full([q.shape[0]], -float("inf"), dtype=tl.float32)
    l = tl.zeros([q.shape[0]], dtype=tl.float32)
    for n in range(0, M, BLOCK_N):
        k = load_bank_tile(k_ptr, k_scale_ptr, head, n, stride_k, q.dtype, M, D, BLOCK_N, BLOCK_D)
        scores = chapter_scores(q, k, n, M, BLOCK_N)
        top = tl.max(scores, 1) * scale
        part = tl.sum(power(scores * scale - top[:, None], q.dtype), 1)
        m, l = _add_softmax(m, l, top, part, q.dtype)
    for n in range(0, M, BLOCK_N):
        k = load_bank_tile(k_ptr, k_scale_ptr, head, n, stride_k, q.dtype, M, D, BLOCK_N, BLOCK_D)
        v = load_bank_tile(v_ptr, v_scale_ptr, head, n, stride_v, q.dtype, M, DV, BLOCK_N, BLOCK_DV)
        p = power(chapter_scores(q, k, n, M, BLOCK_N) * scale - m[:, None], q.dtype)
        p *= (weight / l)[:, None]
        acc = dot(p.to(v.dtype), v, acc)
    m_i, l_i = _add_softmax(m_i, l_i, m, l, q.dtype)
    return acc, l_i, m_i


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def chapter_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr,  # inputs; scales of a quantised bank, or None
    slots_ptr, weight_ptr, n_slots_ptr, row_start_ptr, row_end_ptr,  # by routing row
    entry_ptr, sequence_ptr, start_ptr, length_ptr,  # index by chapter, or None
    offset_ptr, chapter_ptr, first_ptr,
    o_ptr, o_rest_ptr, lse_ptr, residual_ptr,  # outputs
    acc_ptr, m_ptr, l_ptr,  # what rows have so far, by chapter only
    stride_qb, stride_qh, stride_qt, stride_kc, stride_kh, stride_km,
    stride_vc, stride_vh, stride_vm, stride_ob, stride_oh, stride_ot,
    H, T, N, K, C, row_width, n_tiles, slot, scale,  # sizes
    G: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, IS_JOINT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: (n_tiles * Hkv,), heads first. One program owns BLOCK_M rows of a key head.

    By row there are n_tiles / (B * N) tiles for each routing row; by chapter n_tiles for ``slot``.
    """
    BY_CHAPTER: tl.constexpr = entry_ptr is not None
    HAS_WEIGHTS: tl.constexpr = weight_ptr is not None
    n_heads = H // G
    h_kv = tl.program_id(0) % n_heads
    tile = tl.program_id(0) // n_heads
    n_slots, chapter, entry, b, start, i, valid = rows_of_program(
        tile, slot, N, K, C, row_width, n_tiles, n_slots_ptr, row_start_ptr, row_end_ptr,
        entry_ptr, sequence_ptr, start_ptr, length_ptr, offset_ptr, chapter_ptr, first_ptr,
        G, WIDTH, BLOCK_M,
    )  # fmt: skip
    if n_slots == 0:
        return
    h, t = h_kv * G + i % G, start + i // G
    number = (b * H + h) * T + t
    b, h, t = b.to(tl.int64), h.to(tl.int64), t.to(tl.int64)
    q = gather_rows(q_ptr, b * stride_qb + h * stride_qh + t * stride_qt, valid, D, BLOCK_D)
    scale *= exponent_factor(q.dtype)
    weight = tl.full([BLOCK_M], 1.0, dtype=tl.float32)

    # what the rows have from the chapters of earlier slots
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    if BY_CHAPTER:
        state = (b * T + t) * H + h
        has_state = valid & (slot > 0)
        acc += gather_rows(acc_ptr, state * DV, has_state, DV, BLOCK_DV)
        l_i += tl.load(l_ptr + state, mask=has_state, other=0.0)
        m_i = tl.load(m_ptr + state, mask=has_state, other=-float("inf"))
        if HAS_WEIGHTS:
            weight = tl.load(weight_ptr + entry, mask=valid, other=1.0)

    IN_TILE: tl.constexpr = M <= BLOCK_N
    n_key_tiles: tl.constexpr = (M + BLOCK_N - 1) // BLOCK_N
    N_INNER: tl.constexpr = n_key_tiles if IS_JOINT else 1
    for index in range(n_slots * N_INNER):
        at, w = chapter, weight
        if not BY_CHAPTER:
            at = tl.load(slots_ptr + entry + index // N_INNER)
            if HAS_WEIGHTS:
                w = weight * tl.load(weight_ptr + entry + index // N_INNER)
        n = index % N_INNER * BLOCK_N
        head_k_ptr, head_v_ptr, head = chapter_pointers(
            at, h_kv, n_heads, k_ptr, v_ptr, stride_kc, stride_kh, stride_vc, stride_vh
        )
        if IS_JOINT or IN_TILE:
            k = load_bank_tile(
                head_k_ptr, k_scale_ptr, head, n, stride_km, q.dtype, M, D, BLOCK_N, BLOCK_D
            )
            scores = chapter_scores(q, k, n, M, BLOCK_N)
            v = load_bank_tile(
                head_v_ptr, v_scale_ptr, head, n, stride_vm, q.dtype, M, DV, BLOCK_N, BLOCK_DV
            )
            if IS_JOINT:
                acc, l_i, m_i = _joint_step(acc, l_i, m_i, scores, v, w, scale, HAS_WEIGHTS)
            else:
                m = tl.max(scores, 1) * scale
                p = power(scores * scale - m[:, None], q.dtype)
                l = tl.sum(p, 1)
                p *= (w / l)[:, None]
                acc = dot(p.to(v.dtype), v, acc)
                m_i, l_i = _add_softmax(m_i, l_i, m, l, q.dtype)
        else:
            acc, l_i, m_i = _independent_chapter(
                acc, l_i, m_i, q, head_k_ptr, head_v_ptr, k_scale_ptr, v_scale_ptr, head, stride_km,
                stride_vm, w, scale, M, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip

    done = valid
    if BY_CHAPTER:
        is_last = tl.load(n_slots_ptr + entry // K, mask=valid, other=0) == slot + 1
        goes_on = valid & (is_last == 0)
        scatter_rows(acc_ptr, state * DV, goes_on, acc, DV, BLOCK_DV)
        tl.store(l_ptr + state, l_i, mask=goes_on)
        tl.store(m_ptr + state, m_i, mask=goes_on)
        done &= is_last
    out, lse, residual = finish_softmax(acc, l_i, m_i, valid, q.dtype)
    if not IS_JOINT:
        out = acc
    offs_o = b * stride_ob + h * stride_oh + t * stride_ot
    scatter_rows(o_ptr, offs_o, done, out, DV, BLOCK_DV)
    if o_rest_ptr is not None:
        out -= out.to(o_ptr.dtype.element_ty).to(tl.float32)
        scatter_rows(o_rest_ptr, offs_o, done, out, DV, BLOCK_DV)
    tl.store(lse_ptr + number, lse, mask=done)
    if residual_ptr is not None:
        tl.store(residual_ptr + number, residual, mask=done)


def is_by_chapter(args: ChapterAttentionArgs) -> bool:
    """Whether programs own rows of a chapter, by the bytes that a routing row moves for each slot.

    By row it reads the chapter from the second-level cache, which gives about half as much again as
    memory; by chapter each of its rows reads a query, and reads and writes a running softmax in
    float32. The batch has no say, so that it changes no bit; few queries, as in decoding, fill no
    tile of a chapter.
    """
    _, H, T, D = args.query.shape
    C, Hkv, M, _ = args.key.shape
    if T <= configs.DECODE_LENGTH:
        return False
    size, width = args.query.element_size(), args.row_len * (H // Hkv)
    of_chapter = M * (D + args.value_dim) * size
    of_row = D * size + 2 * (args.value_dim + 2) * 4
    return 3 * width * of_row < 2 * of_chapter


def kernel_inputs(args: ChapterAttentionArgs, slots: Tensor, weights: Tensor | None) -> dict:
    """Arguments that the kernels share, by name; ``weights`` in the order of ``slots``."""
    query, key = args.query, args.key
    (_, H, T, D), (C, Hkv, M, _), Dv = query.shape, key.shape, args.value_dim
    scales = args.key_scale, args.value_scale
    key_scale, value_scale = (None if s is None else s.contiguous() for s in scales)
    return dict(
        **rows("q", query, "bht"),
        **rows("k", key, "chm"),
        **rows("v", args.value, "chm"),
        k_scale_ptr=key_scale,
        v_scale_ptr=value_scale,
        slots_ptr=slots,
        weight_ptr=weights,
        n_slots_ptr=(slots < C).sum(-1, dtype=slots.dtype).flatten(),
        row_start_ptr=args.row_start,
        row_end_ptr=args.row_end,
        H=H,
        G=H // max(Hkv, 1),
        T=T,
        N=slots.shape[1],
        K=slots.shape[2],
        C=C,
        M=M,
        row_width=args.row_len * (H // max(Hkv, 1)),
        scale=args.scale,
        IS_JOINT=args.is_joint,
        D=D,
        DV=Dv,
        BLOCK_D=block_width(D),
        BLOCK_DV=block_width(Dv),
    )


def index_inputs(args: ChapterAttentionArgs, index: ChapterIndex) -> dict:
    """The index as arguments of kernels, by name."""
    sequence, start, length = rows_of_entries(args, index)
    return dict(
        entry_ptr=index.entry,
        offset_ptr=index.offset,
        sequence_ptr=sequence,
        start_ptr=start,
        length_ptr=length,
    )


def rest_ptr(rest: Tensor) -> dict:
    """What half precision rounds off ``out``; it has the strides of ``out``."""
    return {"o_rest_ptr": rest if rest.numel() else None}


def row_config(
    name: str, args: ChapterAttentionArgs, inputs: dict, by_chapter: bool
) -> dict[str, int]:
    """Tile lengths and launch options of a query-stationary kernel.

    In the tables that by chapter has ``_by_chapter`` after its name, that by row with a softmax
    for each chapter ``_independent``, and that of a quantised bank ``_quantised``; a forward with
    few rows in a routing row is ``decode``.
    """
    width = inputs["row_width"]
    if by_chapter:
        name += "_by_chapter"
    elif width <= configs.DECODE_LENGTH and name.endswith("fwd"):
        name = name.replace("fwd", "decode")
    elif not args.is_joint:
        name += "_independent"
    elif args.key_scale is not None:
        name += "_quantised"
    config = lookup(name, args.query, inputs)
    config = config | {"BLOCK_N": block_length(config["BLOCK_N"], inputs["M"])}
    if not by_chapter:
        config |= {"BLOCK_M": block_length(config["BLOCK_M"], max(width, 1))}
    return config


def launch_rows(
    kernel: triton.JITFunction,
    config: dict[str, int],
    args: ChapterAttentionArgs,
    index: ChapterIndex | None,
    *inputs: dict,
) -> None:
    """Launch a query-stationary kernel: by row without an index, else slot after slot."""
    given = {key: value for part in inputs for key, value in part.items()}
    C, K, R, width = given["C"], given["K"], args.row_start.numel(), given["row_width"]
    Hkv, block = args.key.shape[1], config["BLOCK_M"]
    if index is None:
        given |= dict.fromkeys((*INDEX, "WIDTH"))
        n_tiles = R * cdiv(width, block)
        launch(kernel, n_tiles * Hkv, config, given, {"n_tiles": n_tiles, "slot": 0})
        return
    n_tiles = cdiv(R * width, block) + min(C, R)
    chapter, first = tiles_of_slots(index, C, K, width, block, n_tiles)
    given |= dict(chapter_ptr=chapter, first_ptr=first, n_tiles=n_tiles, WIDTH=width)
    if args.row_len == 1:  # the row of a filled slot has its query
        given["length_ptr"] = None
    for slot in range(K):
        launch(kernel, n_tiles * Hkv, config, given, {"slot": slot})


def launch_forward(args: ChapterAttentionArgs, results: dict[str, Tensor]) -> None:
    """Fill the results, the sorted slots and, by chapter, the index among them."""
    (B, H, T, _), C = args.query.shape, args.key.shape[0]
    results["out"].zero_()
    results["lse"].fill_(-float("inf"))
    results["residual"].zero_()
    results["rest"].zero_()
    slots, order = sort_slots(args)
    results["slots"].copy_(slots)
    weights = None
    if args.weights is not None and order is not None:
        results["order"].copy_(order)
        weights = args.weights.gather(-1, order)
    if not results["lse"].numel() or not slots.numel():
        return
    index = None
    if T > configs.DECODE_LENGTH:
        index = ChapterIndex(results["entry"], results["offset"])
        fill_index(index, slots, C)
    inputs = kernel_inputs(args, slots, weights)
    outputs = rows("o", results["out"], "bht") | residual_ptr(args.query, results["residual"])
    outputs |= rest_ptr(results["rest"])
    outputs |= dict(lse_ptr=results["lse"], acc_ptr=None, m_ptr=None, l_ptr=None)
    if not is_by_chapter(args):
        index = None
    if index is not None:
        inputs |= index_inputs(args, index)
        new = lambda *shape: results["lse"].new_empty(shape)
        outputs |= dict(
            acc_ptr=new(B * T * H, args.value_dim), m_ptr=new(B * T * H), l_ptr=new(B * T * H)
        )
    config = row_config("chapter_attention_fwd", args, inputs, index is not None)
    launch_rows(chapter_attention_fwd_kernel, config, args, index, inputs, outputs)


def index_of(args: ChapterAttentionArgs, saved: dict[str, Tensor]) -> ChapterIndex:
    """The index of the forward, which leaves it to the backward where queries are few."""
    index = ChapterIndex(saved["entry"], saved["offset"])
    if args.query.shape[2] <= configs.DECODE_LENGTH:
        fill_index(index, saved["slots"], args.key.shape[0])
    return index
