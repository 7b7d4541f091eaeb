"""Save one specialist as a folder: its tensors, and ``specialist.json`` with its description."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memattn.checks import must
from memattn.files import read_tensors, replacing, write_json, write_tensors

ABOUT, WEIGHTS, FORMAT = "specialist.json", "specialist.safetensors", "memattn-specialist-1"
SAMPLES = 64  # elements of each weight that enter the fingerprint


class SavedSpecialist(NamedTuple):
    """Content of a folder."""

    name: str
    model: dict[str, Any]  # type and sizes of the model that it fits
    base: str  # fingerprint of the base weights that it was trained with
    tensors: dict[str, Tensor]  # layers.<i>.…


def fingerprint(weights: Iterable[Tensor]) -> str:
    """A checksum over some elements of each weight, equal in float32, float64 and bfloat16."""
    digest = hashlib.sha256()
    for weight in weights:
        values: Any = weight.detach()  # sharded or not
        values = (values.full_tensor() if hasattr(values, "full_tensor") else values).flatten()
        step = max(len(values) // SAMPLES, 1)
        chosen = values[::step][:SAMPLES].to(torch.bfloat16)
        digest.update(chosen.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_saved(folder: str | os.PathLike[str], saved: SavedSpecialist) -> None:
    """Write a folder atomically.

    Raises:
        ValueError: If the folder contains anything else.
    """
    folder = Path(folder)
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not set(found) <= {ABOUT, WEIGHTS}:
        must("folder", "be new, empty or hold a saved specialist", f"{folder} with {found}")
    about = {"format": FORMAT, "name": saved.name, "model": saved.model, "base": saved.base}
    with replacing(folder) as temporary:
        write_tensors(temporary / WEIGHTS, saved.tensors, {"format": "pt"})
        write_json(temporary / ABOUT, about)


def read_saved(folder: str | os.PathLike[str]) -> SavedSpecialist:
    """Read a folder.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or of another kind.
    """
    path = Path(folder) / ABOUT
    if not path.is_file():
        raise FileNotFoundError(f"folder must hold {ABOUT}, got {folder}")
    tensors, _ = read_tensors(path.with_name(WEIGHTS), "SpecialistSet.export")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            must("folder", f"hold a specialist of format {FORMAT}", repr(about["format"]))
        return SavedSpecialist(about["name"], dict(about["model"]), about["base"], tensors)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"folder must hold a saved specialist, got {folder} ({error})") from error
