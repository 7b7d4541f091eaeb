"""Parameters of a neural memory with their own initialisation: initial weights, and rates."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn


class MemoryWeights(nn.ParameterList):
    """Initial weights of a layer's memories: layers ``[H, d_n, d_{n-1}]``.

    Args:
        num_heads: Memories, ``H``.
        sizes: ``d_0 ... d_N``.
    """

    def __init__(self, num_heads: int, sizes: Sequence[int]) -> None:
        super().__init__(
            nn.Parameter(torch.empty(num_heads, after, before))
            for before, after in zip(sizes, sizes[1:], strict=False)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New weights."""
        for layer in self:
            nn.init.normal_(layer, std=layer.shape[-1] ** -0.5)


class MemoryRates(nn.Linear):
    """Learning rate, momentum and decay of each token and head, before their sigmoids.

    Args:
        hidden_size: Features of the hidden states, ``E``.
        num_heads: Memories, ``H``.
        rates: Initial rates by name, equal for all tokens; between 0 and 1.
    """

    def __init__(self, hidden_size: int, num_heads: int, rates: Mapping[str, float]) -> None:
        # set first: the constructor of Linear initialises the parameters
        self.num_heads, self.rates = num_heads, dict(rates)
        # torch does not type device and dtype of a linear layer
        super().__init__(hidden_size, len(rates) * num_heads)  # pyright: ignore[reportUnknownMemberType]

    def reset_parameters(self) -> None:
        """Reset to the initial rates."""
        nn.init.zeros_(self.weight)
        with torch.no_grad():
            for bias, rate in zip(
                self.bias.view(-1, self.num_heads), self.rates.values(), strict=True
            ):
                bias.fill_(math.log(rate / (1 - rate)))
