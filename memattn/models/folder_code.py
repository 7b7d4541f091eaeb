"""The Python file in a saved model's folder, through which transformers finds this package.

``config.json`` names this file. It imports the classes, so that
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` works without importing
this package first. If the package is not installed, transformers' error names it.
"""

from pathlib import Path
from typing import Any

FILE = "modeling_memattn.py"
CODE = '''"""The classes of this model are in the package memattn."""

from memattn.models import (
    MemAttnConfig,
    MemAttnForCausalLM,
    MemAttnForSequenceClassification,
    MemAttnForTokenClassification,
    MemAttnModel,
)

__all__ = [
    "MemAttnConfig",
    "MemAttnForCausalLM",
    "MemAttnForSequenceClassification",
    "MemAttnForTokenClassification",
    "MemAttnModel",
]
'''
AUTO_MAP = {
    "AutoConfig": "MemAttnConfig",
    "AutoModel": "MemAttnModel",
    "AutoModelForCausalLM": "MemAttnForCausalLM",
    "AutoModelForSequenceClassification": "MemAttnForSequenceClassification",
    "AutoModelForTokenClassification": "MemAttnForTokenClassification",
}


def write_code(folder: Path) -> None:
    """Write the file with the classes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(CODE, encoding="utf-8")


def with_auto_map(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a configuration with the location of its classes, keeping those of others."""
    module = FILE.removesuffix(".py")
    own = {auto: f"{module}.{name}" for auto, name in AUTO_MAP.items()}
    return {**values, "auto_map": own | values.get("auto_map", {})}


def without_auto_map(values: dict[str, Any]) -> dict[str, Any]:
    """The values without this location, also if transformers has prefixed it with a repository."""
    module = FILE.removesuffix(".py")
    others = {
        auto: name
        for auto, name in (values.get("auto_map") or {}).items()
        if str(name).rpartition("--")[2] != f"{module}.{AUTO_MAP.get(auto)}"
    }
    rest = {name: value for name, value in values.items() if name != "auto_map"}
    return {**rest, "auto_map": others} if others else rest
