"""Results as files that are whole or absent."""

import json
from pathlib import Path
from typing import Any


def write_json(path: str | Path, values: Any) -> None:
    """Write values as JSON, in one step."""
    from memattn.data._files import write_text

    write_text(Path(path), json.dumps(values, indent=2, allow_nan=False) + "\n")
