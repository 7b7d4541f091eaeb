"""The part of a gate that one specialist owns."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.checks import check_type, must


class GateRow(nn.Module):
    """The part of a gate that one specialist owns: its logit ``u . relu(V x + c) + d``.

    Args:
        hidden_size: Features of the input.
        gate_size: Rows of ``V``.
        prior: Prior of the specialist; 0 means closed.
    """

    prior: Tensor

    def __init__(self, hidden_size: int, gate_size: int, prior: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden_size, gate_size)
        self.logit = nn.Linear(gate_size, 1)
        self.new_prior = prior
        self.register_buffer("prior", torch.tensor(prior, dtype=torch.float32))
        self._seen: tuple[Tensor, int, bool] | None = None

    def reset_parameters(self) -> None:
        """Reset its prior to the initial one."""
        nn.init.constant_(self.prior, self.new_prior)

    @property
    def is_open(self) -> bool:
        """Whether the prior is above 0; read from the device once per change."""
        if torch.compiler.is_compiling():
            return True  # it may be
        prior = self.prior
        if prior.is_inference():  # inference tensors do not record changes
            return bool(prior > 0)
        if self._seen is None or self._seen[0] is not prior or self._seen[1] != prior._version:
            self._seen = (prior, prior._version, bool(prior > 0))
        return self._seen[2]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_seen": None}  # a copy counts its changes anew

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., E]`` to logits ``[...]``, in the dtype of ``x``."""
        hidden, logit = self.hidden, self.logit
        if type(hidden) is not nn.Linear or type(logit) is not nn.Linear:  # adapters, such as LoRA
            return logit(F.relu(hidden(x)))[..., 0].to(x.dtype)
        V, c, u, d = (p.to(x.dtype) for p in (hidden.weight, hidden.bias, logit.weight, logit.bias))
        return F.linear(F.relu(F.linear(x, V, c)), u, d)[..., 0]


def check_prior(prior: float) -> float:
    """Check a prior and return it."""
    if isinstance(prior, bool):
        must("prior", "be a number", "bool", TypeError)
    check_type("prior", prior, (int, float), "be a number")
    if not 0.0 <= prior < float("inf"):
        must("prior", "be at least 0 and finite", prior)
    return float(prior)
