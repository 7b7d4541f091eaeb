"""One specialist as a folder: ``specialist.json`` says what it is of, beside its tensors."""

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
SAMPLES = 64  # numbers of a weight that count in the fingerprint


class SavedSpecialist(NamedTuple):
    """What a folder holds."""

    name: str
    model: dict[str, Any]  # what it is good for
    base: str  # fingerprint of the weights that it stood beside
    tensors: dict[str, Tensor]  # layers.<i>.…


def fingerprint(weights: Iterable[Tensor]) -> str:
    """A checksum of some numbers of each weight, the same in float32, float64 and bfloat16."""
    digest = hashlib.sha256()
    for weight in weights:
        values: Any = weight.detach()  # sharded or not
        values = (values.full_tensor() if hasattr(values, "full_tensor") else values).flatten()
        step = max(len(values) // SAMPLES, 1)
        chosen = values[::step][:SAMPLES].to(torch.bfloat16)
        digest.update(chosen.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_saved(folder: str | os.PathLike[str], saved: SavedSpecialist) -> None:
    """Write a folder, whole or not at all.

    Raises:
        ValueError: If there is something else in the folder.
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
        ValueError: If a file is damaged or something else.
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
