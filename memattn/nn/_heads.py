"""Projections shared by multi-head attention layers."""

from collections.abc import Callable
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from memattn.checks import check_int, check_rank, must


class KeyValueCache(Protocol):
    """Keys and values of earlier calls; ``memattn.models.MemAttnCache`` holds one per layer."""

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``[B, Hkv, T, D]`` and return all kept entries, ``[B, Hkv, S, D]``."""
        ...


class TokenCache(KeyValueCache, Protocol):
    """A cache that also keeps other tensors of earlier tokens."""

    def append(self, name: str, states: Tensor) -> Tensor:
        """Append ``[B, ..., T, F]`` and return all kept entries, ``[B, ..., S, F]``."""
        ...


class MultiHeadAttention(nn.Module):
    """Query, key, value and output projections without biases, for grouped queries.

    Args:
        hidden_size: Features of the hidden states, ``E``.
        num_heads: Query heads, ``H``.
        num_kv_heads: Key and value heads, ``Hkv``; None means ``num_heads``.
        head_dim: Features of a head, ``D``; None means ``hidden_size / num_heads``.

    Raises:
        ValueError: If heads do not divide or a size is below 1.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_int("hidden_size", hidden_size, 1)
        check_int("num_heads", num_heads, 1)
        if head_dim is None:
            if hidden_size % num_heads:
                must("hidden_size", f"be divisible by num_heads={num_heads}", hidden_size)
            head_dim = hidden_size // num_heads
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_int("head_dim", head_dim, 1)
        check_int("num_kv_heads", num_kv_heads, 1)
        if num_heads % num_kv_heads:
            must("num_kv_heads", f"divide num_heads={num_heads}", num_kv_heads)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def split_heads(
        self, hidden_states: Tensor, change_value: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query ``[B, H, T, D]``, key and value ``[B, Hkv, T, D]`` of ``[B, T, E]``.

        ``change_value`` replaces the values ``[B, T, Hkv D]`` by its result.
        """
        check_rank("hidden_states", hidden_states, "B T E")
        projected = [proj(hidden_states) for proj in (self.q_proj, self.k_proj, self.v_proj)]
        if change_value is not None:
            projected[2] = change_value(projected[2])
        query, key, value = (
            rearrange(x, "b t (h d) -> b h t d", d=self.head_dim) for x in projected
        )
        return query, key, value

    def merge_heads(self, out: Tensor) -> Tensor:
        """Map ``[B, H, T, D]`` to ``[B, T, E]``."""
        return self.o_proj(rearrange(out, "b h t d -> b t (h d)"))


class PersistentAttention(MultiHeadAttention):
    """``MultiHeadAttention`` with persistent keys and values, which every query sees.

    They are initialised small, so that at first they change the output little, and have no
    position.

    Args:
        hidden_size: As in ``MultiHeadAttention``, with the three that follow.
        num_heads: Query heads, ``H``.
        num_kv_heads: Key and value heads, ``Hkv``.
        head_dim: Features of a head, ``D``.
        num_persistent_tokens: Persistent keys, ``P``.
    """

    persistent_key: nn.Parameter | None  # [Hkv, P, D]
    persistent_value: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        num_persistent_tokens: int = 0,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim)
        check_int("num_persistent_tokens", num_persistent_tokens, 0)
        self.num_persistent_tokens = num_persistent_tokens
        if num_persistent_tokens:
            shape = (self.num_kv_heads, num_persistent_tokens, self.head_dim)
            self.persistent_key = nn.Parameter(torch.empty(shape))
            self.persistent_value = nn.Parameter(torch.empty(shape))
            nn.init.normal_(self.persistent_key, std=0.02)
            nn.init.normal_(self.persistent_value, std=0.02)
        else:
            self.register_parameter("persistent_key", None)
            self.register_parameter("persistent_value", None)
