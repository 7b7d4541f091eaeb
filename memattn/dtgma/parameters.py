"""Which parameters of a DTG-MA model belong to a task, and which are shared."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from memattn.dtgma.columns import TaskColumns, TaskName
from memattn.dtgma.layers import DTGMALayers
from memattn.nn.task_tokens import TokenProjection


@dataclass(frozen=True)
class ParameterReport:
    """Parameters of a model, counted where they are.

    Attributes:
        shared: Parameters of the token projection and the norms.
        tasks: Parameters of each task.
        total: All of them.
        trainable: Those that require a gradient.
        prototypes: Numbers kept for task inference, which are no parameters.
    """

    shared: int
    tasks: dict[TaskName, int]
    total: int
    trainable: int
    prototypes: int


def of_task(columns: TaskColumns, layers: DTGMALayers, number: int) -> dict[str, nn.Parameter]:
    """Parameters of a task by name."""
    outside = {f"column.{name}": p for name, p in columns.at(number).named_parameters()}
    inside = {f"layers.{name}": p for name, p in layers.task_parameters(number).items()}
    return outside | inside


def shared(tokens: TokenProjection, layers: DTGMALayers) -> dict[str, nn.Parameter]:
    """Shared parameters by name: those of the token projection and of the norms."""
    projection = {f"tokens.{name}": p for name, p in tokens.named_parameters()}
    return projection | {f"layers.{name}": p for name, p in layers.norm_parameters().items()}


def freeze(parameters: Mapping[str, nn.Parameter]) -> None:
    """Let parameters require no gradient, and drop the gradient that they have."""
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None


def count(tokens: TokenProjection, layers: DTGMALayers, columns: TaskColumns) -> ParameterReport:
    """Count the parameters of a model made of these."""
    in_common = shared(tokens, layers)
    tasks = {columns.at(n).name: of_task(columns, layers, n) for n in columns.numbers}
    all_of_them = [*in_common.values(), *(p for own in tasks.values() for p in own.values())]
    kept = [columns.at(number).prototypes for number in columns.numbers]
    return ParameterReport(
        shared=_numbers(in_common.values()),
        tasks={name: _numbers(own.values()) for name, own in tasks.items()},
        total=_numbers(all_of_them),
        trainable=_numbers(p for p in all_of_them if p.requires_grad),
        prototypes=sum(p.numel() for p in kept if p is not None),
    )


def _numbers(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
