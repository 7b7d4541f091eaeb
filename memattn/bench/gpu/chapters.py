"""Chapter attention and chapter router cases of the stage "correct"."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memattn import ops
from memattn.reference.chapter_quantization import quantize_rows

ROUTING_BLOCK_LEN = 64  # tokens of a routing block
# sizes of the inputs, and options as a function of T
Options = Callable[[int], dict[str, Any]]
GROUPED = {"B": 2, "H": 4, "Hkv": 2, "C": 12, "M": 70, "K": 3}
PLAIN = GROUPED | {"H": 2, "M": 128}
ATTENTION: dict[str, tuple[dict, Options]] = {
    "token": (GROUPED, lambda T: {"form": "token"}),
    "token, independent": (PLAIN, lambda T: {"form": "token", "combine": "independent"}),
    # every token selects the first two chapters, whose rows are split into parts
    "shared": (PLAIN, lambda T: {"form": "shared"}),
    "shared, independent": (
        GROUPED | {"M": 150},
        lambda T: {"form": "shared", "combine": "independent"},
    ),
    "block": (GROUPED, lambda T: {"form": "block", "seq_start": [0, T // 5]}),
    "block, independent": (GROUPED, lambda T: {"form": "block", "combine": "independent"}),
    "sequence": (PLAIN, lambda T: {"form": "sequence", "seq_end": [T, T - T // 5]}),
    "sequence, long chapters": (
        GROUPED | {"M": 300},
        lambda T: {"form": "sequence", "combine": "independent"},
    ),
    "no weights": (PLAIN | {"M": 33}, lambda T: {"form": "token", "weights": False}),
    "int8": (GROUPED, lambda T: {"form": "token", "bits": 8}),
    "int4": (PLAIN, lambda T: {"form": "sequence", "bits": 4}),
    "int4, independent": (
        GROUPED,
        lambda T: {"form": "block", "bits": 4, "combine": "independent"},
    ),
    "decode": (GROUPED, lambda T: {"form": "token", "query_offset": T - 3}),
    "decode, int8": (
        GROUPED,
        lambda T: {"form": "sequence", "bits": 8, "query_offset": T - 3},
    ),
}
ROUTER: dict[str, tuple[dict, Options]] = {
    "shared and invalid": ({"B": 2, "C": 48}, lambda T: {"top_k": 5, "num_shared": 1}),
    "sum": (
        {"B": 2, "C": 300},
        lambda T: {"top_k": 8, "normalisation": "sum", "routed_scale": 2.5},
    ),
    "temperature": ({"B": 1, "C": 9}, lambda T: {"top_k": 1, "temperature": 0.7}),
}


def shrink_for_interpreter(sizes: dict[str, int]) -> dict[str, int]:
    """Sizes for the interpreter: fewer chapters, still of several tiles."""
    return sizes | ({"C": 5, "M": sizes["M"] // 4} if "M" in sizes else {"C": 9})


class Routed(NamedTuple):
    """The router's differentiable results."""

    weights: Tensor
    load_balance_loss: Tensor
    auxiliary_loss: Tensor
    z_loss: Tensor


def attend(*, chapter_weights: Tensor | None = None, query: Tensor, **given: Any) -> Any:
    """``chapter_attention``; casts the weights back to at least float32."""
    if chapter_weights is not None:
        chapter_weights = chapter_weights.to(torch.promote_types(query.dtype, torch.float32))
    return ops.chapter_attention(query, chapter_weights=chapter_weights, **given)


def route(*, hidden: Tensor, weight: Tensor, bias: Tensor, **given: Any) -> Routed:
    """``chapter_router``; returns its differentiable results."""
    found = ops.chapter_router(hidden, weight, bias, **given)._asdict()
    return Routed(*(found[name] for name in Routed._fields))


def build_attention(
    sizes: dict[str, int], options: dict[str, Any], *, T: int, D: int, draw: Callable[..., Tensor]
) -> tuple[Callable[..., Any], dict[str, Tensor], dict[str, Any]]:
    """``attend``, its inputs by name and its options; ``draw(*shape)`` gives normal numbers."""
    B, H, Hkv, C, M, K = (sizes[name] for name in ("B", "H", "Hkv", "C", "M", "K"))
    form, bits = options.pop("form"), options.pop("bits", None)
    rows = {"sequence": (), "block": (-(-T // ROUTING_BLOCK_LEN),)}.get(form, (T,))
    tensors = {"query": draw(B, H, T, D)}
    bank = {"chapter_key": draw(C, Hkv, M, D), "chapter_value": draw(C, Hkv, M, D)}
    order = draw(B, *rows, C).float().argsort(-1).int()
    if form == "shared":
        first = order[..., :2] * 0 + torch.arange(2, device=order.device, dtype=torch.int32)
        order = torch.cat([first, order], -1)
    indices = order[..., :K].contiguous()
    # some slots are empty
    options["chapter_indices"] = indices.masked_fill(draw(*indices.shape) > 1.5, -1)
    if form == "block":
        options["routing_block"] = ROUTING_BLOCK_LEN
    if options.pop("weights", True):
        tensors["chapter_weights"] = draw(*indices.shape).abs() + 0.125
    if bits is None:
        return attend, tensors | bank, options
    for name, rows_of_bank in bank.items():
        codes, scale = quantize_rows(rows_of_bank.float(), bits)
        options |= {name: codes, f"{name.removeprefix('chapter_')}_scale": scale}
    return attend, tensors, options


def build_router(
    sizes: dict[str, int], options: dict[str, Any], *, T: int, D: int, draw: Callable[..., Tensor]
) -> tuple[Callable[..., Any], dict[str, Tensor], dict[str, Any]]:
    """``route``, its inputs by name (logits near 1) and its options."""
    B, C = sizes["B"], sizes["C"]
    weight = draw(C, D) * 2.0 ** -round(D.bit_length() / 2)
    if "num_shared" in options:
        options["valid"] = draw(B, T) < 1.0
    return route, {"hidden": draw(B, T, D), "weight": weight, "bias": draw(C)}, options
