"""Read configuration files of training runs."""

from pathlib import Path
from typing import Any

from memattn.train.config import TrainConfig, read_config
from memattn.train.memory_file import from_memory_file, is_memory_file


def upgrade_file(values: dict[str, Any]) -> dict[str, Any]:
    """Convert the sections of a file, which may be a memory file, to those of ``TrainConfig``."""
    if is_memory_file(values):
        values = from_memory_file(values)
    model = values.get("model")
    if isinstance(model, dict) and model.get("model_path") is not None and "preset" not in model:
        values = {
            **values,
            "model": {**model, "preset": None},
        }  # overrides the command's default preset
    return values


def load_config(path: str | Path) -> TrainConfig:
    """Read a YAML file with the fields of ``TrainConfig``, or with those of ``memory_file``.

    Args:
        path: The file. Missing fields have their defaults.

    Returns:
        The checked configuration.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML, or a field is unknown or wrong.
    """
    return read_config(TrainConfig, path, upgrade_file)
