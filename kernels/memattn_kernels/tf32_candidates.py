"""Configurations with three TF32 products for one of float32, which no table ships yet.

``memattn bench --retune`` times them on NVIDIA cards beside products without tensor cores. It takes
none whose results leave the error budget. The ahead-of-time gate compiles them for plain attention:
what is missing here spills registers there.
"""

from memattn_kernels import configs
from memattn_kernels._products import TF32_PRODUCTS

Config = dict[str, int]


def _configs(*candidates: tuple[int, ...]) -> tuple[Config, ...]:
    options = (*configs.OPTIONS, TF32_PRODUCTS)
    return tuple(dict(zip(options, (*values, 3), strict=True)) for values in candidates)


# by architecture, part of a kernel's name and head dimension
CANDIDATES: dict[str, dict[str, dict[int, tuple[Config, ...]]]] = {
    "sm_80": {
        "fwd": {64: _configs((128, 32, 8, 2), (64, 32, 4, 2)), 128: _configs((16, 32, 4, 1))},
        "bwd_dq": {64: _configs((32, 16, 4, 1))},
        "bwd_dkdv": {64: _configs((16, 32, 4, 1))},
    },
    "sm_90": {
        "fwd": {64: _configs((128, 32, 8, 2), (64, 32, 4, 2), (128, 64, 8, 2))},
        "bwd_dq": {64: _configs((32, 32, 4, 1), (32, 16, 4, 1)), 128: _configs((16, 16, 4, 1))},
        "bwd_dkdv": {
            64: _configs((32, 128, 8, 1), (16, 128, 8, 1), (16, 64, 4, 1)),
            128: _configs((16, 32, 8, 1)),
        },
    },
    "sm_100": {
        "fwd": {64: _configs((128, 32, 8, 2), (64, 32, 4, 2), (128, 64, 8, 2))},
        "bwd_dq": {64: _configs((32, 16, 4, 1))},
        "bwd_dkdv": {64: _configs((16, 32, 4, 1))},
    },
}


def candidates(arch: str, kernel: str, head_dim: int) -> tuple[Config, ...]:
    """What may be timed for a kernel in float32; nothing where products have other options."""
    if kernel.startswith(configs.WITH_PRODUCTS) or kernel.endswith("decode"):
        return ()
    part = next((part for part in ("bwd_dkdv", "bwd_dq") if part in kernel), "fwd")
    return CANDIDATES.get(arch, {}).get(part, {}).get(head_dim, ())
