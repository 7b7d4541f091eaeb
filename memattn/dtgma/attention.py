"""What the columns of a DTG-MA model attend to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memattn.dtgma.layers import TaskName
from memattn.nn.task_attention import ColumnLayout, TaskGraphAttention


class TaskAttention(NamedTuple):
    """What the tokens of one task's column see.

    Keys are the tokens of the columns in ``columns``, one column behind the other. Each has ``L``
    tokens: those of the input and, behind them, the node tokens of its task.
    """

    columns: tuple[TaskName, ...]  # the task itself, then the tasks that it reads
    n_nodes: int  # node tokens at the end of each column
    mask: Tensor  # bool [H, L, C * L], True = allowed; H is 1 where all heads share a mask
    weights: Tensor | None  # [layers, H, L, C * L], mean over the inputs; None without inputs


@contextmanager
def recorded_weights(model: nn.Module, mask: Tensor) -> Iterator[list[Tensor]]:
    """Run a model in its evaluation mode, and gather the attention weights of its layers.

    Args:
        model: A DTG-MA model, which then computes the columns of one task.
        mask: Which keys the own tokens of this task see, bool ``[H or 1, L, C * L]``.

    Yields:
        A list that gets ``[H, L, C * L]`` from each layer in order, the mean over the batch.
    """
    weights: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, TaskGraphAttention)
        weights.append(_weights(module, *inputs, mask=mask))

    layers = [module for module in model.modules() if isinstance(module, TaskGraphAttention)]
    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    was_training = model.training
    try:
        model.eval()
        yield weights
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()


def _weights(
    layer: TaskGraphAttention, own: Tensor, read: Tensor | None, layout: ColumnLayout, mask: Tensor
) -> Tensor:
    """Weights of the own tokens, ``[H, L, C * L]``; a token that sees nothing has none."""
    query, key = (layer.project(p, own, read, layout) for p in (layer.q_proj, layer.k_proj))
    query = query[:, :, : own.shape[1]]
    scores = query.float() @ key.float().mT / query.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0).mean(0)
