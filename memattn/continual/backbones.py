"""The networks below the task heads, the same for every strategy."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

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
