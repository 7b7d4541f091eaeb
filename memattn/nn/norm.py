"""Norms of hidden states."""

from torch import nn

from memattn.checks import must

NORMS = ("rms", "layer")


def make_norm(kind: str, hidden_size: int, eps: float) -> nn.Module:
    """The norm of a kind, ``"rms"`` or ``"layer"``, without bias."""
    if kind not in NORMS:
        must("norm", f"be one of {', '.join(NORMS)}", repr(kind))
    if kind == "layer":
        return nn.LayerNorm(hidden_size, eps=eps, bias=False)
    return nn.RMSNorm(hidden_size, eps=eps)
