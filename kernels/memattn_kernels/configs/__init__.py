"""Tile lengths and launch options, pinned per architecture: nothing is timed at import or call.

One JSON file per architecture stands beside this file (``sm_90.json``). ``memattn bench --retune``
writes such a file for the card at hand, and ``load`` puts it in the place of the shipped one. A
card without a file of its own takes that of a relative.
"""

import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from memattn_kernels import recording
from memattn_kernels._common import IS_INTERPRETED
from memattn_kernels._products import TF32_PRODUCTS

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
WIDTHS = (64, 128, 256)
DTYPE_CLASSES = ("half", "float")
OPTIONS: tuple[str, ...] = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
# products of the router and of the neural memory have a tile of what they sum over, too
PRODUCT_OPTIONS: tuple[str, ...] = (*OPTIONS, "BLOCK_K")
WITH_PRODUCTS = ("chapter_router", "neural_memory")
# a cap on the registers of one thread, so that more programs fit a multiprocessor; NVIDIA only
OPTIONAL: tuple[str, ...] = ("maxnreg",)
LAUNCH_OPTIONS: tuple[str, ...] = ("num_warps", "num_stages", *OPTIONAL)
# float32 products by as many TF32 products on the tensor cores; NVIDIA only
FLOAT_OPTIONS: tuple[str, ...] = (TF32_PRODUCTS,)
# plain attention, whose rows may come by tensor descriptors, from warps of their own if specialized
PLAIN_FORMS = ("_dense", "_causal")
DESCRIPTOR_OPTIONS: tuple[str, ...] = ("descriptors", "specialized")
# keys of a part, where programs share the keys of a row
DECODE_OPTIONS: tuple[str, ...] = ("part",)
WITH_PARTS = "segmented_attention_decode"
MAX_BLOCK = 256
# smallest and largest value; for tile lengths these are 16 and MAX_BLOCK
LIMITS = {"num_stages": (1, 16), "num_warps": (1, 16), "maxnreg": (32, 255),
          "descriptors": (1, 1), "specialized": (1, 1), "part": (64, 2**20),
          TF32_PRODUCTS: (3, 3)}  # fmt: skip
# at most this many queries run as "decode", on tiles of 16 queries
DECODE_LENGTH = 16
# small tiles, so that small tests cross their borders
INTERPRETED = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 1, "num_stages": 1}
# a mask has borders of its own, and its tiles of 128 rows take many steps
INTERPRETED_MASKS = INTERPRETED | {"BLOCK_M": 64, "BLOCK_N": 32}
INTERPRETED_PRODUCTS = INTERPRETED | {"BLOCK_N": 32, "BLOCK_K": 16}
INTERPRETED_MEMORY = INTERPRETED_PRODUCTS | {"BLOCK_M": 16, "BLOCK_K": 32}

_loaded: dict[str, dict] = {}


def lookup(kernel: str, tensor: Tensor, width: int) -> dict[str, int]:
    """The configuration of a kernel.

    Args:
        kernel: Name of the kernel, such as ``"segmented_attention_fwd"``.
        tensor: An input; its device and dtype choose the table.
        width: The largest padded head dimension.

    Returns:
        Tile lengths ``BLOCK_M`` and ``BLOCK_N``, of products also ``BLOCK_K``, and options of the
        launch: ``num_warps``, ``num_stages`` and perhaps ``maxnreg``; of float32 perhaps
        ``tf32_products``; of plain attention perhaps ``descriptors`` and ``specialized``, which are
        1 where they are there; of few queries perhaps ``part``.
    """
    if IS_INTERPRETED:
        if kernel.startswith(WITH_PRODUCTS):
            is_memory = kernel.startswith("neural_memory")
            return INTERPRETED_MEMORY if is_memory else INTERPRETED_PRODUCTS
        return INTERPRETED_MASKS if kernel.startswith("task_masked") else INTERPRETED
    return table(architecture(tensor.device))[kernel][_bucket(width)][dtype_class(tensor.dtype)]


def options_of(kernel: str) -> tuple[str, ...]:
    """What the configuration of a kernel must have."""
    return PRODUCT_OPTIONS if kernel.startswith(WITH_PRODUCTS) else OPTIONS


