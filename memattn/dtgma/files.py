"""Files of tasks and models: safetensors, with the options to build them again."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from memattn.checks import must
from memattn.files import read_tensors, write_tensors

_TASK = "memattn.DTGMATask/1"
_MODEL = "memattn.DTGMAModel/1"


@dataclass(frozen=True)
class TaskFile:
    """The content of a task's file.

    Attributes:
        about: Name, classes, tasks that it reads with their hashes, and the configuration of the
            model.
        tensors: Parameters, ``mask`` and ``prototypes`` of the task.
        shared: The model's shared parameters.
    """

    about: dict[str, Any]
    tensors: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]

    def save(self, path: str | PathLike[str]) -> None:
        """Write the file, which appears once it is whole."""
        named = {f"task.{name}": t for name, t in self.tensors.items()}
        named |= {f"shared.{name}": t for name, t in self.shared.items()}
        _save(path, _TASK, self.about, named)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "TaskFile":
        """Read a file that ``save`` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds something else.
        """
        about, named = _load(path, _TASK, "DTGMAModel.save_task")
        kinds = dict(task=int | str, num_classes=int, reads=list, columns=list, config=dict)
        with refused(path):
            _check_about(about, kinds)
            for column in about["columns"]:
                if not isinstance(column, list) or [type(c) for c in column[1:]] != [str]:
                    raise ValueError(f"{column!r} in columns is no name with a hash")
            read = [name for name, _ in about["columns"]]
            if not all(name in read for name in about["reads"]):
                raise ValueError(f"reads {about['reads']} are not all among columns {read}")
            tensors, shared = _parts(named, ["task.", "shared."])
        return cls(about, tensors, shared)


@dataclass(frozen=True)
class ModelFile:
    """The content of a model's file.

    Attributes:
        about: Its options, and its tasks in order: name, classes, tasks that it reads, and whether
            it is frozen.
        tasks: Parameters, ``mask`` and ``prototypes`` of each task.
        shared: The shared parameters.
    """

    about: dict[str, Any]
    tasks: Sequence[Mapping[str, Tensor]]
    shared: Mapping[str, Tensor]

    def save(self, path: str | PathLike[str]) -> None:
        """Write the file, which appears once it is whole."""
        named = {f"shared.{name}": t for name, t in self.shared.items()}
        for i, task in enumerate(self.tasks):
            named |= {f"tasks.{i}.{name}": t for name, t in task.items()}
        _save(path, _MODEL, self.about, named)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "ModelFile":
        """Read a file that ``save`` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds something else.
        """
        about, named = _load(path, _MODEL, "DTGMAModel.save")
        kinds = dict(task=int | str, num_classes=int, reads=list, frozen=bool)
        with refused(path):
            _check_about(about, dict(options=dict, tasks=list, shared_frozen=bool))
            for task in about["tasks"]:
                _check_about(task, kinds)
            prefixes = ["shared.", *(f"tasks.{i}." for i in range(len(about["tasks"])))]
            shared, *tasks = _parts(named, prefixes)
        return cls(about, tasks, shared)


def _save(
    path: str | PathLike[str], kind: str, about: dict[str, Any], named: Mapping[str, Tensor]
) -> None:
    write_tensors(path, named, {"format": kind, "about": json.dumps(about)})


def _load(
    path: str | PathLike[str], kind: str, writer: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    named, metadata = read_tensors(path, writer)
    if metadata.get("format") != kind:
        must("path", f"hold what has format {kind}", f"{path}: {metadata.get('format')}")
    with refused(path):
        return json.loads(metadata.get("about", "")), named


@contextmanager
def refused(path: str | PathLike[str]) -> Iterator[None]:
    """Context that names the file in errors about its content."""
    try:
        yield
    except (TypeError, ValueError) as error:
        message = f"path must hold what was saved of a model like this, got {path}: {error}"
        raise ValueError(message) from error


def _check_about(about: Any, kinds: Mapping[str, Any]) -> None:
    """Raise unless ``about`` has these entries of these types."""
    if not isinstance(about, dict):
        raise ValueError(f"metadata {about!r} have no entries {', '.join(kinds)}")
    for name, kind in kinds.items():
        if name not in about:
            raise ValueError(f"metadata have no entry {name!r}")
        if not isinstance(about[name], kind):
            raise ValueError(f"metadata have a wrong entry {name!r}, {about[name]!r}")


def _parts(named: Mapping[str, Tensor], prefixes: Sequence[str]) -> list[dict[str, Tensor]]:
    """The tensors of each prefix, by the rest of their names."""
    others = sorted(name for name in named if not name.startswith(tuple(prefixes)))
    if others:
        raise ValueError(f"unexpected tensors {', '.join(others)}")
    return [{n.removeprefix(p): t for n, t in named.items() if n.startswith(p)} for p in prefixes]


def check_tensors(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], optional: Sequence[str] = ()
) -> None:
    """Raise unless a file holds tensors of the names, shapes and dtypes that are wanted.

    Args:
        tensors: Its tensors.
        wanted: The required tensors; only names, shapes and dtypes are read.
        optional: Names of further tensors that it may hold.
    """
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        raise ValueError(f"missing tensors {', '.join(missing)}")
    others = sorted(tensors.keys() - wanted.keys() - set(optional))
    if others:
        raise ValueError(f"unexpected tensors {', '.join(others)}")
    for name, want in wanted.items():
        got = tensors[name]
        if got.shape != want.shape:
            raise ValueError(f"{name} must have shape {list(want.shape)}, got {list(got.shape)}")
        if got.dtype != want.dtype:
            raise ValueError(f"{name} must have dtype {want.dtype}, got {got.dtype}")


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values, as hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
