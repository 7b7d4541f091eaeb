"""What the ahead-of-time gate compiles of segmented attention.

The largest form of a kernel has all sources of keys, segments, windows, the bounds of sequences and
groups of query heads; queries are causal, and packed documents only take away the bounds'
arithmetic. The plain forms are those that most calls run: tokens alone, one query head for each key
head; causal, not causal ("full") and with a window.
"""

from functools import partial

import triton

from memattn_kernels._common import block_length
from memattn_kernels.aot_kernel import AotKernel, taken, usual_constants
from memattn_kernels.segmented_attention.backward_dkdv import segmented_attention_bwd_dkdv_kernel
from memattn_kernels.segmented_attention.backward_dq import segmented_attention_bwd_dq_kernel
from memattn_kernels.segmented_attention.forward import segmented_attention_fwd_kernel

# persistent and memory keys: the smallest tile
N_EXTRA = 16
TYPES = dict.fromkeys(("seq_start_ptr", "seq_end_ptr"), "*i32") | dict.fromkeys(
    ("lse_ptr", "scaled_lse_ptr", "residual_ptr", "delta_ptr", "dlse_ptr"), "*fp32"
)
# partial sums
PERSISTENT_TYPES = TYPES | {"dk_ptr": "*fp32", "dv_ptr": "*fp32"}


PLAIN_FORMS = ("plain", "full", "window")


def _form_constants(form: str) -> dict[str, object]:
    """What a plain form takes away; nothing for the largest form, whose name is empty."""
    if not form:
        return {}
    absent = ["pk_ptr", "pv_ptr", "mk_ptr", "mv_ptr", "segments_ptr", "seq_start_ptr"]
    absent += ["seq_end_ptr", "dlse_ptr", "L"] + ["W"] * (form != "window")
    return dict.fromkeys(absent) | {"G": 1, "IS_CAUSAL": form != "full"}


def _shared_constants(head_dim: int, dtype: str, config: dict[str, int]) -> dict[str, object]:
    """The compile-time arguments that all kernels have."""
    constants = usual_constants(head_dim, dtype, config)
    return constants | {"IS_CAUSAL": True, "documents_ptr": None}


def _row_constants(
    function: triton.JITFunction, form: str, head_dim: int, dtype: str, config: dict[str, int]
) -> dict[str, object]:
    """Compile-time arguments of the query-stationary kernels."""
    extra = block_length(config["BLOCK_N"], N_EXTRA)
    tiles = {"BLOCK_NP": extra, "BLOCK_NM": extra, "MEMORY_IS_CAUSAL": True}
    constants = _shared_constants(head_dim, dtype, config) | tiles | _form_constants(form)
    return taken(function, constants)


def _key_constants(
    source: str,
    form: str,
    is_grouped: bool,
    head_dim: int,
    dtype: str,
    config: dict[str, int],
) -> dict[str, object]:
    """Compile-time arguments of the key-stationary kernel for one source of keys."""
    constants = _shared_constants(head_dim, dtype, config)
    if source != "token":
        constants["BLOCK_N"] = block_length(config["BLOCK_N"], N_EXTRA)
    constants |= {"SOURCE": source, "segments_ptr": None} | _form_constants(form) | {"G": 1}
    if is_grouped:
        del constants["G"]
    return taken(segmented_attention_bwd_dkdv_kernel, constants)


KERNELS = (
    *(
        AotKernel(
            name=f"segmented_attention_{name}",
            part=form,
            function=function,
            constants=partial(_row_constants, function, form),
            in_float32=not form,
            types=TYPES,
        )
        for name, function, forms in (
            ("fwd", segmented_attention_fwd_kernel, ("", *PLAIN_FORMS)),
            ("decode", segmented_attention_fwd_kernel, ("", "plain")),
            ("bwd_dq", segmented_attention_bwd_dq_kernel, ("", *PLAIN_FORMS)),
        )
        for form in forms
    ),
    *(
        AotKernel(
            name="segmented_attention_bwd_dkdv" + "_grouped" * is_grouped,
            part=f"{source}-{form}" if form else source,
            function=segmented_attention_bwd_dkdv_kernel,
            constants=partial(_key_constants, source, form, is_grouped),
            in_float32=not form,
            types=PERSISTENT_TYPES if source == "persistent" else TYPES,
        )
        for is_grouped in (False, True)
        for source in ("token", "persistent", "memory")
        for form in ("", *PLAIN_FORMS * (source == "token"))
    ),
)
