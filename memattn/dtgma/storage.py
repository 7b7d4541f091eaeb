"""Saving and loading of DTG-MA models and of single tasks."""

from abc import abstractmethod
from collections.abc import Mapping
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor

from memattn.checks import check_floating, check_shape, must
from memattn.dtgma.files import (
    ModelFile,
    TaskFile,
    check_tensors,
    hash_tensors,
    refused,
)
from memattn.dtgma.layers import TaskName
from memattn.dtgma.tasks import TaskModel

_Model = TypeVar("_Model", bound="StoredTaskModel")


class StoredTaskModel(TaskModel):
    """A model whose tasks, one or all, go to files and come back."""

    def save(self, path: str | PathLike[str]) -> None:
        """Write the model with all its tasks to a safetensors file, which appears once it is whole.

        Raises:
            OSError: If it cannot be written.
        """
        tasks = [
            dict(
                task=task,
                num_classes=self.num_classes_of(task),
                reads=list(self.reads(task)),
                frozen=self.is_frozen(task),
            )
            for task in self.tasks
        ]
        shared = self._shared()
        about = dict(
            options=self._options(),
            tasks=tasks,
            shared_frozen=self._shared_frozen,
        )
        columns = [self._tensors(number) for number in self._numbers.values()]
        ModelFile(about, columns, shared).save(path)

    @classmethod
    def load(cls: type[_Model], path: str | PathLike[str]) -> _Model:
        """Read a model that ``save`` wrote, on the CPU and in evaluation mode.

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
            model = cls(**file.about["options"]).to(dtype=dtypes.pop()).eval()
            check_tensors(file.shared, model._shared())
            _copy(file.shared, model._shared())
            for about, tensors in zip(file.about["tasks"], file.tasks, strict=True):
                model._add(about, tensors)
                if about["frozen"]:
                    model.freeze_task(about["task"])
        if file.about["shared_frozen"]:
            model._freeze_shared()
        return model

    def save_task(self, task: TaskName, path: str | PathLike[str]) -> None:
        """Write a task to a safetensors file, which appears once it is whole.

        It holds the task's parameters, mask, prototypes, classes and reads, and the shared
        parameters that they belong to.

        Raises:
            ValueError: If there is no such task.
            OSError: If it cannot be written.
        """
        number = self._number("task", task)
        column = self._column(number)
        about = dict(
            task=task,
            num_classes=column.num_classes,
            reads=list(self.reads(task)),
            columns=[
                [self._column(n).name, self._hash(n)] for n in self._graph.columns(number)[1:]
            ],
            config=self._config(),
        )
        TaskFile(about, self._tensors(number), self._shared()).save(path)

    def load_task(self, path: str | PathLike[str]) -> TaskName:
        """Add the task of a file that ``save_task`` wrote, frozen, and return its name.

        A model without tasks takes over the shared parameters of the file. Any other must have the
        same ones, and the tasks that the file's task reads.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds something else, or its task does not fit into this model, which
                is then left as it was.
        """
        file = TaskFile.load(path)
        about, task = file.about, file.about["task"]
        if about["config"] != self._config():
            must("path", f"hold a task of a model of {self._config()}", about["config"])
        with refused(path):
            self._try(file)
        if task in self._numbers:
            must("path", "hold a task with a new name", repr(task))
        for name, fingerprint in about["columns"]:
            if self._hash(self._number(f"tasks that {task!r} reads", name)) != fingerprint:
                must("path", f"hold a task that reads this model's task {name!r}", "another one")
        for name in about["reads"]:
            if not self.is_frozen(name):
                must("path", "hold a task that reads frozen tasks of this model", repr(name))
        if not self._numbers:
            _copy(file.shared, self._shared())
        elif hash_tensors(file.shared) != hash_tensors(self._shared()):
            must("path", "hold a task of a model with the same shared parameters", "other ones")
        self._add(about, file.tensors)
        self.freeze_task(task)
        return task

    @abstractmethod
    def _config(self) -> dict[str, Any]:
        """What two models must agree on to exchange tasks."""

    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """Arguments that build the model without its tasks."""

    def _try(self, file: TaskFile) -> None:
        """Raise where the task of a file cannot be added, before this model is touched.

        It is added to a model like this one without tasks and values, which makes every check.
        """
        with torch.device("meta"):
            trial = type(self)(**self._options()).to(self.tokens.projection.weight.dtype)
            check_tensors(file.shared, trial._shared())
            trial._add(file.about | dict(reads=[]), file.tensors)

    def _add(self, about: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Register a task of a file and take over what it computes with."""
        task = about["task"]
        self.register_task(task, about["num_classes"], reads=about["reads"])
        number = self._number("task", task)
        named = self._named(number)
        check_tensors(tensors, named, optional=("mask", "prototypes"))
        _copy(tensors, named)
        self.set_mask(task, tensors.get("mask"))
        prototypes = tensors.get("prototypes")
        if prototypes is not None:
            weight = self.tokens.projection.weight
            check_shape("prototypes", prototypes, classes=about["num_classes"], F=None)
            check_floating("prototypes", prototypes)
            if prototypes.shape[1] % weight.shape[0]:
                wanted = f"have features of tokens of E={weight.shape[0]}"
                must("prototypes", wanted, prototypes.shape[1])
            prototypes = prototypes.to(weight)
        self._column(number).prototypes = prototypes

    def _tensors(self, number: int) -> dict[str, Tensor]:
        """All that a task computes with, and its prototypes."""
        column = self._column(number)
        buffers = dict(mask=column.mask, prototypes=column.prototypes)
        return {**self._named(number), **{n: t for n, t in buffers.items() if t is not None}}

    def _hash(self, number: int) -> str:
        """Fingerprint of what a task computes with."""
        used = {n: t for n, t in self._tensors(number).items() if n != "prototypes"}
        return hash_tensors(used)


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
