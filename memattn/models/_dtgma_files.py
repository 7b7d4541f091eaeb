"""One task in a file: safetensors, with all that a model needs to take it in."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memattn.ops._checks import must

_FORMAT = "memattn.DTGMATask/1"


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
        from safetensors.torch import save_file

        named = {f"task.{name}": t for name, t in self.tensors.items()}
        named |= {f"shared.{name}": t for name, t in self.shared.items()}
        # clones: safetensors refuses tensors that share memory
        named = {name: t.detach().cpu().contiguous().clone() for name, t in named.items()}
        target = Path(path)
        part = target.with_name(target.name + ".part")
        try:
            save_file(named, part, metadata={"format": _FORMAT, "about": json.dumps(self.about)})
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "TaskFile":
        """Read a file that ``save`` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds something else.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"path must be a file that save_task wrote, got {path}")
        try:
            with safe_open(fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"path must be a whole safetensors file, got {path}: {error}"
            ) from None
        if metadata.get("format") != _FORMAT:
            must("path", f"hold a task of format {_FORMAT}", f"{path}: {metadata.get('format')}")
        parts = {
            part: {n.removeprefix(part): t for n, t in named.items() if n.startswith(part)}
            for part in ("task.", "shared.")
        }
        return cls(json.loads(metadata["about"]), parts["task."], parts["shared."])


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values, as hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
