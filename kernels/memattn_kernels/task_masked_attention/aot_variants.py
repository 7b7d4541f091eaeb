"""What the ahead-of-time gate compiles of task-masked attention.

Both forms of a mask, with the bounds of sequences and causal queries.
"""

from functools import partial

from memattn_kernels._common import block_width
from memattn_kernels.aot_kernel import AotKernel
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


def _constants(form: str, head_dim: int, dtype: str, config: dict[str, int]) -> dict[str, object]:
    """The compile-time arguments."""
    constants: dict[str, object] = {
        "D": head_dim,
        "DV": head_dim,
        "BLOCK_D": block_width(head_dim),
        "BLOCK_DV": block_width(head_dim),
        "BLOCK_M": config["BLOCK_M"],
        "BLOCK_N": config["BLOCK_N"],
        "IS_CAUSAL": True,
    }
    absent = ["slots_ptr"] if form == "graph" else ["query_node_ptr", "key_node_ptr"]
    if dtype != "float32":
        absent.append("residual_ptr")
    return constants | dict.fromkeys(absent)


KERNELS = tuple(
    AotKernel(
        name=f"task_masked_attention_{name}",
        part=form,
        function=function,
        constants=partial(_constants, form),
        types=TYPES,
    )
    for name, function in (
        ("fwd", task_masked_attention_fwd_kernel),
        ("bwd_dq", task_masked_attention_bwd_dq_kernel),
        ("bwd_dkdv", task_masked_attention_bwd_dkdv_kernel),
    )
    for form in ("dense", "graph")
)
