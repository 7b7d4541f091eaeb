"""Options of a Titans layer: residuals between layers, long-term tokens, sizes of the memory."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memattn.checks import check_bool, check_int, must
from memattn.parts.base import PartConfig, Sizes
from memattn.parts.causal import AttentionPart

VALUES = "value_residual"  # [B, T, Hkv D], values of the first layer
REMEMBERED = "memory_output"  # [B, T, E], output of the previous layer's memory


class ValueMix(nn.Module):
    """Mixes values of the first layer into those of this one, by a gate of each token and head.

    Args:
        hidden_size: Features of the hidden states, ``E``.
        num_kv_heads: Value heads, ``Hkv``.

    Note:
        Source: Zhou et al. (2024), Value Residual Learning, https://arxiv.org/abs/2410.17897.
        Differs: the share of the first layer depends on the token, as in titans-pytorch.
    """

    def __init__(self, hidden_size: int, num_kv_heads: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, num_kv_heads)

    def forward(self, hidden_states: Tensor, value: Tensor, first: Tensor) -> Tensor:
        """Mix ``value`` and ``first``, both ``[B, T, Hkv D]``; ``hidden_states [B, T, E]``."""
        share = self.gate(hidden_states).sigmoid()[..., None]  # [B, T, Hkv, 1]
        heads = (*value.shape[:-1], share.shape[-2], -1)
        value, first = value.reshape(heads), first.to(value.dtype).reshape(heads)
        return (value + share * (first - value)).flatten(-2)


class LongTermTokens(nn.Module):
    """Learned tokens ``[M, E]`` before each segment; they take the place of normed hidden states.

    Args:
        num_tokens: Tokens, ``M``.
        hidden_size: Features, ``E``.
    """

    def __init__(self, num_tokens: int, hidden_size: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(num_tokens, hidden_size))
        nn.init.normal_(self.tokens, std=0.02)


@dataclass(frozen=True, kw_only=True)
class TitansOptions(AttentionPart):
    """The fields of ``TitansConfig`` for these options.

    Attributes:
        memory_heads: Heads of the memory. None means as many as the attention has; if these do not
            divide ``memory_dim``, ``memory_dim`` divided by the attention's head size.
        memory_head_dim: Features of a memory head; None means ``memory_dim / memory_heads``.
        memory_dim: Features of all memory heads together; None means ``hidden_size``, or
            ``memory_heads * memory_head_dim`` if both are given.
        value_residual: Whether values of the first layer's attention are mixed into those of later
            layers, with a learned share for each token and head.
        neural_mem_weight_residual: Whether a memory's keys and values are computed from its input
            plus the output of the previous layer's memory for the token.
        num_longterm_mem_tokens: Learned tokens before each segment of ``"mac"``. The memory is read
            for them as for tokens; all tokens of the segment attend to them and to these memory
            outputs.
    """

    variant: str = "mac"
    memory_heads: int | None = None
    memory_head_dim: int | None = None
    memory_dim: int | None = None
    value_residual: bool = False
    neural_mem_weight_residual: bool = False
    num_longterm_mem_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("memory_heads", "memory_head_dim", "memory_dim"):
            if getattr(self, name) is not None:
                check_int(f"attention.{name}", getattr(self, name), 1)
        for name in ("value_residual", "neural_mem_weight_residual"):
            check_bool(f"attention.{name}", getattr(self, name))
        check_int("attention.num_longterm_mem_tokens", self.num_longterm_mem_tokens, 0)
        if self.value_residual and self.variant == "lmm":
            without = "be False with variant='lmm', which has no attention"
            must("attention.value_residual", without, True)
        if self.num_longterm_mem_tokens and self.variant != "mac":
            without = f"be 0 with variant={self.variant!r}, which does not go segment by segment"
            must("attention.num_longterm_mem_tokens", without, self.num_longterm_mem_tokens)

    @property
    def carries(self) -> tuple[str, ...]:
        wanted = {VALUES: self.value_residual, REMEMBERED: self.neural_mem_weight_residual}
        return tuple(name for name, is_on in wanted.items() if is_on)

    @property
    def extras(self) -> dict[str, bool | int]:
        """The active residuals and tokens, by field name."""
        names = ("value_residual", "neural_mem_weight_residual", "num_longterm_mem_tokens")
        return {name: value for name in names if (value := getattr(self, name))}

    def check(self, sizes: Sizes, others: list[PartConfig]) -> None:
        self.memory_sizes(sizes)

    def memory_sizes(self, sizes: Sizes) -> tuple[int, int]:
        """Number of memory heads, and features of each.

        Raises:
            ValueError: If they do not give ``memory_dim``.
        """
        heads, D, whole = self.memory_heads, self.memory_head_dim, self.memory_dim
        if D is not None and whole is None:
            return heads or sizes.num_heads, D
        name = "hidden_size" if whole is None else "memory_dim"
        whole = sizes.hidden_size if whole is None else whole
        if heads is None:
            unit = D or sizes.head_dim
            even = D is None and whole % sizes.num_heads == 0
            heads = sizes.num_heads if even else whole // unit
            if not even and whole % unit:
                must("attention.memory_dim", f"be a multiple of the head size {unit}", whole)
        if whole % heads or (D is not None and heads * D != whole):
            fit = "divide" if D is None else f"have memory_head_dim={D} features and make up"
            must("attention.memory_heads", f"{fit} {name}={whole}", heads)
        return heads, whole // heads

    def add_options(self, module: Any, sizes: Sizes, layer: int) -> nn.Module:
        """Add the modules for these fields to a layer of ``memattn.parts.titans_layers``."""
        module.weight_residual = self.neural_mem_weight_residual
        module.value_residual = self.value_residual
        if self.value_residual and layer:
            module.value_mix = ValueMix(sizes.hidden_size, sizes.num_kv_heads)
        if self.num_longterm_mem_tokens:
            module.longterm = LongTermTokens(self.num_longterm_mem_tokens, sizes.hidden_size)
        return module
