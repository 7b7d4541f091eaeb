"""Specialists: attentions initialised as copies of a frozen one, and their projections."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.checks import check_int

PROJECTIONS = ("q", "k", "v", "out")


class AttentionWeights(NamedTuple):
    """Weights and biases of one attention, or of several stacked ones."""

    q: Tensor  # [F * E, E]
    k: Tensor  # [F * E, Ek]
    v: Tensor  # [F * E, Ev]
    out: Tensor  # [E, F * E]
    q_bias: Tensor | None  # [F * E]
    k_bias: Tensor | None  # [F * E]
    v_bias: Tensor | None  # [F * E]
    out_bias: Tensor | None  # [E], or [F, E]


def weights_of(attention: nn.MultiheadAttention) -> AttentionWeights:
    """The weights of PyTorch's attention, packed or not, as views."""
    q, k, v = _thirds(attention.in_proj_weight)
    if q is None or k is None or v is None:
        q, k, v = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
    q_bias, k_bias, v_bias = _thirds(attention.in_proj_bias)
    out = attention.out_proj
    return AttentionWeights(q, k, v, out.weight, q_bias, k_bias, v_bias, out.bias)


def _thirds(packed: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The part of the query, of the key and of the value."""
    if packed is None:
        return None, None, None
    query, key, value = packed.chunk(3)
    return query, key, value


def beside_each_other(
    branches: Sequence[AttentionWeights], projections: Collection[str] = PROJECTIONS
) -> AttentionWeights:
    """Stack the weights of several attentions for one product; the other fields are None."""

    def join(name: str) -> Tensor | None:
        found = [getattr(branch, name) for branch in branches]
        if found[0] is None or name.removesuffix("_bias") not in projections:
            return None
        return torch.stack(found) if name == "out_bias" else torch.cat(found, int(name == "out"))

    return AttentionWeights(*map(join, AttentionWeights._fields))  # type: ignore[arg-type]


class AttentionSpecialist(nn.Module):
    """The projections of a specialist, initialised as those of the base.

    Args:
        base: Weights of the base attention. They are copied; with ``rank`` they are not copied but
            used by ``weights``.
        rank: Rank of the change added to the base's weights; None trains full weights. Biases are
            always full.

    Raises:
        TypeError: If ``rank`` is no integer.
        ValueError: If it is below 1.
    """

    def __init__(self, base: AttentionWeights, rank: int | None = None) -> None:
        super().__init__()
        if rank is not None:
            check_int("rank", rank, 1)
        self.rank = rank
        for name in PROJECTIONS:
            weight, bias = getattr(base, name).detach(), getattr(base, f"{name}_bias")
            if rank is None:
                setattr(self, f"{name}_weight", nn.Parameter(weight.clone()))
            else:
                down = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
                nn.init.normal_(down, std=weight.shape[1] ** -0.5)
                setattr(self, f"{name}_down", down)
                setattr(self, f"{name}_up", nn.Parameter(weight.new_zeros(weight.shape[0], rank)))
            copied = None if bias is None else nn.Parameter(bias.detach().clone())
            self.register_parameter(f"{name}_bias", copied)

    def reset_parameters(self, std: float) -> None:
        """Draw weights with standard deviation ``std``, until ``copy``; biases are 0."""
        for name in PROJECTIONS:
            if self.rank is None:
                nn.init.normal_(getattr(self, f"{name}_weight"), std=std)
            else:
                down = getattr(self, f"{name}_down")
                nn.init.normal_(down, std=down.shape[1] ** -0.5)
                nn.init.zeros_(getattr(self, f"{name}_up"))
            if getattr(self, f"{name}_bias") is not None:
                nn.init.zeros_(getattr(self, f"{name}_bias"))

    def has_biases_of(self, base: AttentionWeights) -> bool:
        """Whether it has the same biases as the base."""
        return all(
            (getattr(self, f"{name}_bias") is None) == (getattr(base, f"{name}_bias") is None)
            for name in PROJECTIONS
        )

    @torch.no_grad()
    def copy(self, base: AttentionWeights) -> None:
        """Copy the base's weights into its full weights, unless transformers has loaded them."""
        for name in (*PROJECTIONS, *(f"{name}_bias" for name in PROJECTIONS)):
            own = getattr(self, name if name.endswith("bias") else f"{name}_weight", None)
            if own is not None and not getattr(own, "_is_hf_initialized", False):
                own.copy_(getattr(base, name))

    def weights(self, base: AttentionWeights | None) -> AttentionWeights:
        """Its weights; a low-rank specialist adds its change to those of ``base``."""
        if self.rank is None:
            weights = [getattr(self, f"{name}_weight") for name in PROJECTIONS]
        else:
            assert base is not None
            weights = [
                getattr(base, name) + getattr(self, f"{name}_up") @ getattr(self, f"{name}_down")
                for name in PROJECTIONS
            ]
        return AttentionWeights(*weights, *(getattr(self, f"{n}_bias") for n in PROJECTIONS))


def project(x: Tensor, weight: Tensor, bias: Tensor | None, n_branches: int, heads: int) -> Tensor:
    """Map ``[B, T, E]`` to heads of every branch, ``[B, F, H, T, D]``, in one product."""
    states = torch.unflatten(F.linear(x, weight, bias), -1, (n_branches, heads, -1))
    return states.permute(0, 2, 3, 1, 4)


def reduce_branches(out: Tensor, gates: Tensor, weights: AttentionWeights) -> Tensor:
    """Sum of the output projections of all branches, in one product.

    Args:
        out: ``[B, F, H, T, D]``, gated.
        gates: ``[B, T, F]``, factors of the biases.
        weights: Stacked weights of all branches.

    Returns:
        ``[B, T, E]`` in the dtype of ``out``.
    """
    out = F.linear(out.permute(0, 3, 1, 2, 4).flatten(2), weights.out)
    if weights.out_bias is None:
        return out
    return out + (gates @ weights.out_bias.to(gates.dtype)).to(out.dtype)


class Slots(NamedTuple):
    """The branches that tokens use; each token has A slots."""

    gates: Tensor  # [B, T, A]
    branches: Tensor | None  # int64 [B, T, A]; None means that slot a is branch a

    def take(self, query: Tensor) -> Tensor:
        """Select queries ``[B, A, H, T, D]`` from those of all branches, ``[B, F, H, T, D]``."""
        if self.branches is None:
            return query
        at = self.branches.transpose(1, 2)[:, :, None, :, None]  # [B, A, 1, T, 1]
        return query.gather(1, at.expand(-1, -1, *query.shape[2:3], -1, query.shape[-1]))

    def put(self, out: Tensor, n_branches: int) -> Tensor:
        """Scatter results ``[B, A, H, T, D]`` to all branches; unused branches get 0."""
        if self.branches is None:
            return out
        at = self.branches.transpose(1, 2)[:, :, None, :, None]
        every = out.new_zeros(out.shape[0], n_branches, *out.shape[2:])
        return every.scatter(1, at.expand_as(out), out)


def choose_slots(shares: Tensor, slots: int | None) -> Slots:
    """The ``slots`` branches with the largest gates ``[B, T, F]``; None: all branches."""
    if slots is None or slots >= shares.shape[-1]:
        return Slots(shares, None)
    order = shares.detach().sort(dim=-1, descending=True, stable=True).indices
    chosen = order[..., :slots]
    return Slots(shares.gather(-1, chosen), chosen)


def mix_with_base(base: Tensor, gates: Tensor, others: Tensor) -> Tensor:
    """Add the gated base and the specialists; tokens that use only the base get it unchanged.

    Args:
        base: ``[B, T, E]``.
        gates: ``[B, T, 1 + N]``; absent tokens, whose gates are all 0, get the base's output.
        others: ``[B, T, E]``, the sum of the gated specialists.
    """
    first = gates[..., :1]
    # unused outputs may be NaN, so they are not multiplied by 0
    mixed = torch.where(first == 0, 0.0, first * base) + others
    alone = (first == 1) | ~gates.any(-1, keepdim=True)
    return torch.where(alone, base, mixed.to(base.dtype))
