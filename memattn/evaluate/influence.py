"""How far a token reaches: which positions of the output move when it changes."""

import math
from typing import Any

import torch
from torch import Tensor

from memattn.checks import check_int, check_tensor, must

_POINTS = 48  # positions that are changed where nothing else is said


@torch.no_grad()
def influence(model: Any, input_ids: Tensor, *, stride: int | None = None) -> dict[str, list[Any]]:
    """Measure how much a change of one token moves the logits at every position.

    Every ``stride``-th token is changed alone, into the token with the next id, in a call of its
    own. The other calls have the same shape, so that what a token does not reach is exactly 0.

    Args:
        model: A causal language model in its evaluation mode, called with ``input_ids`` and
            ``use_cache=False``; it returns ``logits``.
        input_ids: A text, int64 ``[1, T]``. The last tokens that do not fill a block of ``stride``
            are left out.
        stride: Tokens from one that is changed to the next; None means about 48 changes.

    Returns:
        ``changed`` ``[n]``, the positions changed, and ``log10`` ``[n, n]``, the logarithm of the
        mean absolute change of the logits, averaged over blocks of ``stride`` positions; None where
        no logit changed at all.

    Raises:
        TypeError: If ``input_ids`` is no tensor.
        ValueError: If it is not ``[1, T]`` with at least two blocks of ``stride`` tokens.
    """
    check_tensor("input_ids", input_ids)
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:
        must("input_ids", "have shape [1, T]", list(input_ids.shape))
    length = input_ids.shape[1]
    if stride is None:
        stride = max(1, math.ceil(length / _POINTS))
    check_int("stride", stride, 1)
    if length < 2 * stride:
        must("input_ids", f"have at least {2 * stride} tokens", length)
    ids = input_ids[:, : length // stride * stride].to(model.device)
    changed = list(range(0, ids.shape[1], stride))
    vocab_size = model.config.get_text_config().vocab_size
    before = model(ids, use_cache=False).logits
    changes = []
    for position in changed:
        other = ids.clone()
        other[0, position] = (other[0, position] + 1) % vocab_size
        after = model(other, use_cache=False).logits
        changes.append((after - before).abs().float().mean(-1)[0])
    blocks = torch.stack(changes).double().cpu().unflatten(1, (-1, stride)).mean(-1)
    return {"changed": changed, "log10": _log10(blocks)}


def _log10(values: Tensor) -> list[list[float | None]]:
    """Logarithms, None for exactly 0."""
    return [
        [None if value == 0.0 else round(math.log10(value), 3) for value in row]
        for row in values.tolist()
    ]
