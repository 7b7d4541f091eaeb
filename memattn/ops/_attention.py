"""What the operators over tokens share: their three main inputs, autocast, bounds of sequences."""

from typing import TypeVar

import torch
from torch import Tensor

from memattn.checks import (
    check_floating,
    check_heads,
    check_int32_vector,
    check_like,
    check_rank,
    check_shape,
    check_tensor,
    must,
    values_to_check,
)

OptionalTensor = TypeVar("OptionalTensor", Tensor, Tensor | None)


def autocast(tensor: OptionalTensor) -> OptionalTensor:
    """The tensor in the dtype of active autocast; float64, integers and None stay."""
    if tensor is None or tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return tensor
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def autocast_each(*tensors: OptionalTensor) -> tuple[OptionalTensor, ...]:
    """The tensors, of which the first is given, in the dtype of the autocast of its device."""
    device = "cpu" if tensors[0] is None else tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(map(autocast, tensors))


def check_tensors(needed: dict[str, Tensor], optional: dict[str, Tensor | None]) -> None:
    """Raise TypeError for what is no tensor, and unless ``query`` has four axes."""
    for name, tensor in needed.items():
        check_tensor(name, tensor)
    for name, tensor in optional.items():
        if tensor is not None:
            check_tensor(name, tensor)
    check_rank("query", needed["query"], "B H T D")


def check_query_key_value(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise unless they are ``[B, H, T, D]``, ``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]``."""
    B, _, _, D = query.shape
    check_floating("query", query)
    check_rank("key", key, "B Hkv S D")
    Hkv, S = key.shape[1:3]
    check_shape("key", key, B=B, Hkv=None, S=None, D=D)
    check_heads(query, "key", key)
    check_shape("value", value, B=B, Hkv=Hkv, S=S, Dv=None)
    check_like("key", key, "query", query)
    check_like("value", value, "query", query)


def sequence_lengths(
    query: Tensor,
    S: int,
    cu_seqlens: Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    query_offset: int,
    wanted_for: object,
) -> list[int] | None:
    """Check the bounds of sequences or documents, and return how long each of them is.

    A sequence counts up to the last query, a document in full; sequences that are all alike are one
    entry. Values on a CUDA device are read once, if the caller needs them for a check
    (``wanted_for``, None for no check) or they depend on each other; lengths that are not read are
    None.
    """
    B, _, T, _ = query.shape
    if cu_seqlens is not None:
        check_int32_vector("cu_seqlens", cu_seqlens, query)
        if B != 1:
            must("query", "have B=1 with cu_seqlens", f"B={B}")
        if seq_start is not None or seq_end is not None:
            name = "seq_end" if seq_start is None else "seq_start"
            must(name, "be None with cu_seqlens", "a tensor")
        if cu_seqlens.numel() < 2:
            must("cu_seqlens", "have at least 2 entries", cu_seqlens.numel())
        if query_offset + T > S:
            must("query_offset", f"be at most S - T = {S - T} with cu_seqlens", query_offset)
        bounds = values_to_check(cu_seqlens, S, wanted_for)
        if bounds is None:
            return None
        if bounds[0] != 0 or bounds[-1] != S:
            must("cu_seqlens", f"begin with 0 and end with S={S}", bounds)
        if any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
            must("cu_seqlens", "rise", bounds)
        return [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    for name, bound in (("seq_start", seq_start), ("seq_end", seq_end)):
        if bound is not None:
            check_int32_vector(name, bound, query)
            check_shape(name, bound, B=B)
    end = query_offset + T
    if seq_start is None and seq_end is None:
        return [end] if B else []
    starts = ends = None
    # reading bounds waits for a CUDA device, so only where something depends on them
    if seq_start is not None and (seq_end is not None or wanted_for is not None):
        starts = values_to_check(seq_start, end, wanted_for)
        if starts is None:
            return None
    if seq_end is not None:
        ends = values_to_check(seq_end, end, wanted_for)
    if starts is None and ends is None:  # nor is B a number in a traced graph
        return None
    starts = [0] * B if starts is None else starts
    ends = [end] * B if ends is None else ends
    for first, last in zip(starts, ends, strict=True):
        if seq_end is not None and last < first:
            must("seq_end", f"be at least seq_start={first}", last)
    return [min(last, end) - first for first, last in zip(starts, ends, strict=True)]


def longest(lengths: list[int]) -> int:
    """The largest of the lengths, 0 for none.

    Not ``max(lengths, default=0)``, which torch.compile does not trace for symbolic lengths.
    """
    most = 0
    for length in lengths:
        most = max(most, length)
    return most
