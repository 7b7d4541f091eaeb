"""Saving and loading of DTG-MA models and of single tasks."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from memattn.checks import check_floating, check_shape, must
from memattn.dtgma import parameters
from memattn.dtgma.columns import TaskColumns, TaskName
from memattn.dtgma.files import ModelFile, TaskFile, check_tensors, hash_tensors, refused
from memattn.dtgma.layers import DTGMALayers
from memattn.dtgma.options import exchanged_options
from memattn.nn.task_tokens import TokenProjection

_Model = TypeVar("_Model", bound="Model")


class Model(Protocol):
    """The members of ``DTGMAModel`` that saving and loading use."""

    tokens: TokenProjection
    layers: DTGMALayers
    columns: TaskColumns
    n_nodes: int
    shared_frozen: bool

    def to(self: _Model, *, dtype: torch.dtype) -> _Model: ...

    def eval(self: _Model) -> _Model: ...

    @property
    def options(self) -> dict[str, Any]: ...

    def register_task(
        self, task: TaskName, num_classes: int | None = None, *, reads: Sequence[TaskName] = ()
    ) -> None: ...

    def freeze_task(self, task: TaskName) -> None: ...

    def freeze_shared(self) -> None: ...

    def set_mask(self, task: TaskName, mask: Tensor | None) -> None: ...


def save(model: Model, path: str | PathLike[str]) -> None:
    """Write the model with all its tasks to a safetensors file, which appears once it is whole.

    Raises:
        OSError: If it cannot be written.
    """
    columns = [model.columns.at(number) for number in model.columns.numbers]
    tasks = [
        dict(
            task=column.name,
            num_classes=column.num_classes,
            reads=list(_reads(model, number)),
            frozen=column.frozen,
        )
        for number, column in zip(model.columns.numbers, columns, strict=True)
    ]
    about = dict(options=model.options, tasks=tasks, shared_frozen=model.shared_frozen)
    tensors = [_tensors(model, number) for number in model.columns.numbers]
    ModelFile(about, tensors, _shared(model)).save(path)


def load_model(build: Callable[[dict[str, Any]], _Model], path: str | PathLike[str]) -> _Model:
    """Read a model that ``save`` wrote, in evaluation mode.

    Args:
        build: Makes a model without tasks from its options.
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    file = ModelFile.load(path)
    # what is drawn here is written over
    with torch.random.fork_rng(devices=[]), refused(path):
        dtypes = {tensor.dtype for tensor in file.shared.values()}
        if len(dtypes) != 1:
            raise ValueError(f"shared parameters have dtypes {sorted(map(str, dtypes))}")
        model = build(file.about["options"]).to(dtype=dtypes.pop()).eval()
        check_tensors(file.shared, _shared(model))
        _copy(file.shared, _shared(model))
        for about, tensors in zip(file.about["tasks"], file.tasks, strict=True):
            _add_task(model, about, tensors)
            if about["frozen"]:
                model.freeze_task(about["task"])
    if file.about["shared_frozen"]:
        model.freeze_shared()
    return model


def save_task(model: Model, task: TaskName, path: str | PathLike[str]) -> None:
    """Write a task to a safetensors file, which appears once it is whole.

    It holds the task's parameters, mask, prototypes, classes and reads, and the shared parameters
    that they belong to.

    Raises:
        ValueError: If there is no such task.
        OSError: If it cannot be written.
    """
    number = model.columns.number("task", task)
    columns = model.columns.graph.columns(number)[1:]
    about = dict(
        task=model.columns.at(number).name,
        num_classes=model.columns.at(number).num_classes,
        reads=list(_reads(model, number)),
        columns=[[model.columns.at(n).name, _hash(model, n)] for n in columns],
        config=exchanged_options(model.tokens, model.layers, model.n_nodes),
    )
    TaskFile(about, _tensors(model, number), _shared(model)).save(path)


def load_task(model: Model, path: str | PathLike[str]) -> TaskName:
    """Add the task of a file that ``save_task`` wrote, frozen, and return its name.

    A model without tasks takes over the shared parameters of the file. Any other must have the same
    ones, and the tasks that the file's task reads.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else, or its task does not fit into this model, which is
            then left as it was.
    """
    file = TaskFile.load(path)
    about, task = file.about, file.about["task"]
    config = exchanged_options(model.tokens, model.layers, model.n_nodes)
    if about["config"] != config:
        must("path", f"hold a task of a model of {config}", about["config"])
    with refused(path), torch.device("meta"):
        # a model like this one, without tasks and values: it makes every check
        trial = type(model)(**model.options).to(dtype=model.tokens.projection.weight.dtype)
        check_tensors(file.shared, _shared(trial))
        _add_task(trial, about | dict(reads=[]), file.tensors)
    if task in model.columns.names:
        must("path", "hold a task with a new name", repr(task))
    for name, fingerprint in about["columns"]:
        number = model.columns.number(f"tasks that {task!r} reads", name)
        if _hash(model, number) != fingerprint:
            must("path", f"hold a task that reads this model's task {name!r}", "another one")
    for name in about["reads"]:
        if not model.columns.of(name).frozen:
            must("path", "hold a task that reads frozen tasks of this model", repr(name))
    if not model.columns.names:
        _copy(file.shared, _shared(model))
    elif hash_tensors(file.shared) != hash_tensors(_shared(model)):
        must("path", "hold a task of a model with the same shared parameters", "other ones")
    _add_task(model, about, file.tensors)
    model.freeze_task(task)
    return task


def _add_task(model: Model, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Register a task of a file and take over what it computes with."""
    task = about["task"]
    model.register_task(task, about["num_classes"], reads=about["reads"])
    named = parameters.of_task(model.columns, model.layers, model.columns.number("task", task))
    check_tensors(tensors, named, optional=("mask", "prototypes"))
    _copy(tensors, named)
    model.set_mask(task, tensors.get("mask"))
    prototypes = tensors.get("prototypes")
    if prototypes is not None:
        weight = model.tokens.projection.weight
        check_shape("prototypes", prototypes, classes=about["num_classes"], F=None)
        check_floating("prototypes", prototypes)
        if prototypes.shape[1] % weight.shape[0]:
            wanted = f"have features of tokens of E={weight.shape[0]}"
            must("prototypes", wanted, prototypes.shape[1])
        prototypes = prototypes.to(weight)
    model.columns.of(task).prototypes = prototypes


def _reads(model: Model, number: int) -> tuple[TaskName, ...]:
    return model.columns.names_of(model.columns.graph.reads(number))


def _shared(model: Model) -> dict[str, nn.Parameter]:
    return parameters.shared(model.tokens, model.layers)


def _tensors(model: Model, number: int) -> dict[str, Tensor]:
    """All that a task computes with, and its prototypes."""
    named = parameters.of_task(model.columns, model.layers, number)
    return {**named, **model.columns.at(number).tensors()}


def _hash(model: Model, number: int) -> str:
    """Fingerprint of what a task computes with."""
    used = {n: t for n, t in _tensors(model, number).items() if n != "prototypes"}
    return hash_tensors(used)


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
