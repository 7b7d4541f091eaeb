"""Position embeddings of two coordinates: a token's segment and its index in the segment."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.checks import check_int


class AxialPositions(nn.Module):
    """Learned embedding of the segment plus learned embedding of the index in the segment.

    Args:
        hidden_size: Features of the hidden states, ``E``.
        segment_len: Tokens in a segment, ``L``.
        max_positions: Largest number of positions.

    Example:
        >>> AxialPositions(64, segment_len=16, max_positions=100)(torch.arange(100)[None]).shape
        torch.Size([1, 100, 64])
    """

    def __init__(self, hidden_size: int, segment_len: int, max_positions: int) -> None:
        super().__init__()
        check_int("hidden_size", hidden_size, 1)
        check_int("segment_len", segment_len, 1)
        check_int("max_positions", max_positions, 1)
        self.segment_len = segment_len
        self.segments = nn.Embedding(-(-max_positions // segment_len), hidden_size)
        self.places = nn.Embedding(min(segment_len, max_positions), hidden_size)

    def forward(self, positions: Tensor) -> Tensor:
        """Map int64 ``positions [B, T]``, each below ``max_positions``, to ``[B, T, E]``."""
        segment = torch.div(positions, self.segment_len, rounding_mode="floor")
        return self.segments(segment) + self.places(positions % self.segment_len)


class ContinuousAxialPositions(nn.Module):
    """The same embeddings from two small networks, one per coordinate, for sequences of any length.

    Each network has one hidden layer with SiLU. One gets the index in the segment divided by the
    segment length, the other ``log(1 + segment)``, which stays small for long texts.

    Args:
        hidden_size: Features of the hidden states, and of the hidden layers, ``E``.
        segment_len: Tokens in a segment, ``L``.

    Note:
        Source: ``ContinuousAxialPositionalEmbedding`` of axial-positional-embedding,
        https://github.com/lucidrains/axial-positional-embedding. Differs: there the networks get
        the segment number and the index themselves.
    """

    def __init__(self, hidden_size: int, segment_len: int) -> None:
        super().__init__()
        check_int("hidden_size", hidden_size, 1)
        check_int("segment_len", segment_len, 1)
        self.segment_len = segment_len
        # [2, ...]: for the segment, for the index in it
        self.in_weight = nn.Parameter(torch.empty(2, hidden_size))
        self.in_bias = nn.Parameter(torch.empty(2, hidden_size))
        self.out_weight = nn.Parameter(torch.empty(2, hidden_size, hidden_size))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """New weights; outputs are about as large as embeddings with standard deviation ``std``."""
        nn.init.uniform_(self.in_weight, -1.0, 1.0)
        nn.init.uniform_(self.in_bias, -1.0, 1.0)
        nn.init.normal_(self.out_weight, std=std * self.out_weight.shape[-1] ** -0.5)

    def forward(self, positions: Tensor) -> Tensor:
        """Map int64 ``positions [B, T]`` to ``[B, T, E]``."""
        wide = torch.promote_types(self.in_weight.dtype, torch.float32)
        segment = torch.div(positions, self.segment_len, rounding_mode="floor").to(wide)
        place = (positions % self.segment_len).to(wide) / self.segment_len
        found: list[Tensor] = []
        # coordinates stay float32: in half types neighbouring positions would be equal
        for i, coordinate in enumerate((segment.log1p(), place)):
            hidden = coordinate[..., None] * self.in_weight[i].to(wide) + self.in_bias[i].to(wide)
            hidden = F.silu(hidden).to(self.out_weight.dtype)
            found.append(F.linear(hidden, self.out_weight[i]))
        return found[0] + found[1]

    def extra_repr(self) -> str:
        return f"{self.out_weight.shape[-1]}, segment_len={self.segment_len}"
