"""What the ahead-of-time gate compiles of future attention.

The largest form of a kernel has all it may: a cosine loss, queries of their own for the future,
every cotangent, bounds of sequences, groups of query heads. The table is shared and by position. A
loss in the forward, and a target that has a gradient, have entries of their own. The plain forms
have none of these, and one query head for each key head.
"""

from functools import partial

import triton

from memattn_kernels.aot_kernel import AotKernel, taken, usual_constants
from memattn_kernels.future_attention import backward_kernels, forward

TYPES = dict.fromkeys(("seq_start_ptr", "seq_end_ptr"), "*i32") | dict.fromkeys(
    ("lse_ptr", "residual_ptr", "lse_target_ptr", "residual_target_ptr", "loss_ptr", "counts_ptr",
     "scaled_lse_ptr", "delta_ptr", "scaled_lse_target_ptr", "delta_target_ptr", "dlse_ptr",
     "dloss_ptr"),
    "*fp32",
)  # fmt: skip
# partial sums
TABLE_TYPES = TYPES | {"dk_ptr": "*fp32", "dv_ptr": "*fp32"}


def _constants(
    function: triton.JITFunction,
    name: str,
    form: str,
    head_dim: int,
    dtype: str,
    config: dict[str, int],
) -> dict[str, object]:
    """The compile-time arguments of a kernel."""
    constants = usual_constants(head_dim, dtype, config)
    constants |= {"BY_DISTANCE": False, "PER_DOCUMENT": False, "IS_COSINE": True}
    absent = ["documents_ptr", "cu_seqlens_ptr"]
    if dtype != "float32":
        absent.append("residual_target_ptr")
    if name == "fwd":
        absent += ["loss_ptr", "counts_ptr", "target_ptr"]
    if form == "plain":
        constants |= {"G": 1, "GF": 1}
        absent += ["fq_ptr", "dfq_ptr", "seq_start_ptr", "seq_end_ptr", "dlse_ptr", "dof_ptr"]
        if name == "bwd_dq":
            absent += ["of_ptr", "df_ptr", "dloss_ptr", "target_ptr"]
    if name not in ("fwd_loss", "decode") and "target" not in name:
        absent += ["dtarget_ptr", "lse_target_ptr", "residual_target_ptr", "scaled_lse_target_ptr",
                   "delta_target_ptr"]  # fmt: skip
    return taken(function, constants | dict.fromkeys(absent))


KERNELS = tuple(
    AotKernel(
        name=f"future_attention_{name}",
        function=function,
        part=form,
        constants=partial(_constants, function, name, form),
        in_float32=not form,
        types=TABLE_TYPES if name == "bwd_table" else TYPES,
    )
    for name, function in (
        ("fwd", forward._future_attention_fwd_kernel),
        ("fwd_loss", forward._future_attention_fwd_kernel),
        ("decode", forward._future_attention_fwd_kernel),
        ("bwd_dq", backward_kernels.future_attention_bwd_dq_kernel),
        ("bwd_dq_target", backward_kernels.future_attention_bwd_dq_kernel),
        ("bwd_dkdv", backward_kernels.future_attention_bwd_dkdv_kernel),
        ("bwd_dkdv_target", backward_kernels.future_attention_bwd_dkdv_kernel),
        ("bwd_table", backward_kernels.future_attention_bwd_table_kernel),
    )
    for form in ("", "plain")
)
