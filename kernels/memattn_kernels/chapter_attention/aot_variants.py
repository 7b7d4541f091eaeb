"""What the ahead-of-time gate compiles of chapter attention.

Chapters of 128 keys with weights. Words of a part say what else: ``row`` a program that owns rows
of one routing row, ``rows`` tiles of rows of one entry; ``independent`` softmax; ``group`` four
query heads for each key head; ``lse`` a gradient through it; ``short`` chapters that fit a tile, as
they do where keys compute their softmax; ``int8`` and ``int4`` a quantised bank.
"""

import re
from functools import partial

import triton

from memattn_kernels._common import block_length, block_width
from memattn_kernels.aot_kernel import AotKernel
from memattn_kernels.chapter_attention import lists
from memattn_kernels.chapter_attention.backward_dkdv import chapter_attention_bwd_dkdv_kernel
from memattn_kernels.chapter_attention.backward_dq import chapter_attention_bwd_dq_kernel
from memattn_kernels.chapter_attention.forward import INDEX, chapter_attention_fwd_kernel

N_KEYS = 128  # of a chapter
INTEGERS = ("slots_ptr", "n_slots_ptr", "row_start_ptr", "row_end_ptr", *INDEX, "place_ptr",
            "tiles_ptr", "sums_ptr")  # fmt: skip
FLOATS = ("weight_ptr", "lse_ptr", "residual_ptr", "acc_ptr", "m_ptr", "l_ptr", "dw_ptr",
          "dlse_ptr", "delta_ptr", "shift_ptr", "rest_ptr", "list_ptr", "number_ptr", "part_dk_ptr",
          "part_dv_ptr", "k_scale_ptr", "v_scale_ptr")  # fmt: skip
TYPES = dict.fromkeys(INTEGERS, "*i32") | dict.fromkeys(FLOATS, "*fp32")
CODES = {"int8": "*i8", "int4": "*u8"}
STATE = ("acc_ptr", "m_ptr", "l_ptr")
LISTS = ("shift_ptr", "rest_ptr", "list_ptr")


def _constants(
    function: triton.JITFunction,
    part: str,
    head_dim: int,
    dtype: str,
    config: dict[str, int],
) -> dict[str, object]:
    """The compile-time arguments, and those that are None."""
    words, is_keys = part.split("-"), function is chapter_attention_bwd_dkdv_kernel
    is_joint, has_lse = "independent" not in words, "lse" in words
    group = 4 if "group" in words else 1
    by_row = "row" in words or "rows" in words
    # numbers of a slot are listed where rows of several entries share a tile
    by_entry = not by_row
    is_short = "short" in words or (is_keys and by_row and not is_joint)
    constants: dict[str, object] = {
        "D": head_dim,
        "DV": head_dim,
        "BLOCK_D": block_width(head_dim),
        "BLOCK_DV": block_width(head_dim),
        "BLOCK_M": config.get("BLOCK_M"),
        "BLOCK_N": block_length(config.get("BLOCK_N", N_KEYS), N_KEYS),
        "G": group,
        "WIDTH": None if by_row else group,
        "M": min(config["BLOCK_N"], N_KEYS) if is_short else N_KEYS,
        "IS_JOINT": is_joint,
        "LIST_ENTRIES": by_entry,
    }
    absent = []
    if not (is_keys and by_row):
        absent += ["length_ptr"] if function is not lists.chapter_attention_bwd_lists_kernel else []
    absent += [] if has_lse else ["dlse_ptr"]
    absent += [] if words[-1] in CODES else ["k_scale_ptr", "v_scale_ptr"]
    absent += ["o_rest_ptr"] if dtype == "float32" else ["residual_ptr", "rest_ptr"]
    if is_keys:
        absent += [] if is_joint or by_entry or has_lse else LISTS
    elif function is chapter_attention_bwd_dq_kernel:
        absent += ["place_ptr", *LISTS] if is_joint or not by_entry else []
    if not is_keys and by_row:
        absent += [*INDEX, *STATE]
    absent += [] if is_joint else ["delta_ptr"]
    constants |= dict.fromkeys(absent)
    return {name: value for name, value in constants.items() if name in function.arg_names}


def _kernel(
    name: str, function: triton.JITFunction, part: str = "", pinned: dict | None = None
) -> AotKernel:
    code = CODES.get(part.split("-")[-1])
    return AotKernel(
        name=f"chapter_attention_{name}",
        part=part,
        function=function,
        constants=partial(_constants, function, part),
        # training in float32 runs these
        in_float32=pinned is not None or part in ("row", "joint") and name != "decode",
        pinned=pinned,
        types=TYPES | ({} if code is None else {"k_ptr": code, "v_ptr": code}),
    )


PARTS = {
    "fwd": ("row",),
    "fwd_quantised": ("row-group-int8", "row-int4"),
    "fwd_independent": ("row-group-independent", "row-independent-short"),
    "decode": ("row", "row-int8", "row-group-int4"),
    "fwd_by_chapter": ("", "group-int8", "int4", "group-independent"),
    "bwd_dq": ("row", "row-group-lse", "row-int4"),
    "bwd_dq_independent": ("row-group-independent-lse", "row-independent-short"),
    "bwd_dq_by_chapter": ("", "group-lse", "int4", "group-independent-lse"),
    "bwd_dkdv": ("joint", "group", "joint-rows", "independent"),
    "bwd_dkdv_in_tile": ("group-rows-independent-lse",),
}
FUNCTIONS = {
    "fwd": chapter_attention_fwd_kernel,
    "decode": chapter_attention_fwd_kernel,
    "bwd_dq": chapter_attention_bwd_dq_kernel,
    "bwd_dkdv": chapter_attention_bwd_dkdv_kernel,
}
PINNED = {
    "bwd_lists": (lists.chapter_attention_bwd_lists_kernel, lists.LIST_CONFIG),
    "bwd_sum": (lists.chapter_attention_bwd_sum_kernel, lists.SUM_CONFIG),
}
KERNELS = (
    *(
        _kernel(
            name,
            FUNCTIONS[re.sub("_(by_chapter|in_tile|independent|quantised)$", "", name)],
            part,
        )
        for name, parts in PARTS.items()
        for part in parts
    ),
    *(
        _kernel(name, function, pinned=dict.fromkeys(("half", "float"), config))
        for name, (function, config) in PINNED.items()
    ),
)
