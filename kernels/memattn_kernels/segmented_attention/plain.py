"""Plain attention: tokens alone, dense or causal. Its kernels may read rows by tensor descriptors.

A descriptor is made on the host for each call. The copy engine of a card then fetches whole tiles,
which takes fewer instructions and registers than pointers do, and lets Triton put loads and
products into different warps. It asks for aligned rows, so pointers stay the path for all else.
"""

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memattn_kernels import configs
from memattn_kernels._launch import lookup
from memattn_kernels.signatures import SegmentedAttentionArgs

ALIGNMENT = 16  # bytes, of the first element and of every stride
MAX_ROWS = 2**31 - 1  # coordinates have 32 bits


def plain_form(args: SegmentedAttentionArgs) -> str:
    """``"_dense"`` or ``"_causal"`` if queries see tokens alone, all or those before; else none."""
    others = (
        *(args.persistent_key, args.memory_key, args.cu_seqlens, args.seq_start, args.seq_end),
        *(args.segment_len, args.window_size, args.softcap),
    )
    if any(other is not None for other in others):
        return ""
    return "_causal" if args.is_causal else "_dense"


def can_use_descriptors(*tensors: Tensor) -> bool:
    """Whether descriptors can read all of these tensors of rows: half precision, aligned."""
    return all(
        tensor.dtype != torch.float32
        and tensor.numel() > 0
        and tensor.stride(-1) == 1
        and tensor.data_ptr() % ALIGNMENT == 0
        and tensor.numel() // tensor.shape[-1] <= MAX_ROWS
        and all(
            stride > 0 and stride * tensor.element_size() % ALIGNMENT == 0
            for stride in tensor.stride()[:-1]
        )
        for tensor in tensors
    )


def tile_descriptor(rows: Tensor, block: int, width: int, end: int | None = None) -> Any:
    """Tiles ``[1, 1, block, width]`` of rows ``[B, H, T, D]``, zero from row ``end`` or T on."""
    shape = list(rows.shape)
    if end is not None:
        shape[2] = min(end, shape[2])
    return TensorDescriptor(rows, shape, list(rows.stride()), [1, 1, block, width])


def number_descriptor(numbers: Tensor, block: int) -> Any:
    """Tiles ``[block]`` of a row of numbers."""
    return TensorDescriptor(numbers, [numbers.numel()], [1], [block])


def plain_config(
    kernel: str, form: str, inputs: dict, whole: str | None
) -> tuple[str, dict[str, Any] | None]:
    """The table's entry for a form, and its options if it reads by descriptors.

    Where an entry asks for descriptors that these inputs cannot have, it is that of all forms, as a
    tile for descriptors may be none for pointers.

    Args:
        kernel: Name of the kernel without the form, such as ``"segmented_attention_fwd"``.
        form: That of ``plain_form``.
        inputs: Those of the kernels, by name.
        whole: Name of the length that must be whole tiles, ``"T"`` or ``"S"``, or None.
    """
    if not form:
        return kernel, None
    config = lookup(kernel + form, inputs["q_ptr"], inputs)
    if "descriptors" not in config:
        return kernel + form, None
    tensors = [inputs[name] for name in ("q_ptr", "k_ptr", "v_ptr", "do_ptr") if name in inputs]
    tile = {"T": "BLOCK_M", "S": "BLOCK_N"}
    is_whole = whole is None or inputs[whole] % config[tile[whole]] == 0
    if not is_whole or not can_use_descriptors(*tensors):
        return kernel, None
    options = {n: v for n, v in config.items() if n not in configs.DESCRIPTOR_OPTIONS}
    return kernel + form, options | {"IS_SPECIALIZED": "specialized" in config}


def _candidate(*values: int, **more: int) -> dict[str, int]:
    """A configuration with descriptors."""
    return dict(zip(configs.OPTIONS, values, strict=True)) | {"descriptors": 1} | more


_FORWARD = {
    64: (_candidate(128, 64, 8, 3, maxnreg=128), _candidate(128, 128, 4, 2, specialized=1)),
    128: (_candidate(128, 128, 8, 2), _candidate(128, 128, 4, 2, specialized=1)),
}
# without warps of their own for loads, ptxas serialises the products of the dense form
_BACKWARD = {width: (_candidate(64, 128, 4, 2, specialized=1),) for width in (64, 128)}
# tensor memory of sm_100 does not hold the specialised tiles of 128: they spill, or do not fit
_CANDIDATES = {
    "sm_90": {"fwd": _FORWARD, "bwd_dkdv": _BACKWARD},
    "sm_100": {
        "fwd": {64: _FORWARD[64], 128: _FORWARD[128][:1]},
        "bwd_dkdv": {64: _BACKWARD[64]},
    },
}
# what ``memattn bench --retune`` times on cards with a copy engine, by architecture, kernel and
# head dimension; all of it is in the ahead-of-time gate
CANDIDATES = {
    arch: {
        f"segmented_attention_{part}{form}": by_width
        for part, by_width in parts.items()
        for form in configs.PLAIN_FORMS
    }
    for arch, parts in _CANDIDATES.items()
}
