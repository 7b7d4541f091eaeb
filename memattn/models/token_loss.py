"""The cross-entropy of an output layer and its gradient, computed in pieces of tokens.

For ``N`` tokens and ``V`` words no tensor of size ``N V`` is stored. Gradients are computed in the
forward, from the logits of each piece, as in Liger's kernel.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn.cpp.products import product
from memattn.ops._dispatch import has_cpp_kernel

IGNORED = -100
_PIECE = 1 << 21  # least number of logits in a piece
_HAS_ROWS = has_cpp_kernel("cross_entropy_rows")


def next_token_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """Next-token cross-entropy without storing the logits.

    It is ``cross_entropy(hidden_states @ weight.T, labels)`` in float32, labels shifted by one.

    Args:
        hidden_states: Input of the output layer, ``[B, T, E]``.
        weight: Weight of the output layer, ``[V, E]``.
        labels: int64 ``[B, T]``; ``-100`` for no loss.
        num_items_in_batch: Divide the sum by this number; None: by the number of labels.
        shift_labels: Labels that are already shifted, used instead of ``labels``.

    Returns:
        A float32 scalar. The mean over no labels is NaN, with gradients of 0.

    Raises:
        IndexError, RuntimeError: If a label is out of range, where PyTorch detects it.

    Note:
        Differentiable once, in ``hidden_states`` and ``weight``; a second derivative is refused.
        Source: Hsu et al. (2024), https://arxiv.org/abs/2410.10989, section 3.2. Differs: gradients
            are accumulated for the sum (the weight's in float32) and divided at the end, so that
            half precision does not lose accuracy with many labels.
    """
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    grad = torch.is_grad_enabled()
    total, _, _ = torch.ops.memattn.linear_cross_entropy(
        hidden_states.flatten(0, 1),
        weight,
        shift_labels.flatten(),
        grad and hidden_states.requires_grad,
        grad and weight.requires_grad,
    )
    if num_items_in_batch is None:
        # a mean over no labels is NaN, but its gradient is 0, not NaN
        count = (shift_labels != IGNORED).sum()
        return total / count.clamp(min=1) + torch.where(count > 0, 0.0, torch.nan)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def label_share(
    labels: Tensor | None, shift_labels: Tensor | None, num_items_in_batch: Tensor | int | None
) -> Tensor | float:
    """Which share of the labels of a batch is here, by ``num_items_in_batch``; None is all."""
    if num_items_in_batch is None:
        return 1.0
    if shift_labels is None:
        assert labels is not None
        shift_labels = labels[:, 1:]
    return (shift_labels != IGNORED).sum() / num_items_in_batch


@torch.library.custom_op("memattn::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over ``hidden [N, E]``, and its gradients (of size 0 if not needed)."""
    N, E = hidden.shape
    d_hidden = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
    d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else _none(hidden)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    fast = _HAS_ROWS and hidden.is_cpu and hidden.dtype == torch.float32
    rows = max(1, max(_PIECE, N * E) // len(weight))
    for at in range(0, N, rows):
        x, label = hidden[at : at + rows], labels[at : at + rows]
        if fast:
            d_logits = product(x, weight)
            total += torch.ops.memattn_cpp.cross_entropy_rows(d_logits, label, IGNORED).sum()
        else:
            loss, d_logits = _cross_entropy(x @ weight.t(), label)
            total += loss
        if needs_hidden:
            found = product(d_logits, weight.t()) if fast else d_logits @ weight
            d_hidden[at : at + rows] = found
        if needs_weight and d_logits.dtype == torch.float32:
            d_weight.addmm_(d_logits.t(), x)
        elif needs_weight:
            d_weight += d_logits.t() @ x
    return total, d_hidden, d_weight


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy over rows that are not ignored, and the gradient of the logits."""
    wide, kept = logits.float(), (labels != IGNORED)[:, None]
    log_p = wide.log_softmax(-1)
    index = labels.where(kept[:, 0], 0)[:, None]
    loss = -log_p.gather(1, index).where(kept, 0.0).sum()
    d_logits = log_p.exp_().scatter_add_(1, index, -torch.ones_like(log_p[:, :1]))
    return loss, d_logits.masked_fill_(~kept, 0.0).to(logits.dtype)


@_linear_cross_entropy.register_fake
def _(hidden, weight, labels, needs_hidden, needs_weight):
    d_hidden = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
    d_weight = torch.empty_like(weight, dtype=torch.float32) if needs_weight else _none(hidden)
    return hidden.new_empty((), dtype=torch.float32), d_hidden, d_weight


def _none(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32)


@torch.library.custom_op("memattn::linear_cross_entropy_backward", mutates_args=())
def _backward(
    d_total: Tensor, d_hidden: Tensor, d_weight: Tensor, hidden: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients times that of the sum, as a function of ``hidden`` and ``weight``."""
    return (d_hidden * d_total).to(hidden.dtype), (d_weight * d_total).to(weight.dtype)


@_backward.register_fake
def _(d_total, d_hidden, d_weight, hidden, weight):
    return torch.empty_like(d_hidden), torch.empty_like(d_weight, dtype=weight.dtype)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "skip_logits must be False for a second derivative: this loss is differentiable once"
    )


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_total: Tensor, *_: Any) -> tuple:
    found = torch.ops.memattn.linear_cross_entropy_backward(d_total, *ctx.saved_tensors)
    needed = ctx.needs_input_grad
    return *(x if need else None for x, need in zip(found, needed[:2], strict=True)), *[None] * 3


_linear_cross_entropy.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)
