"""Tasks and models in files: safetensors, with all that it takes to build them again."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memattn.ops._checks import must

_TASK = "memattn.DTGMATask/1"
_MODEL = "memattn.DTGMAModel/1"


@dataclass(frozen=True)
class TaskFile:
    """What a file holds of a task.

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
        about, named = _load(path, _TASK, "save_task")
        return cls(about, _part(named, "task."), _part(named, "shared."))


@dataclass(frozen=True)
class ModelFile:
    """What a file holds of a model.

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
        about, named = _load(path, _MODEL, "save")
        tasks = [_part(named, f"tasks.{i}.") for i in range(len(about["tasks"]))]
        return cls(about, tasks, _part(named, "shared."))


def _save(
    path: str | PathLike[str], kind: str, about: dict[str, Any], named: Mapping[str, Tensor]
) -> None:
    from safetensors.torch import save_file

    # clones: safetensors refuses tensors that share memory
    named = {name: t.detach().cpu().contiguous().clone() for name, t in named.items()}
    target = Path(path)
    part = target.with_name(target.name + ".part")
    try:
        save_file(named, part, metadata={"format": kind, "about": json.dumps(about)})
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _load(
    path: str | PathLike[str], kind: str, writer: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"path must be a file that {writer} wrote, got {path}")
    try:
        with safe_open(fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path must be a whole safetensors file, got {path}: {error}") from None
    if metadata.get("format") != kind:
        must("path", f"hold what has format {kind}", f"{path}: {metadata.get('format')}")
    return json.loads(metadata["about"]), named


def _part(named: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in named.items() if n.startswith(prefix)}


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values, as hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
