"""What the ahead-of-time gate compiles of attention in branches.

Two slots for each token. Words of a part say what else: ``group`` four query heads for each key
head, ``lse`` a gradient through it. Causal or not, padded or packed is the same kernel.
"""

from functools import partial

import triton

from memattn_kernels.aot_kernel import AotKernel, taken, usual_constants
from memattn_kernels.branch_attention.backward_dkdv import branch_attention_bwd_dkdv_kernel
from memattn_kernels.branch_attention.backward_dq import branch_attention_bwd_dq_kernel
from memattn_kernels.branch_attention.forward import branch_attention_fwd_kernel

INTEGERS = ("entry_ptr", "bounds_ptr", "key_start_ptr", "key_end_ptr", "unit_ptr", "first_ptr",
            "token_start_ptr", "token_end_ptr", "before_ptr")  # fmt: skip
FLOATS = ("gate_ptr", "lse_ptr", "residual_ptr", "dlse_ptr", "dot_ptr", "list_lse_ptr",
          "list_delta_ptr", "list_residual_ptr", "list_dlse_ptr")  # fmt: skip
TYPES = dict.fromkeys(INTEGERS, "*i32") | dict.fromkeys(FLOATS, "*fp32")


def _constants(
    function: triton.JITFunction, part: str, head_dim: int, dtype: str, config: dict[str, int]
) -> dict[str, object]:
    """The compile-time arguments, and those that are None."""
    words = part.split("-")
    constants = usual_constants(head_dim, dtype, config)
    constants |= {"A": 2, "G": 4 if "group" in words else 1}
    absent = [] if dtype == "float32" else ["list_residual_ptr", "list_dlse_ptr"]
    absent += [] if "lse" in words else ["dlse_ptr", "list_dlse_ptr"]
    return taken(function, constants | dict.fromkeys(absent))


KERNELS = tuple(
    AotKernel(
        name=f"branch_attention_{name}",
        part=part,
        function=function,
        constants=partial(_constants, function, part),
        # training in float32 runs these
        in_float32=(name, part) != ("fwd", "group"),
        types=TYPES,
    )
    for name, function, parts in (
        ("fwd", branch_attention_fwd_kernel, ("", "group")),
        ("decode", branch_attention_fwd_kernel, ("group",)),
        ("bwd_dq", branch_attention_bwd_dq_kernel, ("", "group-lse")),
        ("bwd_dkdv", branch_attention_bwd_dkdv_kernel, ("lse",)),
    )
    for part in parts
)
