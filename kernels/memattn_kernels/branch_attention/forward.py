"""Forward of attention in branches: one program per tile of rows of a unit.

    lse = log sum_j exp(scale q k_j),  out = gate * sum_j exp(scale q k_j - lse) v_j

over the keys of the row's branch that its token sees. A unit is a branch of one sequence or
document (see ``index``).
"""

import triton
import triton.language as tl

from memattn_kernels import configs
from memattn_kernels._common import (
    block_width,
    cdiv,
    exponent_factor,
    finish_softmax,
    load_rows,
    rows,
    scatter_rows,
)
from memattn_kernels._launch import launch, lookup, residual_ptr, tiles_of_groups
from memattn_kernels._operator import Named
from memattn_kernels.branch_attention.index import (
    BranchIndex,
    fill_index,
    keys_of_tokens,
    n_documents,
    n_units,
)
from memattn_kernels.branch_attention.tiles import (
    at_branch,
    at_slots,
    attend_until,
    rows_of_tile,
)
from memattn_kernels.signatures import BranchAttentionArgs

# sizes that change from call to call: compile once for all their values
RUNTIME_SIZES = ("T", "S", "F", "n_units", "n_documents", "n_tiles", "n_list")


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def branch_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr,  # inputs
    entry_ptr, bounds_ptr, key_start_ptr, key_end_ptr,  # index; keys that a token sees
    unit_ptr, first_ptr,  # of each tile
    o_ptr, ungated_ptr, lse_ptr, residual_ptr,  # outputs
    stride_qb, stride_qs, stride_qh, stride_qt, stride_kb, stride_kf, stride_kh, stride_kt,
    stride_vb, stride_vf, stride_vh, stride_vt, stride_ob, stride_os, stride_oh, stride_ot,
    stride_ub, stride_us, stride_uh, stride_ut,
    H, T, F, n_units, n_documents, n_tiles, scale,  # sizes
    A: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: (n_tiles * Hkv,). One program computes BLOCK_M rows of a key head."""
    tile = n_tiles - 1 - tl.program_id(0) % n_tiles  # if causal, the longest rows first
    h_kv = tl.program_id(0) // n_tiles
    unit = tl.load(unit_ptr + tile)
    if unit >= n_units:
        return
    r = rows_of_tile(
        tile, unit, h_kv, F, H, n_documents, first_ptr, entry_ptr, bounds_ptr, key_start_ptr,
        key_end_ptr, A, G, T, BLOCK_M,
    )  # fmt: skip
    q = load_rows(q_ptr, at_slots(r, stride_qb, stride_qs, stride_qh, stride_qt), D, BLOCK_D)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    acc, l_i, m_i = attend_until(
        acc, l_i, m_i, q, at_branch(k_ptr, r, stride_kb, stride_kf, stride_kh),
        at_branch(v_ptr, r, stride_vb, stride_vf, stride_vh), stride_kt, stride_vt,
        r.key_start, r.key_end, scale * exponent_factor(q.dtype), D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    out, lse, residual = finish_softmax(acc, l_i, m_i, r.valid, q.dtype)
    offs_u = at_slots(r, stride_ub, stride_us, stride_uh, stride_ut)
    scatter_rows(ungated_ptr, offs_u, r.valid, out, DV, BLOCK_DV)
    out *= tl.load(gate_ptr + r.entry)[:, None]
    offs_o = at_slots(r, stride_ob, stride_os, stride_oh, stride_ot)
    scatter_rows(o_ptr, offs_o, r.valid, out, DV, BLOCK_DV)
    tl.store(lse_ptr + r.number, lse, mask=r.valid)
    if residual_ptr is not None:
        tl.store(residual_ptr + r.number, residual, mask=r.valid)


def kernel_inputs(args: BranchAttentionArgs, index: BranchIndex, saved: Named) -> dict:
    """Arguments that the kernels share, by name."""
    query, key, value = args.query, args.key, args.value
    (_, A, H, T, D), (_, F, Hkv, S, Dv) = query.shape, value.shape
    key_start, key_end = keys_of_tokens(args)
    return residual_ptr(query, saved["residual"]) | dict(
        **rows("q", query, "bsht"),
        **rows("k", key, "bfht"),
        **rows("v", value, "bfht"),
        **rows("u", saved["ungated"], "bsht"),
        ungated_ptr=saved["ungated"],
        gate_ptr=args.gates.contiguous(),
        lse_ptr=saved["lse"],
        entry_ptr=index.entry,
        bounds_ptr=index.bounds,
        key_start_ptr=key_start,
        key_end_ptr=key_end,
        H=H,
        T=T,
        S=S,
        F=F,
        n_units=n_units(args),
        n_documents=n_documents(args),
        scale=args.scale,
        A=A,
        G=H // max(Hkv, 1),
        D=D,
        DV=Dv,
        BLOCK_D=block_width(D),
        BLOCK_DV=block_width(Dv),
    )


def launch_tiles(kernel: triton.JITFunction, name: str, inputs: dict) -> None:
    """Launch a query-stationary kernel: one program for each tile of rows of a unit."""
    config = lookup(name, inputs["q_ptr"], inputs)
    bounds, G, block = inputs["bounds_ptr"], inputs["G"], config["BLOCK_M"]
    n_entries = inputs["entry_ptr"].numel()
    n_tiles = cdiv(n_entries * G, block) + min(inputs["n_units"], n_entries)
    unit, first = tiles_of_groups(bounds.diff().long()[None] * G, block, n_tiles)
    own = dict(unit_ptr=unit, first_ptr=first, n_tiles=n_tiles)
    launch(kernel, n_tiles * (inputs["H"] // G), config, inputs, own)


def launch_forward(args: BranchAttentionArgs, results: Named) -> None:
    """Fill the results and the index."""
    for result in results.values():
        result.zero_()
    results["lse"].fill_(-float("inf"))
    if not results["lse"].numel() or not args.key.shape[3]:
        return
    index = BranchIndex(results["entry"], results["bounds"])
    fill_index(index, args)
    inputs = kernel_inputs(args, index, results) | rows("o", results["out"], "bsht")
    # rows of a branch, if all are in as many
    A, T, F = args.query.shape[1], args.query.shape[3], args.key.shape[1]
    is_few = A * T * inputs["G"] <= configs.DECODE_LENGTH * F
    kernel = "decode" if is_few else "fwd"
    launch_tiles(branch_attention_fwd_kernel, f"branch_attention_{kernel}", inputs)
