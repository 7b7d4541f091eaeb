"""Linear layers initialised to zero, or factorised into two matrices."""

from torch import Tensor, nn


class ZeroLinear(nn.Linear):
    """A linear layer without bias, initialised to 0, so that at first its block has no effect.

    Args:
        in_features: Features of the input.
        out_features: Features of the output.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        # torch does not type device and dtype of a linear layer
        super().__init__(in_features, out_features, bias=False)  # pyright: ignore[reportUnknownMemberType]

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class LowRankLinear(nn.Module):
    """A linear layer of rank ``r``, ``up(down(x))``, without biases.

    Args:
        in_features: Features of the input.
        out_features: Features of the output.
        rank: ``r``.
        up: The second layer; None creates it.
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
