"""Whether a finished run was made with the settings that are wanted now."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from memattn.checks import must


def check_same_settings(
    argument: str,
    file: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    free: Collection[str] = (),
    hint: str = "",
) -> None:
    """Raise unless a run in a folder had the settings that are wanted now.

    Args:
        argument: The argument that names the folder.
        file: The file that holds the run's settings.
        before: These settings; those of a section are a dictionary in it.
        now: The settings that are wanted.
        free: Names of settings that may differ, without their section.
        hint: What else the caller may do than name a new folder.

    Raises:
        ValueError: If others differ; names all of them with both values.
    """
    had, wanted = _flat(before), _flat(now)
    missing = "missing"
    different = [
        name
        for name in sorted({*wanted, *had})
        if name.rpartition(".")[2] not in free
        and wanted.get(name, missing) != had.get(name, missing)
    ]
    if different:
        new, old = (
            ", ".join(f"{name} {values.get(name, missing)}" for name in different)
            for values in (wanted, had)
        )
        also = f" ({hint})" if hint else ""
        must(argument, f"be a new folder for {new}{also}", f"{file} with {old}")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back, those of a section by names such as ``budget.lr``."""
    found: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(settings)).items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": part for key, part in value.items()}
        else:
            found[name] = value
    return found
