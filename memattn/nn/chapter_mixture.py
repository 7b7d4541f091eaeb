"""Combine attention to several sets of chapters from the output and ``lse`` of each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from memattn.ops.segmented_attention import AttentionOutput


def mix_chapters(
    first: AttentionOutput, others: Sequence[tuple[AttentionOutput, float]], *, joint: bool
) -> Tensor:
    """Combine attention to one set of chapters with attention to others, each with a weight.

    - joint: one softmax over all keys, each multiplied by the weight of its set: ``sum_i w_i
      exp(lse_i) out_i / sum_i w_i exp(lse_i)``, where the first has weight 1;
    - independent: ``first.out + sum_i w_i out_i``.

    Computed in float32 (float64 for float64 outputs) and rounded once. A query that attended to no
    key at all gives 0.

    Args:
        first: ``out [B, H, T, D]`` and ``lse [B, H, T]``.
        others: The same for each other set, with its positive weight.
        joint: Whether to use the joint rule.

    Returns:
        ``[B, H, T, D]`` in the dtype of ``first.out``. Differentiable in all outputs and ``lse``.
    """
    wide = torch.promote_types(first.out.dtype, torch.float32)
    weighed = ((first, 1.0), *others)
    if not joint:
        return sum(weight * part.out.to(wide) for part, weight in weighed).to(first.out.dtype)  # type: ignore[union-attr]
    highest = torch.stack([part.lse for part, _ in weighed]).amax(0).detach()
    highest = torch.where(highest.isfinite(), highest, 0.0)  # -inf - -inf is NaN
    shares = [weight * (part.lse - highest).exp() for part, weight in weighed]
    total = torch.stack(shares).sum(0)
    total = torch.where(total > 0.0, total, 1.0)
    mixed = torch.zeros((), dtype=wide, device=total.device)
    for (part, _), share in zip(weighed, shares, strict=True):
        mixed = mixed + (share / total)[..., None].to(wide) * part.out.to(wide)
    return mixed.to(first.out.dtype)
