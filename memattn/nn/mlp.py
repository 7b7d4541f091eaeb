"""Feed-forward layers."""

from torch import Tensor, nn
from torch.nn import functional as F

from memattn.checks import check_int, must


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``, without biases.

    Args:
        hidden_size: Features of the input and the output, ``E``.
        intermediate_size: Features between them.

    Note:
        Source: Shazeer (2020), https://arxiv.org/abs/2002.05202.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        check_int("hidden_size", hidden_size, 1)
        check_int("intermediate_size", intermediate_size, 1)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``[..., E]`` to ``[..., E]``."""
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class GELUMLP(nn.Module):
    """``down(gelu(up(x)))``, without biases.

    Args:
        hidden_size: Features of the input and the output, ``E``.
        intermediate_size: Features between them.

    Note:
        Source: Hendrycks and Gimpel (2016), https://arxiv.org/abs/1606.08415, in its exact form.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        check_int("hidden_size", hidden_size, 1)
        check_int("intermediate_size", intermediate_size, 1)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``[..., E]`` to ``[..., E]``."""
        return self.down_proj(F.gelu(self.up_proj(hidden_states)))


MLPS: dict[str, type[SwiGLU] | type[GELUMLP]] = {"swiglu": SwiGLU, "gelu": GELUMLP}


def make_mlp(kind: str, hidden_size: int, intermediate_size: int) -> SwiGLU | GELUMLP:
    """The MLP of a kind, ``"swiglu"`` or ``"gelu"``."""
    if kind not in MLPS:
        must("mlp", f"be one of {', '.join(MLPS)}", repr(kind))
    return MLPS[kind](hidden_size, intermediate_size)
