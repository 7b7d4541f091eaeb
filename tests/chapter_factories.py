"""Inputs of chapter attention and its router, and both written out as loops."""

import math
from typing import Any

import torch
from torch import Tensor


def make_chapter_inputs(
    *,
    B: int = 2,
    H: int = 4,
    Hkv: int = 2,
    T: int = 37,
    D: int = 16,
    Dv: int | None = None,
    C: int = 7,
    M: int = 5,
    K: int = 3,
    N: int | None = None,
    weights: bool = True,
    empty: bool = False,
    repeats: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Floating inputs, exact in bfloat16, and ``chapter_indices``.

    ``N`` rows of slots, or one for each sequence without it. ``empty`` leaves slots empty and gives
    some no weight, ``repeats`` lets chapters stand in several slots.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator).to(torch.bfloat16)
        return values.to(device, dtype)

    rows = (B, 1) if N is None else (B, N)
    if repeats:
        indices = torch.randint(C, (*rows, K), generator=generator)
    else:
        indices = torch.rand(*rows, C, generator=generator).argsort(-1)[..., :K]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.rand(*rows, K, generator=generator).to(torch.bfloat16).to(wide) + 0.125
    if empty:
        indices = indices.masked_fill(torch.rand(*rows, K, generator=generator) < 0.3, -1)
        weight = weight.masked_fill(torch.rand(*rows, K, generator=generator) < 0.2, 0.0)
    if N is None:
        indices, weight = indices[:, 0], weight[:, 0]
    tensors = {
        "query": draw(B, H, T, D),
        "chapter_key": draw(C, Hkv, M, D),
        "chapter_value": draw(C, Hkv, M, D if Dv is None else Dv),
    }
    if weights:
        tensors["chapter_weights"] = weight.to(device)
    return tensors, {"chapter_indices": indices.to(device, torch.int32)}


def attend_by_loops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: list[list[list[tuple[int, float]]]],
    combine: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The definition query by query; ``slots[b][t]`` lists chapters and weights."""
    B, H, T, _ = query.shape
    G = H // key.shape[1]
    out = query.new_zeros(B, H, T, value.shape[-1])
    lse = query.new_full((B, H, T), -math.inf)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                parts = []
                for chapter, weight in slots[b][t]:
                    if chapter < 0 or (combine == "joint" and weight <= 0):
                        continue
                    scores = key[chapter, h // G] @ query[b, h, t] * scale
                    parts.append((weight, scores, value[chapter, h // G]))
                if not parts:
                    continue
                if combine == "joint":
                    biased = torch.cat([s + math.log(w) for w, s, _ in parts])
                    lse[b, h, t] = biased.logsumexp(0)
                    out[b, h, t] = biased.softmax(0) @ torch.cat([v for _, _, v in parts])
                else:
                    lse[b, h, t] = torch.cat([s for _, s, _ in parts]).logsumexp(0)
                    out[b, h, t] = sum(w * (s.softmax(0) @ v) for w, s, v in parts)
    return out, lse


def route_by_loops(
    hidden: Tensor, weight: Tensor, bias: Tensor, top_k: int, num_shared: int, scale: float
) -> tuple[list[list[int]], list[list[float]]]:
    """Chapters and weights of rows ``[R, E]``, one by one."""
    chapters, weights = [], []
    for row in hidden:
        z = [float(weight[c] @ row + bias[c]) for c in range(len(weight))]
        best = sorted(range(len(z)), key=lambda c: (-z[c], c))[:top_k]
        total = sum(math.exp(z[c] - z[best[0]]) for c in best)
        chapters.append([*range(num_shared), *(c + num_shared for c in best)])
        shares = [scale * math.exp(z[c] - z[best[0]]) / total for c in best]
        weights.append([1.0] * num_shared + shares)
    return chapters, weights
