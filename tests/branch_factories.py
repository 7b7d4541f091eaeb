"""Inputs of branch attention, and its definition written out as loops."""

from typing import Any

import torch
from torch import Tensor


def make_branch_inputs(
    *,
    B: int = 2,
    A: int = 2,
    F: int = 3,
    H: int = 4,
    Hkv: int = 2,
    T: int = 37,
    S: int | None = None,
    D: int = 16,
    Dv: int | None = None,
    form: str = "token",
    empty: bool = False,
    fixed_gates: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Floating inputs, exact in bfloat16, and ``branch_indices``.

    ``form`` says who chooses branches: every ``"token"``, which may choose one twice, the whole
    ``"sequence"``, or nobody (``"all"``: all F are slots). ``empty`` leaves slots empty and gives
    some a gate of 0; ``fixed_gates`` are an option, without a gradient.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16).to(device, dtype)

    S = T if S is None else S
    A = F if form == "all" else A
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {
        "query": draw(B, A, H, T, D),
        "key": draw(B, F, Hkv, S, D),
        "value": draw(B, F, Hkv, S, D if Dv is None else Dv),
        "gates": (torch.rand(B, T, A, generator=generator) + 0.125).bfloat16().to(device, wide),
    }
    rows = (B, 1 if form == "sequence" else T, A)
    indices = torch.randint(F, rows, generator=generator).expand(B, T, A)
    if empty:
        indices = indices.masked_fill(torch.rand(B, T, A, generator=generator) < 0.3, -1)
        none = (torch.rand(B, T, A, generator=generator) < 0.2).to(device)
        tensors["gates"] = tensors["gates"].masked_fill(none, 0.0)
    options: dict[str, Any] = {}
    if form != "all":
        options["branch_indices"] = indices.to(device, torch.int32)
    if fixed_gates:
        options["gates"] = tensors.pop("gates")
    return tensors, options


def branch_attention_loops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    branch_indices: Tensor | None = None,
    is_causal: bool = True,
    query_offset: int = 0,
    **bounds: Tensor,
) -> tuple[Tensor, Tensor]:
    """One query of one head after the other: ``out`` and ``lse``."""
    B, A, H, T, D = query.shape
    group, S = H // key.shape[2], key.shape[3]
    out = query.new_zeros(B, A, H, T, value.shape[-1])
    lse = query.new_full((B, A, H, T), -torch.inf)
    for b in range(B):
        for t in range(T):
            i = t + query_offset
            first = int(bounds["seq_start"][b]) if "seq_start" in bounds else 0
            last = int(bounds["seq_end"][b]) if "seq_end" in bounds else S
            if "cu_seqlens" in bounds:
                ends = bounds["cu_seqlens"].tolist()
                first = max(end for end in ends if end <= i)
                last = min(end for end in ends if end > i)
            seen = range(max(first, 0), min(last, i + 1 if is_causal else last, S))
            if not first <= i < last or not seen:
                continue
            for a in range(A):
                f = a if branch_indices is None else int(branch_indices[b, t, a])
                if f < 0 or gates[b, t, a] == 0:
                    continue
                for h in range(H):
                    keys, values = (x[b, f, h // group, list(seen)] for x in (key, value))
                    scores = keys @ query[b, a, h, t] * D**-0.5
                    out[b, a, h, t] = gates[b, t, a] * (scores.softmax(0) @ values)
                    lse[b, a, h, t] = scores.logsumexp(0)
    return out, lse
