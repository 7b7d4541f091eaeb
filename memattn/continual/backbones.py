"""The networks below the task heads, the same for every strategy."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from memattn.nn.task_tokens import TokenProjection

# what may change the output of each block: its index and its output
After = Callable[[int, Tensor], Tensor]


class MLP(nn.Module):
    """Hidden layers with ReLU over flattened inputs.

    Args:
        input_dim: Numbers in a sample.
        hidden_dim: Width of each layer.
        n_layers: Number of layers.
    """

    def __init__(self, input_dim: int, hidden_dim: int, n_layers: int) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * n_layers]
        self.blocks = nn.ModuleList(
            nn.Linear(n_in, n_out) for n_in, n_out in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, x: Tensor, after: After | None = None) -> Tensor:
        """Features ``[B, hidden_dim]`` of inputs ``[B, ...]``.

        Args:
            x: Inputs, float32.
            after: What is applied to the output of each layer, or None.
        """
        hidden = x.flatten(1)
        for i, layer in enumerate(self.blocks):
            hidden = torch.relu(layer(hidden))
            if after is not None:
                hidden = after(i, hidden)
        return hidden


class TokenTransformer(nn.Module):
    """Pre-norm transformer over the tokens of DTG-MA, with shared weights; features are their mean.

    Args:
        input_shape: Shape of a sample: ``(F,)``, ``(H, W)`` or ``(C, H, W)``; others are flattened.
        hidden_dim: Width of a token.
        n_layers: Number of layers, with feed-forwards of four times the width.
        n_heads: Attention heads.
    """

    def __init__(
        self, input_shape: tuple[int, ...], hidden_dim: int, n_layers: int, n_heads: int
    ) -> None:
        super().__init__()
        self.flatten = len(input_shape) > 3
        shape = (math.prod(input_shape),) if self.flatten else input_shape
        self.tokens = TokenProjection(shape[0] if len(shape) == 1 else shape, hidden_dim)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden_dim, n_heads, 4 * hidden_dim, 0.0, batch_first=True, norm_first=True
            )
            for _ in range(n_layers)
        )

    def forward(self, x: Tensor, after: After | None = None) -> Tensor:
        """Features ``[B, hidden_dim]`` of inputs ``[B, ...]``.

        Args:
            x: Inputs, float32.
            after: What is applied to the output of each layer, ``[B, L, hidden_dim]``, or None.
        """
        hidden = self.tokens(x.flatten(1) if self.flatten else x)
        for i, layer in enumerate(self.blocks):
            hidden = layer(hidden)
            if after is not None:
                hidden = after(i, hidden)
        return hidden.mean(1)
