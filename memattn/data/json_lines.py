"""Text files and JSON Lines, with errors that name file and line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_utf8(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: If it is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"source must be UTF-8 text, got {path} ({error})") from None


def read_json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The place, ``path:line``, and the value of each line that is not empty.

    Raises:
        ValueError: If a line is no JSON.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} must be JSON, got {error}") from None