def dtype_class(dtype: torch.dtype) -> str:
    """``"float"`` for float32, which runs with small tiles, or ``"half"``."""
    return "float" if dtype == torch.float32 else "half"


def _bucket(width: int) -> str:
    return str(next(limit for limit in WIDTHS if width <= limit))


def device_architecture(device: torch.device) -> str:
    """The name of the architecture of a card, such as ``"sm_90"`` or ``"gfx942"``."""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def architecture(device: torch.device) -> str:
    """The architecture whose table serves this card: its own, or that of a relative."""
    name = device_architecture(device)
    if name in _loaded or name in ARCHITECTURES:
        return name
    if name.startswith("gfx"):
        return "gfx942"
    # sm_103 is like sm_100; consumer cards have less shared memory, as sm_80
    return "sm_100" if name.startswith("sm_10") else "sm_80"


def table(name: str) -> dict:
    """The table of an architecture: kernel, head dimension and dtype class to a configuration."""
    if name not in _loaded:
        _loaded[name] = read(Path(__file__).with_name(f"{name}.json"))
    return _loaded[name]


def read(path: str | Path) -> dict:
    """Read and check a table.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a table of configurations; the message names the entry.
    """
    try:
        content = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be a JSON file, got an error: {error}") from error
    kernels = content.get("kernels") if isinstance(content, dict) else None
    if not isinstance(kernels, dict):
        raise ValueError(f'{path} must hold an object "kernels", got {type(kernels).__name__}')
    is_amd = str(content.get("architecture")).startswith("gfx")
    for kernel, widths in kernels.items():
        for width in map(str, WIDTHS):
            for kind in DTYPE_CLASSES:
                entry = f"{path}: {kernel}, {width}, {kind}"
                optional = () if is_amd else OPTIONAL
                if not is_amd and kind == "float" and not kernel.startswith(WITH_PRODUCTS):
                    optional += FLOAT_OPTIONS
                if kernel == WITH_PARTS:
                    optional += DECODE_OPTIONS
                if not is_amd and kernel.endswith(PLAIN_FORMS):
                    optional += DESCRIPTOR_OPTIONS
                _check(entry, widths.get(width, {}).get(kind), options_of(kernel), optional)
    return kernels


def _check(entry: str, config: object, needed: tuple[str, ...], optional: tuple[str, ...]) -> None:
    """Raise ValueError unless this is a configuration that a kernel can be launched with."""
    known = needed + optional
    if not isinstance(config, dict) or not set(needed) <= config.keys() <= set(known):
        also = f" and perhaps {', '.join(optional)}" if optional else ""
        raise ValueError(f"{entry} must have {', '.join(needed)}{also}, got {config}")
    for option, value in config.items():
        low, high = LIMITS.get(option, (16, MAX_BLOCK))
        any_integer = option not in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps")
        fits = any_integer or (isinstance(value, int) and value & (value - 1) == 0)
        if not isinstance(value, int) or not fits or not low <= value <= high:
            kind = "an integer" if any_integer else "a power of two"
            raise ValueError(f"{entry}: {option} must be {kind} in {low} ... {high}, got {value}")
    # with more warps Triton ignores it, with pointers it aborts
    if "specialized" in config and ("descriptors" not in config or config["num_warps"] != 4):
        raise ValueError(f"{entry}: specialized must have descriptors and 4 warps, got {config}")


def load(path: str | Path) -> str:
    """Use a table that ``memattn bench --retune`` wrote, in this process.

    Args:
        path: The JSON file.

    Returns:
        The architecture that the table is for.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a complete table.
    """
    kernels = read(path)
    name = json.loads(Path(path).read_text()).get("architecture")
    if not isinstance(name, str):
        raise ValueError(f'{path} must name its "architecture", got {name}')
    missing = sorted(table("sm_80").keys() - kernels.keys())
    if missing:
        raise ValueError(f"{path} must have an entry for {missing[0]}, got {sorted(kernels)}")
    _loaded[name] = kernels
    architecture.cache_clear()
    recording.forget()
    return name
