"""Rotary position embedding, with positions counted from the start of a sequence."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memattn.checks import check_int, must


class _Table(NamedTuple):
    """Cosines and sines of positions, and what they were computed from."""

    made_of: tuple[float, tuple[float, ...] | None, float]
    cos: Tensor
    sin: Tensor


class RotaryEmbedding(nn.Module):
    """Cosines and sines that rotate queries and keys by their position.

    Pair ``d`` of ``head_dim / 2`` is rotated by ``position * theta ** (-2 d / head_dim)``. Angles
    are computed at each call, in float32 or wider: there is no buffer that a cast to bfloat16 would
    round.

    Args:
        head_dim: Features of a head, ``D``; even.
        theta: Base of the frequencies.
        frequencies: Radians per position for each pair, instead of those of ``theta``; float32.
            ``make_rotary`` computes them for scaled positions.
        scale: Factor of cosines and sines, and so of both queries and keys.

    Raises:
        ValueError: If ``head_dim`` is odd, ``theta`` or ``scale`` is not positive, or there are not
            ``head_dim / 2`` frequencies.

    Note:
        Source: Su et al. (2021), https://arxiv.org/abs/2104.09864. As in Llama, feature ``d`` is
        paired with ``d + D/2`` and not with its neighbour.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float = 10000.0,
        *,
        frequencies: Sequence[float] | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_int("head_dim", head_dim, 2)
        if head_dim % 2:
            must("head_dim", "be even", head_dim)
        if not theta > 0:
            must("theta", "be positive", theta)
        if not scale > 0:
            must("scale", "be positive", scale)
        if frequencies is not None and len(frequencies) != head_dim // 2:
            must("frequencies", f"be {head_dim // 2} numbers", len(frequencies))
        self.head_dim = head_dim
        self.theta = theta
        self.frequencies = None if frequencies is None else tuple(frequencies)
        self.scale = scale
        self._table: _Table | None = None

    def forward(
        self, positions: Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[B or 1, 1, T, D/2]`` for integer ``positions [B or 1, T]``.

        They are float64 if ``dtype`` (of the hidden states) is float64, else float32.
        """
        wide = torch.promote_types(dtype, torch.float32)
        if self.frequencies is None:
            exponent = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=wide)
            frequency = self.theta ** (-exponent / self.head_dim)
        else:
            frequency = torch.tensor(self.frequencies, device=positions.device, dtype=wide)
        angle = positions[:, None, :, None].to(wide) * frequency
        cos, sin = angle.cos(), angle.sin()
        return (cos, sin) if self.scale == 1.0 else (cos * self.scale, sin * self.scale)

    def table(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0, 1, ... on the CPU, float32 ``[length or more, D/2]``.

        They are cached between calls: computing them takes longer than one token's attention.
        """
        table, made_of = self._table, (self.theta, self.frequencies, self.scale)
        if table is None or table.made_of != made_of or len(table.cos) < length:
            positions = torch.arange(max(256, 2 * length), device="cpu")
            cos, sin = self.forward(positions[None])
            self._table = table = _Table(made_of, cos[0, 0], sin[0, 0])
        return table.cos, table.sin

    def extra_repr(self) -> str:
        scaled = "" if self.frequencies is None else f", scaled frequencies, scale={self.scale}"
        return f"head_dim={self.head_dim}, theta={self.theta}{scaled}"


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``states [B, H, T, D]`` by ``cos`` and ``sin``; rounded once, to its dtype."""
    first, second = states.chunk(2, dim=-1)
    # not a difference, which rounds alike: its backward would negate a whole gradient
    rotated = torch.cat([first * cos + second * -sin, second * cos + first * sin], dim=-1)
    return rotated.to(states.dtype)


def sequence_positions(
    hidden_states: Tensor,
    *,
    offset: int = 0,
    seq_start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Positions of ``hidden_states [B, T, E]`` in their sequences, as the operators count them.

    Args:
        hidden_states: ``[B, T, E]``; only its shape and device are read.
        offset: Column of the first row, counted like ``seq_start``: the keys already cached.
        seq_start: int32 ``[B]``, columns where the sequences start. Rows before it, which are
            padding, get negative positions.
        cu_seqlens: int32 ``[n+1]``, bounds of packed documents; positions restart in each.

    Returns:
        int64 ``[B, T]``, or ``[1, T]`` without ``seq_start``.
    """
    T, device = hidden_states.shape[1], hidden_states.device
    columns = torch.arange(offset, offset + T, device=device)[None]  # [1, T]
    if cu_seqlens is not None:
        bounds = cu_seqlens.long()
        document = torch.searchsorted(bounds[1:], columns, right=True)
        return columns - bounds[document.clamp(max=bounds.numel() - 2)]
    if seq_start is not None:
        return columns - seq_start.long()[:, None]
    return columns
