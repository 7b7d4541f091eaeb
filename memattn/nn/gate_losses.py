"""Losses of gates, as sums over tokens and token counts."""

import torch
from torch import Tensor

from memattn.checks import check_tensor, is_readable, must, plain_values

BASE, SPECIALIST, UNKNOWN = 0, 1, -1  # labels of a token's domain

Loss = tuple[Tensor, Tensor]


def entropy(gates: Tensor, scores: Tensor | None) -> Tensor:
    """``-sum g log g`` over the last axis; computed from the softmax scores if they are given."""
    if scores is None:
        safe = torch.where(gates > 0, gates, 1.0)
        return -(safe * safe.log()).sum(-1)
    finite = torch.where(scores.isneginf(), 0.0, scores)
    return scores.logsumexp(-1) - (gates * finite).sum(-1)


def sparsity(gates: Tensor) -> Tensor:
    """``(1 - sum g^2) / 2`` over the last axis."""
    return 0.5 * (1.0 - gates.square().sum(-1))


def domain_loss(
    gates: Tensor, present: Tensor, labels: Tensor | None, weights: Tensor | None = None
) -> Loss:
    """Cross-entropy of the gates of base and all specialists together with the domain labels.

    Tokens without a label are not counted, nor tokens whose labelled side is closed.

    Args:
        gates: ``[B, T, 1 + N]``.
        present: bool ``[B, T]``.
        labels: int64 ``[B, T]``, 0 for text of the base, 1 for text of specialists, -1 for unknown;
            None means all unknown.
        weights: ``[B, T]``, weight of each token; None gives both labels the same total weight.
    """
    zero = gates.new_zeros(())
    if labels is None:
        return zero, zero
    of_base = labels == BASE
    share = torch.where(of_base, gates[..., 0], gates[..., 1:].sum(-1))
    counted = present & (labels != UNKNOWN) & (share > 0)
    losses = -torch.where(counted, share, 1.0).log()
    count = counted.sum().to(gates)
    if weights is None:
        numbers = torch.stack([(counted & ~of_base).sum(), (counted & of_base).sum()]).to(gates)
        kinds = (numbers > 0).sum().clamp(min=1)
        weights = (count / (kinds * numbers.clamp(min=1.0)))[of_base.long()]
    return torch.where(counted, losses * weights.to(gates), 0.0).sum(), count


def check_weights(name: str, weights: Tensor, B: int, T: int) -> Tensor:
    """Check label weights per token or per row; return ``[B, T]``.

    Raises:
        TypeError: If they are no tensor.
        ValueError: If the shape or a value does not fit.
    """
    check_tensor(name, weights)
    _check_shape(name, weights, B, T)
    if is_readable(weights) and not bool((good := (weights >= 0) & weights.isfinite()).all()):
        must(name, "be at least 0 and finite", weights[~good][0].item())
    return weights.detach().expand(B, T)


def check_labels(name: str, labels: Tensor, B: int, T: int) -> Tensor:
    """Check labels per token or per row; return ``[B, T]``.

    Raises:
        TypeError: If they are no tensor of integers.
        ValueError: If the shape or a value does not fit.
    """
    check_tensor(name, labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        must(name, "be integers", labels.dtype, TypeError)
    _check_shape(name, labels, B, T)
    if is_readable(labels) and not bool(((labels >= UNKNOWN) & (labels <= SPECIALIST)).all()):
        allowed = "be 0 for text of the base, 1 for that of specialists or -1 for unknown"
        must(name, allowed, sorted({*plain_values(labels.flatten())} - {UNKNOWN, BASE, SPECIALIST}))
    return labels.expand(B, T)


def _check_shape(name: str, tensor: Tensor, B: int, T: int) -> None:
    """Raise ValueError unless a tensor has one entry per row or per token."""
    if list(tensor.shape) not in ([B, 1], [B, T]):
        must(name, f"have shape [B={B}, 1] or [B={B}, T={T}]", list(tensor.shape))
