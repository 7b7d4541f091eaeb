"""Which slots are active, and what they see: torch operations of static shape.

Nothing here waits for a device, so it can be captured in a CUDA graph. An *entry* is an active
slot, numbered as in ``gates [B, T, A]``. A *unit* is a branch of one sequence or packed document:
its entries follow each other and its keys do, so every row of a unit sees them from the first on.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from memattn_kernels._common import NO_END
from memattn_kernels.signatures import BranchAttentionArgs


class BranchIndex(NamedTuple):
    """The slots of the batch, by sequence, branch, token, slot; inactive ones last."""

    entry: Tensor  # int32 [B * T * A]
    bounds: Tensor  # int32 [n_units + 1]: where the entries of a unit begin


def n_documents(args: BranchAttentionArgs) -> int:
    """Documents of a sequence, one if they are not packed."""
    return 1 if args.cu_seqlens is None else args.cu_seqlens.numel() - 1


def n_units(args: BranchAttentionArgs) -> int:
    """Branches of all sequences or documents."""
    return args.key.shape[0] * args.key.shape[1] * n_documents(args)


def _sequences(args: BranchAttentionArgs, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end of the sequence or document of each position, ``[B or 1, n or 1]``."""
    if args.cu_seqlens is not None:
        bounds = args.cu_seqlens
        document = torch.searchsorted(bounds[1:], positions, right=True)
        document = document.clamp(max=bounds.numel() - 2)[None]
        return bounds[document], bounds[document + 1]
    start, end = positions.new_zeros(1, 1), positions.new_full((1, 1), NO_END.value)
    if args.seq_start is not None:
        start = args.seq_start[:, None]
    if args.seq_end is not None:
        end = args.seq_end[:, None]
    return start, end


def keys_of_tokens(args: BranchAttentionArgs) -> tuple[Tensor, Tensor]:
    """First key that each token sees and the one after its last, int32 ``[B, T]`` each.

    A token outside of its sequence sees none: its last is 0.
    """
    B, T, S = args.query.shape[0], args.query.shape[3], args.key.shape[3]
    i = torch.arange(T, device=args.query.device, dtype=torch.int32) + args.query_offset
    start, end = _sequences(args, i)
    last = (i + 1).clamp(max=S) if args.is_causal else torch.full_like(i, S)
    last = torch.minimum(last, end)
    last = torch.where((i >= start) & (i < end), last, 0)
    return start.clamp(min=0).expand(B, T).contiguous(), last.expand(B, T).contiguous()


def tokens_of_keys(args: BranchAttentionArgs) -> tuple[Tensor, Tensor]:
    """First token that sees each key and the one after the last, int32 ``[B, S]`` each."""
    B, T, S = args.query.shape[0], args.query.shape[3], args.key.shape[3]
    j = torch.arange(S, device=args.query.device, dtype=torch.int32)
    start, end = _sequences(args, j)
    first = torch.maximum(start, j) if args.is_causal else start + 0 * j
    last = torch.where((j >= start) & (j < end), end, 0)
    return tuple(
        (x - args.query_offset).clamp(0, T).expand(B, S).contiguous() for x in (first, last)
    )


def _places(args: BranchAttentionArgs) -> Tensor:
    """By what slots are sorted: branch of the sequence, then token; int64 ``[B, T, A]``."""
    (B, F), (_, T, A) = args.key.shape[:2], args.gates.shape
    device = args.gates.device
    of_batch = torch.arange(B, device=device)[:, None, None]
    branch = torch.arange(A, device=device) if args.indices is None else args.indices
    first, last = keys_of_tokens(args)
    active = (args.gates != 0) & (first < last)[..., None]  # NaN is a gate that is open
    active &= (branch >= 0) & (branch < F)
    place = (of_batch * F + branch) * T + torch.arange(T, device=device)[:, None]
    return torch.where(active, place, B * F * T)


def fill_index(index: BranchIndex, args: BranchAttentionArgs) -> None:
    """Sort the slots."""
    B, F, T = *args.key.shape[:2], args.query.shape[3]
    places, entry = _places(args).flatten().sort(stable=True)
    index.entry.copy_(entry)
    first = places.new_zeros(1)
    if args.cu_seqlens is not None:
        first = (args.cu_seqlens[:-1] - args.query_offset).clamp(0, T)
    unit = torch.arange(B * F, device=places.device)[:, None] * T + first
    ends = torch.cat([unit.flatten(), places.new_full((1,), B * F * T)])
    index.bounds.copy_(torch.searchsorted(places, ends))


def entries_before(args: BranchAttentionArgs, index: BranchIndex) -> Tensor:
    """Where the entries of each branch and token begin, int32 ``[B * F * T + 1]``."""
    B, F, T = *args.key.shape[:2], args.query.shape[3]
    places = _places(args).flatten()[index.entry]
    everywhere = torch.arange(B * F * T + 1, device=places.device)
    return torch.searchsorted(places, everywhere, out_int32=True)
