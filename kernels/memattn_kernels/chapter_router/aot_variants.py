"""What the ahead-of-time gate compiles of the router of chapters.

Every optional argument is there. Products are compiled in half precision and in float32; rows of
logits are float32 whatever the inputs, here of 4096 chapters.
"""

from functools import partial

import triton

from memattn_kernels.aot_kernel import AotKernel
from memattn_kernels.chapter_router import products, rows
from memattn_kernels.chapter_router.launch import SELECT_ROWS, row_warps

N_CHAPTERS = 4096
TYPES = dict.fromkeys(
    ("z_ptr", "d_weights_ptr", "weights_ptr", "lse_ptr", "residual_ptr", "entropy_ptr", "sums_ptr",
     "gamma_ptr", "z_factor_ptr", "dw_ptr", "db_ptr"),
    "*fp32",
) | {"valid_ptr": "*u8", "indices_ptr": "*i32", "routed_scale": "fp32"}  # fmt: skip
ROW_TILES = {"float": {"num_warps": row_warps(N_CHAPTERS), "num_stages": 1}}


def _constants(
    function: triton.JITFunction, head_dim: int, dtype: str, config: dict[str, int]
) -> dict[str, object]:
    """The compile-time arguments."""
    constants: dict[str, object] = {
        "ADD": True,
        "PRECISION": "ieee" if dtype == "float32" else "half",
        "ROWS": SELECT_ROWS,
        "BLOCK_C": N_CHAPTERS,
        # of the products a tile length, of rows the slots
        "BLOCK_K": config.get("BLOCK_K", 64),
        **{name: config[name] for name in ("BLOCK_M", "BLOCK_N") if name in config},
    }
    return {name: value for name, value in constants.items() if name in function.arg_names}


KERNELS = tuple(
    AotKernel(
        name=f"chapter_router_{name}",
        function=function,
        constants=partial(_constants, function),
        pinned=tiles,
        types=TYPES,
    )
    for name, function, tiles in (
        ("logits", products.chapter_router_logits_kernel, None),
        ("d_hidden", products.chapter_router_d_hidden_kernel, None),
        ("d_weight", products.chapter_router_d_weight_kernel, None),
        ("select", rows.chapter_router_select_kernel, ROW_TILES),
        ("gradient", rows.chapter_router_gradient_kernel, ROW_TILES),
    )
)
