"""What the ahead-of-time gate compiles of task-masked attention.

Both forms of a mask, with the bounds of sequences, groups of query heads and causal queries; and
the plain forms that most calls run: no bounds, one query head for each key head.
"""

from functools import partial

import triton

from memattn_kernels.aot_kernel import AotKernel, is_specialized, taken, usual_constants
from memattn_kernels.task_masked_attention.backward_dkdv import (
    task_masked_attention_bwd_dkdv_kernel,
)
from memattn_kernels.task_masked_attention.backward_dq import task_masked_attention_bwd_dq_kernel
from memattn_kernels.task_masked_attention.forward import task_masked_attention_fwd_kernel

TYPES = dict.fromkeys(
    ("task_ptr", "seq_start_ptr", "seq_end_ptr", "bits_ptr", "slots_ptr", "query_node_ptr",
     "key_node_ptr", "tiles_ptr", "counts_ptr"),
    "*i32",
) | dict.fromkeys(
    ("lse_ptr", "scaled_lse_ptr", "residual_ptr", "delta_ptr", "dlse_ptr"), "*fp32"
)  # fmt: skip


def _constants(
    function: triton.JITFunction,
    mask: str,
    form: str,
    head_dim: int,
    dtype: str,
    config: dict[str, int],
) -> dict[str, object]:
    """The compile-time arguments."""
    constants = usual_constants(head_dim, dtype, config) | {"IS_CAUSAL": form != "full"}
    absent = ["slots_ptr"] if mask == "graph" else ["query_node_ptr", "key_node_ptr"]
    if form:
        absent += ["seq_start_ptr", "seq_end_ptr", "dlse_ptr"]
        if is_specialized(function, "G"):
            constants["G"] = 1
    return taken(function, constants | dict.fromkeys(absent))


KERNELS = tuple(
    AotKernel(
        name=f"task_masked_attention_{name}",
        part=f"{mask}-{form}" if form else mask,
        function=function,
        constants=partial(_constants, function, mask, form),
        in_float32=not form,
        types=TYPES,
    )
    for name, function in (
        ("fwd", task_masked_attention_fwd_kernel),
        ("bwd_dq", task_masked_attention_bwd_dq_kernel),
        ("bwd_dkdv", task_masked_attention_bwd_dkdv_kernel),
    )
    for mask, forms in (("dense", ("", "plain", "full")), ("graph", ("", "plain")))
    for form in forms
)
