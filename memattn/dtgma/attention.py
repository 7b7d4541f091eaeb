"""What the columns of a DTG-MA model attend to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memattn.checks import must
from memattn.dtgma.columns import TaskColumn, TaskColumns, TaskName
from memattn.nn.task_attention import ColumnLayout, TaskGraphAttention
from memattn.nn.task_linear import TaskGroups, group_by_task
from memattn.nn.task_tokens import TokenProjection


class TaskAttention(NamedTuple):
    """What the tokens of one task's column see.

    Keys are the tokens of the columns in ``columns``, one column behind the other. Each has ``L``
    tokens: those of the input and, behind them, the node tokens of its task.
    """

    columns: tuple[TaskName, ...]  # the task itself, then the tasks that it reads
    n_nodes: int  # node tokens at the end of each column
    mask: Tensor  # bool [H, L, C * L], True = allowed; H is 1 where all heads share a mask
    weights: Tensor | None  # [layers, H, L, C * L], mean over the inputs; None without inputs


def task_attention(
    model: nn.Module,
    columns: TaskColumns,
    projection: TokenProjection,
    task: TaskName,
    x: Tensor | None,
    classify: Callable[[Tensor, TaskGroups], Tensor],
) -> TaskAttention:
    """The mask of a task, and what its column attends to.

    Args:
        model: The model that the other arguments belong to.
        columns: The columns of its tasks.
        projection: Its projection of inputs to tokens.
        task: The task.
        x: Inputs, ``[B, ...]``; None means the mean input of each class.
        classify: Computes the columns of tokens ``[B, L, E]``.
    """
    number = columns.number("task", task)
    column, device = columns.at(number), projection.projection.weight.device
    tokens = _mean_inputs(projection, column) if x is None else projection(x)
    groups = group_by_task(number, 1 if tokens is None else tokens.shape[0])
    n_tokens = _column_tokens(projection, column) if tokens is None else tokens.shape[1]
    length = n_tokens + column.n_nodes
    mask = columns.layout(groups, length, device).mask.dense(0)[:, :length]
    weights = None
    if tokens is not None:
        with _recorded_weights(model, mask) as layers:
            classify(tokens, groups)
        weights = torch.stack(layers)
    names = columns.names_of(columns.graph.columns(number))
    return TaskAttention(names, column.n_nodes, mask, weights)


@contextmanager
def _recorded_weights(model: nn.Module, mask: Tensor) -> Iterator[list[Tensor]]:
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


def _mean_inputs(tokens: TokenProjection, column: TaskColumn) -> Tensor | None:
    """Tokens ``[classes, L, E]`` of the mean input of each class; None where none are kept."""
    if column.prototypes is None:
        return None
    means = column.prototypes[~column.prototypes.isnan().any(1)]
    means = means.unflatten(1, (-1, tokens.projection.out_features))
    if tokens.image is None and tokens.n_tokens > 1 and means.shape[1] == 1:
        return None  # of sequences the mean over their tokens is kept
    return means


def _column_tokens(tokens: TokenProjection, column: TaskColumn) -> int:
    """Tokens of a task's column without its nodes, where no input says how many there are."""
    if column.mask is not None:
        return column.mask.shape[-1] - column.n_nodes
    if tokens.n_image_tokens is None:
        task = repr(column.name)
        must("x", f"be given for task {task}, which has neither a mask nor prototypes", None)
    return tokens.n_image_tokens


def _weights(
    layer: TaskGraphAttention, own: Tensor, read: Tensor | None, layout: ColumnLayout, mask: Tensor
) -> Tensor:
    """Weights of the own tokens, ``[H, L, C * L]``; a token that sees nothing has none."""
    query, key = (layer.project(p, own, read, layout) for p in (layer.q_proj, layer.k_proj))
    query = query[:, :, : own.shape[1]]
    scores = query.float() @ key.float().mT / query.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0).mean(0)
