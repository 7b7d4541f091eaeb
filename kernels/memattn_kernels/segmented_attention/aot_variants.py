"""What the ahead-of-time gate compiles of segmented attention.

All sources of keys, segments, windows and the bounds of sequences are there, and queries are
causal; packed documents only take away the bounds' arithmetic.
"""

from functools import partial

from memattn_kernels._common import block_length, block_width
from memattn_kernels.aot_kernel import AotKernel
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


def _shared_constants(head_dim: int, dtype: str, config: dict[str, int]) -> dict[str, object]:
    """The compile-time arguments that all kernels have."""
    constants: dict[str, object] = {
        "D": head_dim,
        "DV": head_dim,
        "BLOCK_D": block_width(head_dim),
        "BLOCK_DV": block_width(head_dim),
        "BLOCK_M": config["BLOCK_M"],
        "BLOCK_N": config["BLOCK_N"],
        "IS_CAUSAL": True,
        "documents_ptr": None,
    }
    return constants if dtype == "float32" else constants | {"residual_ptr": None}


def _row_constants(head_dim: int, dtype: str, config: dict[str, int]) -> dict[str, object]:
    """Compile-time arguments of the query-stationary kernels."""
    extra = block_length(config["BLOCK_N"], N_EXTRA)
    tiles = {"BLOCK_NP": extra, "BLOCK_NM": extra, "MEMORY_IS_CAUSAL": True}
    return _shared_constants(head_dim, dtype, config) | tiles


def _key_constants(
    source: str, head_dim: int, dtype: str, config: dict[str, int]
) -> dict[str, object]:
    """Compile-time arguments of the key-stationary kernel for one source of keys."""
    constants = _shared_constants(head_dim, dtype, config)
    if source != "token":
        constants["BLOCK_N"] = block_length(config["BLOCK_N"], N_EXTRA)
    return constants | {"SOURCE": source, "segments_ptr": None}


KERNELS = (
    *(
        AotKernel(
            name=f"segmented_attention_{name}",
            function=function,
            constants=_row_constants,
            types=TYPES,
        )
        for name, function in (
            ("fwd", segmented_attention_fwd_kernel),
            ("decode", segmented_attention_fwd_kernel),
            ("bwd_dq", segmented_attention_bwd_dq_kernel),
        )
    ),
    *(
        AotKernel(
            name="segmented_attention_bwd_dkdv",
            part=source,
            function=segmented_attention_bwd_dkdv_kernel,
            constants=partial(_key_constants, source),
            types=PERSISTENT_TYPES if source == "persistent" else TYPES,
        )
        for source in ("token", "persistent", "memory")
    ),
)
