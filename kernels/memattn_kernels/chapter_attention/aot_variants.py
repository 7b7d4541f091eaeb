"""What the ahead-of-time gate compiles of chapter attention.

Chapters of 128 keys with weights, one query head for each key head, no gradient through ``lse``:
joint in all forms, and independent where keys are stationary, where its softmax costs most.
"""

from functools import partial

import triton

from memattn_kernels._common import block_length, block_width
from memattn_kernels.aot_kernel import AotKernel
from memattn_kernels.chapter_attention.backward_dkdv import chapter_attention_bwd_dkdv_kernel
from memattn_kernels.chapter_attention.backward_dq import chapter_attention_bwd_dq_kernel
from memattn_kernels.chapter_attention.forward import INDEX, chapter_attention_fwd_kernel

N_KEYS = 128  # of a chapter
TYPES = dict.fromkeys(("slots_ptr", "n_slots_ptr", "row_start_ptr", "row_end_ptr", *INDEX), "*i32")
TYPES |= dict.fromkeys(
    ("weight_ptr", "lse_ptr", "residual_ptr", "acc_ptr", "m_ptr", "l_ptr", "dw_ptr", "delta_ptr",
     "stat_ptr"),
    "*fp32",
)  # fmt: skip
STATE = ("acc_ptr", "m_ptr", "l_ptr")


def _constants(
    function: triton.JITFunction,
    part: str,
    head_dim: int,
    dtype: str,
    config: dict[str, int],
) -> dict[str, object]:
    """The compile-time arguments, and those that are None."""
    constants: dict[str, object] = {
        "D": head_dim,
        "DV": head_dim,
        "BLOCK_D": block_width(head_dim),
        "BLOCK_DV": block_width(head_dim),
        "BLOCK_M": config["BLOCK_M"],
        "BLOCK_N": block_length(config["BLOCK_N"], N_KEYS),
        "G": 1,
        "WIDTH": None if part == "row" else 1,
        "M": N_KEYS,
        "IS_JOINT": part != "independent",
    }
    absent = ["k_scale_ptr", "v_scale_ptr", "dlse_ptr", "length_ptr"]
    # numbers of a chapter that is longer than a tile
    absent += ["stat_ptr"] * (part != "independent" or config["BLOCK_N"] >= N_KEYS)
    absent += ["o_rest_ptr" if dtype == "float32" else "residual_ptr"]
    if part == "row":
        absent += [*INDEX, *STATE]
    if part == "independent":
        absent += ["delta_ptr", "lse_ptr"]
    constants |= dict.fromkeys(absent)
    return {name: value for name, value in constants.items() if name in function.arg_names}


KERNELS = tuple(
    AotKernel(
        name=f"chapter_attention_{name}",
        part=part,
        function=function,
        constants=partial(_constants, function, part),
        in_float32=in_float32,
        types=TYPES,
    )
    for name, part, function, in_float32 in (
        ("fwd", "row", chapter_attention_fwd_kernel, True),
        ("decode", "row", chapter_attention_fwd_kernel, False),
        ("fwd_by_chapter", "", chapter_attention_fwd_kernel, False),
        ("bwd_dq", "row", chapter_attention_bwd_dq_kernel, True),
        ("bwd_dq_by_chapter", "", chapter_attention_bwd_dq_kernel, False),
        ("bwd_dkdv", "joint", chapter_attention_bwd_dkdv_kernel, True),
        ("bwd_dkdv", "independent", chapter_attention_bwd_dkdv_kernel, False),
    )
)
