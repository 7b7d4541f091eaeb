"""Linear layers that start at zero, or are products of two matrices."""

from torch import Tensor, nn


class ZeroLinear(nn.Linear):
    """A linear layer without bias whose new weights are 0, so that what it ends starts as nothing.

    Args:
        in_features: Features of the input.
        out_features: Features of the output.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class LowRankLinear(nn.Module):
    """A matrix of rank ``r`` as two, ``up(down(x))``, without biases.

    Args:
        in_features: Features of the input.
        out_features: Features of the output.
        rank: ``r``.
        up: The second of the two; None makes one.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, up: nn.Linear | None = None
    ) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False) if up is None else up

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        return self.up(self.down(x))
