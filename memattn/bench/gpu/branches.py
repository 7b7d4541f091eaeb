"""Branch attention cases of the stage "correct"."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memattn import ops

# sizes of the inputs, and options as a function of T
Options = Callable[[int], dict[str, Any]]
GROUPED = {"B": 2, "H": 4, "Hkv": 2, "F": 12, "A": 2}
PLAIN = {"B": 2, "H": 2, "Hkv": 2, "F": 3, "A": 2}
BRANCHES: dict[str, tuple[dict, Options]] = {
    "token": (GROUPED, lambda T: {"form": "token", "seq_start": [0, T // 5]}),
    # most rows are in the first branch
    "base": (PLAIN, lambda T: {"form": "base"}),
    "all": (PLAIN, lambda T: {"form": "all"}),
    "sequence": (GROUPED, lambda T: {"form": "sequence", "seq_end": [T, T - T // 5]}),
    "dense": (PLAIN, lambda T: {"form": "token", "is_causal": False}),
    "packed": (
        GROUPED | {"B": 1},
        lambda T: {"form": "token", "cu_seqlens": [0, T // 4, T // 4, T - 1, T]},
    ),
    "decode": (GROUPED, lambda T: {"form": "token", "query_offset": T - 3}),
}


def shrink_for_interpreter(sizes: dict[str, int]) -> dict[str, int]:
    """Sizes for the interpreter: fewer heads and branches."""
    return sizes | {"H": sizes["H"] // sizes["Hkv"], "Hkv": 1, "F": min(sizes["F"], 4)}


def attend(*, gates: Tensor, query: Tensor, **given: Any) -> Any:
    """``branch_attention``; casts the gates back to at least float32."""
    gates = gates.to(torch.promote_types(query.dtype, torch.float32))
    return ops.branch_attention(query, gates=gates, **given)


def build(
    sizes: dict[str, int],
    options: dict[str, Any],
    *,
    T: int,
    S: int,
    D: int,
    draw: Callable[..., Tensor],
) -> tuple[Callable[..., Any], dict[str, Tensor], dict[str, Any]]:
    """``attend``, its inputs by name and its options; ``draw(*shape)`` gives normal numbers."""
    B, H, Hkv, F, A = (sizes[name] for name in ("B", "H", "Hkv", "F", "A"))
    form = options.pop("form")
    if form == "all":
        A = F
    else:
        rows = 1 if form == "sequence" else T
        chosen = draw(B, rows, F).float().argsort(-1).int()[..., :A].expand(B, T, A)
        if form == "base":  # and one of the others
            chosen = torch.cat([chosen[..., :1] * 0, chosen[..., 1:].clamp(min=1)], -1)
        # some slots are empty
        options["branch_indices"] = chosen.masked_fill(draw(B, T, A) > 1.5, -1)
    tensors = {
        "query": draw(B, A, H, T, D),
        "key": draw(B, F, Hkv, S, D),
        "value": draw(B, F, Hkv, S, D),
        "gates": draw(B, T, A).sigmoid(),
    }
    return attend, tensors, options
