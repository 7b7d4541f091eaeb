"""Description of a base attention of any class, as specialists need it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from memattn.nn._heads import MultiHeadAttention
from memattn.nn.attention_specialist import AttentionWeights


class BaseAttention(NamedTuple):
    """Projections of an attention, the norms of its heads and its scale."""

    weights: AttentionWeights  # keys and values are [Hkv D, E]
    num_heads: int
    num_kv_heads: int
    q_norm: nn.Module | None = None  # norm of a query head
    k_norm: nn.Module | None = None  # norm of a key head
    scale: float | None = None  # of the scores; None means 1 / sqrt(head_dim)


# by class (subclasses included): a function that describes its attentions, or None without
# projections
BASES: dict[type[nn.Module], Callable[[Any], BaseAttention | None]] = {}


def base_attention(module: nn.Module) -> BaseAttention | None:
    """Description of an attention for specialists; None for unknown classes."""
    for kind in type(module).__mro__:
        if kind in BASES:
            return BASES[kind](module)
    return None


def _of_heads(module: MultiHeadAttention) -> BaseAttention:
    q, k, v, out = module.q_proj, module.k_proj, module.v_proj, module.o_proj
    weights = AttentionWeights(*map(_matrix_of, (q, k, v, out)), *(None,) * 4)
    return BaseAttention(weights, module.num_heads, module.num_kv_heads)


def _matrix_of(layer: nn.Module) -> Any:
    """The weight of a linear layer without bias, with the change of an adapter such as LoRA."""
    if isinstance(layer, nn.Linear):
        return layer.weight
    held: Any = layer
    return layer(torch.eye(held.in_features, dtype=held.weight.dtype, device=held.weight.device)).mT


BASES[MultiHeadAttention] = _of_heads
