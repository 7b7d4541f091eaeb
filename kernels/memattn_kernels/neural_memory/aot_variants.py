"""What the ahead-of-time gate compiles of the neural memory.

Two layers, 64 to 256 to 64 features, in chunks of 64 tokens. The plain form is what training runs:
momentum, decay, no state. The other, in float32 too, has a state, documents, and all that norms and
losses may ask for.
"""

from functools import partial

import triton

from memattn_kernels.aot_kernel import AotKernel
from memattn_kernels.neural_memory.backward import neural_memory_bwd_kernel
from memattn_kernels.neural_memory.forward import neural_memory_fwd_kernel
from memattn_kernels.neural_memory.launch import PRECISIONS

CHUNK = 64
WIDTHS = (64, 256, 64, 0, 0)
INPUTS = ("q_ptr", "k_ptr", "v_ptr", "o_ptr", "do_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
INTEGERS = ("count_ptr", "row_start_ptr", "row_end_ptr", "skipped_ptr", "place_ptr")
STATE = ("start_s_ptr", "pending_h_ptr", "pending_delta_ptr", "pending_decay_ptr",
         "pending_eta_ptr", "count_ptr", "row_start_ptr", "row_end_ptr", "end_h_ptr",
         "end_delta_ptr", "end_decay_ptr", "end_eta_ptr", "d_end_w_ptr", "d_end_s_ptr",
         "d_end_h_ptr", "d_end_delta_ptr",
         "d_end_decay_ptr", "d_end_eta_ptr", "d_pending_h_ptr", "d_pending_delta_ptr",
         "d_pending_decay_ptr", "d_pending_eta_ptr")  # fmt: skip


def _constants(
    function: triton.JITFunction, part: str, head_dim: int, dtype: str, config: dict[str, int]
) -> dict[str, object]:
    """The compile-time arguments, and those that are None."""
    has_all = part == "all"
    kind = "float" if dtype == "float32" else "half"
    constants: dict[str, object] = {
        "IS_BATCH": not has_all,
        "READ_CHUNK": False,
        "IS_SILU": False,
        "RESIDUAL": has_all,
        "IS_HUBER": has_all,
        "CLAMP": 2 if has_all else 1,
        "SKIP": has_all,
        "HAS_MOMENTUM": True,
        "HAS_END": has_all,
        "BLOCK_C": CHUNK,
        "chunk": CHUNK,
        "depth": 2,
        **{f"width_{n}": width for n, width in enumerate(WIDTHS)},
        "all_inputs": sum(WIDTHS[:2]),
        "all_outputs": sum(WIDTHS[1:]),
        "PRECISION": PRECISIONS[kind],
        "stride_lrt": 1,
        "stride_etat": 1,
        "stride_decayt": 1,
        **{name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")},
        **({} if has_all else dict.fromkeys(STATE)),
    }
    return {name: value for name, value in constants.items() if name in function.arg_names}


def _types(function: triton.JITFunction) -> dict[str, str]:
    """All but inputs, outputs and their gradients is float32, whatever these are."""
    types = dict.fromkeys(("huber_delta", "max_norm"), "fp32") | dict.fromkeys(INTEGERS, "*i32")
    for name in function.arg_names:
        if name.endswith("_ptr") and name not in (*INPUTS, *INTEGERS):
            types[name] = "*fp32"
    return types


KERNELS = tuple(
    AotKernel(
        name=f"neural_memory_{name}",
        part=part,
        function=function,
        constants=partial(_constants, function, part),
        in_float32=part == "all",
        # tiles do not depend on widths
        widths=(64,),
        types=_types(function),
    )
    for name, function in (("fwd", neural_memory_fwd_kernel), ("bwd", neural_memory_bwd_kernel))
    for part in ("", "all")
)
