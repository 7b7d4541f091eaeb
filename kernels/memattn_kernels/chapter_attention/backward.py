"""Backward of chapter attention: no atomics, every gradient has one owner.

    d_query, and partial sums of the weights' gradients    the owners of the forward's rows
    d_key, d_value                                         one program per tile of a chapter's keys,
                                                           or of a part of a long one

Keys are the last: what they need of rows is listed in the order in which they read it (``lists``).
Where a chapter fits one tile and its rows fill tiles of their own, the independent form computes
its softmax anew instead.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from memattn_kernels._common import block_length, cdiv, rows, rows_ready
from memattn_kernels._launch import launch, lookup, residual_ptr
from memattn_kernels.chapter_attention.backward_dkdv import chapter_attention_bwd_dkdv_kernel
from memattn_kernels.chapter_attention.backward_dq import PART, chapter_attention_bwd_dq_kernel
from memattn_kernels.chapter_attention.forward import (
    index_inputs,
    index_of,
    is_by_chapter,
    kernel_inputs,
    launch_rows,
    rest_ptr,
    row_config,
)
from memattn_kernels.chapter_attention.index import ChapterIndex
from memattn_kernels.chapter_attention.lists import (
    LIST_CONFIG,
    SUM_CONFIG,
    Parts,
    chapter_attention_bwd_lists_kernel,
    chapter_attention_bwd_sum_kernel,
    parts_of_chapters,
    places_of_entries,
)
from memattn_kernels.signatures import ChapterAttentionArgs


class _Keys(NamedTuple):
    """How the key-stationary kernel walks the rows."""

    config: dict[str, int]
    width: int | None  # rows of an entry in a tile of several entries
    rows: int  # of an entry or routing row in a list
    by_entry: bool  # whether lists have rows for each entry, or for each routing row


def _keys(args: ChapterAttentionArgs, inputs: dict) -> _Keys:
    """Rows of few queries share tiles. Lists are by entry where numbers of a slot are listed."""
    M, width = inputs["M"], inputs["row_width"]
    config = lookup("chapter_attention_bwd_dkdv", args.query, inputs)
    in_tile = lookup("chapter_attention_bwd_dkdv_in_tile", args.query, inputs)
    shares_tiles, is_listed = width < config["BLOCK_M"], True
    if not shares_tiles and args.is_joint:
        is_listed = False
    elif not shares_tiles and in_tile["BLOCK_N"] >= M:
        config, is_listed = in_tile, False
    config = config | {"BLOCK_N": block_length(config["BLOCK_N"], M)}
    rows = width if shares_tiles else cdiv(width, config["BLOCK_M"]) * config["BLOCK_M"]
    return _Keys(config, width if shares_tiles else None, rows, is_listed)


def launch_backward(
    args: ChapterAttentionArgs,
    cotangents: dict[str, Tensor | None],
    saved: dict[str, Tensor],
    grads: dict[str, Tensor],
) -> None:
    """Fill the gradients of ``query``, ``weights`` and, if not quantised, ``key``, ``value``."""
    query, lse, slots = args.query, saved["lse"], saved["slots"]
    grads["query"].zero_()
    grads["weights"].zero_()
    if not lse.numel() or not slots.numel():
        grads["key"].zero_()
        grads["value"].zero_()
        return
    weights = None if args.weights is None else args.weights.gather(-1, saved["order"])
    index = index_of(args, saved)
    d_out, d_lse = cotangents["out"], cotangents["lse"]
    d_out = torch.zeros_like(saved["out"]) if d_out is None else rows_ready(d_out)
    shared = kernel_inputs(args, slots, weights) | residual_ptr(query, saved["residual"])
    shared |= rows("do", d_out, "bht") | index_inputs(args, index)
    shared |= dict(
        lse_ptr=lse,
        dlse_ptr=None if d_lse is None else d_lse.contiguous(),
        delta_ptr=torch.empty_like(lse) if args.is_joint else None,
        **dict.fromkeys(("place_ptr", "shift_ptr", "rest_ptr", "list_ptr")),
        n_list=0,
    )
    if args.key_scale is not None:
        _launch_queries(args, saved, grads, index, shared)
        return
    keys = _keys(args, shared)
    block, K, Hkv = keys.config["BLOCK_M"], slots.shape[2], args.key.shape[1]
    n_owners = Hkv * cdiv(shared["M"], keys.config["BLOCK_N"])
    parts = parts_of_chapters(index, K, keys.rows, block, n_owners)
    n_list = parts.n_tiles * block if keys.by_entry else args.row_start.numel() * keys.rows
    places = places_of_entries(index, parts, K, keys.rows, block) if keys.by_entry else None

    def new_lists() -> dict:
        rest = lse.new_zeros(Hkv, n_list) if query.dtype == torch.float32 else None
        shift = lse.new_full((Hkv, n_list), torch.inf)
        return dict(shift_ptr=shift, rest_ptr=rest, list_ptr=lse.new_zeros(Hkv, n_list))

    # in the independent form queries list numbers of a slot; a row's are listed after them, when
    # what they need is free again
    shared["n_list"] = n_list
    of_slots = places is not None and not args.is_joint
    if places is not None and of_slots:
        shared |= new_lists()
        place_of = places.new_empty(places.shape).scatter_(0, index.entry.long(), places)
        _launch_queries(args, saved, grads, index, shared | {"place_ptr": place_of})
    else:
        _launch_queries(args, saved, grads, index, shared)
        shared |= new_lists() if args.is_joint or d_lse is not None else {}
    # of each entry, in the order of the index
    weights = None if weights is None else weights.flatten()[index.entry]
    shared |= dict(weight_ptr=weights)
    if not of_slots and shared["list_ptr"] is not None:
        _launch_lists(args, keys, places, shared)
    if not keys.by_entry:
        shared |= dict(place_ptr=index.entry // K * keys.rows)
    if weights is not None and args.is_joint and query.dtype != torch.float32:
        shared |= dict(weight_ptr=None if keys.width else weights.log2())
    _launch_keys(args, keys, parts, shared, grads)


def _launch_queries(
    args: ChapterAttentionArgs,
    saved: dict[str, Tensor],
    grads: dict[str, Tensor],
    index: ChapterIndex,
    shared: dict,
) -> None:
    """Fill the gradients of ``query`` and ``weights``, and ``delta``."""
    (B, H, T, D), slots, lse = args.query.shape, saved["slots"], saved["lse"]
    M, Hkv = shared["M"], args.key.shape[1]
    own = rows("o", saved["out"], "bht") | rows("dq", grads["query"], "bht")
    own |= rest_ptr(saved["rest"]) | {"acc_ptr": None}
    by_chapter = is_by_chapter(args)
    config = row_config("chapter_attention_bwd_dq", args, shared, by_chapter)
    width = shared["row_width"] * Hkv
    if by_chapter:
        own["acc_ptr"] = lse.new_empty(B * T * H, D)
    else:
        n_inner = cdiv(M, config["BLOCK_N"]) if args.is_joint else 1
        block = config["BLOCK_M"]
        n_parts = cdiv(shared["row_width"], block) * (block // PART.value)
        width = n_inner * Hkv * n_parts
    # empty slots and rows without a query write nothing
    partial = None if args.weights is None else lse.new_zeros(slots.numel(), width)
    kernel, own_index = chapter_attention_bwd_dq_kernel, index if by_chapter else None
    launch_rows(kernel, config, args, own_index, shared, own, {"dw_ptr": partial})
    if partial is not None:
        grads["weights"].scatter_(-1, saved["order"], partial.sum(-1).view(slots.shape))


def _launch_lists(
    args: ChapterAttentionArgs, keys: _Keys, places: Tensor | None, shared: dict
) -> None:
    """List ``lse`` and ``delta`` of rows, or in the independent form ``lse`` and its gradient."""
    own = dict(number_ptr=shared["delta_ptr"] if args.is_joint else shared["dlse_ptr"])
    if places is None:  # by routing row, to the end of its last tile
        n = args.row_start.numel()
        number = torch.arange(n, device=args.query.device, dtype=torch.int32)
        length = (args.row_end - args.row_start).flatten() * shared["G"]
        own |= dict(sequence_ptr=number // shared["N"], start_ptr=args.row_start, length_ptr=length)
        own |= dict(place_ptr=number * keys.rows, weight_ptr=None)
    else:
        n = places.numel()
        own["place_ptr"] = places
    n_programs = cdiv(n * keys.rows, LIST_CONFIG["BLOCK_M"]) * args.key.shape[1]
    sizes = dict(n_rows=keys.rows, n_entries=n)
    launch(chapter_attention_bwd_lists_kernel, n_programs, LIST_CONFIG, shared, own, sizes)


def _launch_keys(
    args: ChapterAttentionArgs, keys: _Keys, parts: Parts, shared: dict, grads: dict[str, Tensor]
) -> None:
    """Fill the gradients of ``key`` and ``value``."""
    M, D, DV, Hkv = shared["M"], shared["D"], shared["DV"], args.key.shape[1]
    n_tiles = cdiv(M, keys.config["BLOCK_N"]) * Hkv
    new = lambda width: shared["lse_ptr"].new_empty(parts.n_sums, Hkv, M, width)
    own = rows("dk", grads["key"], "chm") | rows("dv", grads["value"], "chm")
    own |= dict(
        WIDTH=keys.width,
        LIST_ENTRIES=keys.by_entry,
        chapter_ptr=parts.chapter,
        first_ptr=parts.first,
        tiles_ptr=parts.tiles,
        sums_ptr=parts.sums,
        most=parts.most,
        part_dk_ptr=new(D) if parts.n_sums else None,
        part_dv_ptr=new(DV) if parts.n_sums else None,
    )
    if args.row_len == 1 and keys.width:  # the row of a filled slot has its query
        own["length_ptr"] = None
    kernel = chapter_attention_bwd_dkdv_kernel
    launch(kernel, parts.chapter.numel() * n_tiles, keys.config, shared, own)
    if parts.n_sums:
        config = SUM_CONFIG | {"BLOCK_N": block_length(SUM_CONFIG["BLOCK_N"], M)}
        n_programs = parts.several.numel() * cdiv(M, config["BLOCK_N"]) * Hkv
        own["chapter_ptr"] = parts.several
        launch(chapter_attention_bwd_sum_kernel, n_programs, config, shared, own)
