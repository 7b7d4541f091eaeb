"""An adapter as a folder: ``memory_config.json`` with its parts, ``memory.safetensors``.

Weights are named by layer, ``layers.<i>.…``, or ``shared.<part>.…`` if layers share them. Chapters
of texts are in a separate file.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memattn.adapters.structure import model_sizes, text_config
from memattn.checks import must
from memattn.files import replacing, write_json
from memattn.parts.chapters import FILE as CHAPTERS

CONFIG, WEIGHTS, FORMAT = "memory_config.json", "memory.safetensors", "memattn-adapter-1"
INSIDE = "memory_adapters"  # folder of adapters in the folder of a whole model
SIZES = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "num_layers")
NAMES = {  # of sizes in configurations of transformers
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "num_layers": "num_hidden_layers",
}


@dataclass
class SavedAdapter:
    """The content of a folder with an adapter.

    Attributes:
        parts: Kinds and fields of the parts.
        weights: Tensors by name.
        dtype: Dtype of the weights.
    """

    parts: list[dict[str, Any]]
    weights: dict[str, Tensor]
    dtype: torch.dtype


def save_adapter(
    folder: str | os.PathLike[str],
    base: Any,
    adapter: Any,
    *,
    state_dict: Mapping[str, Tensor] | None,
    is_main_process: bool,
) -> None:
    """Write an adapter of a model; see ``MemoryAdapter.save_pretrained``."""
    if not is_main_process:
        return  # others may have been given nothing
    weights = adapter_weights(adapter.modules, adapter.shared)
    if state_dict is not None:
        prefixes = {module: name for name, module in base.named_modules()}
        weights = {
            f"{prefix}.{name}": _find(state_dict, f"{prefixes[module]}.{name}")
            for prefix, module in _prefixes(adapter.modules, adapter.shared).items()
            for name in module.state_dict()
        }
    elif any(hasattr(tensor, "full_tensor") for tensor in weights.values()):
        must("state_dict", "be given for a sharded model", "None")
    _write(folder, base, adapter, weights)


def _find(state_dict: Mapping[str, Tensor], name: str) -> Tensor:
    """A weight by its name in the model; the name may have a prefix in ``state_dict``."""
    for key, tensor in state_dict.items():
        if key == name or key.endswith(f".{name}"):
            return tensor
    must("state_dict", f"have {name}", f"{len(state_dict)} tensors")


def _write(
    folder: str | os.PathLike[str], base: Any, adapter: Any, weights: Mapping[str, Tensor]
) -> None:
    """Write a folder atomically.

    Raises:
        ValueError: If there is something else in the folder.
    """
    folder = Path(folder)
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not set(found) <= {CONFIG, WEIGHTS, CHAPTERS}:
        must("folder", "be new, empty or hold a saved adapter", f"{folder} with {found}")
    dtypes = (p.dtype for p in adapter.parameters() if p.is_floating_point())
    config = {
        "format": FORMAT,
        "base": model_facts(base),
        "dtype": str(next(dtypes, torch.float32)).removeprefix("torch."),
        "parts": [part.to_dict() for part in adapter.parts.values()],
    }
    # copies: safetensors refuses tensors that share memory
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in weights.items()}
    with replacing(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, {"format": "pt"})
        write_json(temporary / CONFIG, config)
        adapter.chapters.write(temporary / CHAPTERS)


def model_facts(base: Any) -> dict[str, Any]:
    """Type and sizes of a model by their names in its configuration."""
    sizes = model_sizes(base)
    values = {NAMES.get(name, name): getattr(sizes, name) for name in SIZES}
    return {"model_type": text_config(base).model_type, **values}


def read_adapter(folder: str | os.PathLike[str], base: Any) -> SavedAdapter:
    """Read a folder, and check that it was saved from a model like this one.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or of a model with another architecture or other sizes.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"folder must hold {name}, got {folder}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"folder must hold a saved adapter, got {folder} ({error})") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        got = config.get("format") if isinstance(config, dict) else config
        must("folder", f"hold an adapter of format {FORMAT}", repr(got))
    _check_fields(CONFIG, config, {"format": str, "base": dict, "dtype": str, "parts": list})
    own = model_facts(base)
    _check_fields(f"{CONFIG} base", config["base"], {n: type(v) for n, v in own.items()})
    for name, value in config["base"].items():
        if own[name] != value:
            saved = f"be {value!r}, which the adapter in {folder} was saved from"
            must(f"model.config.{name}", saved, repr(own[name]))
    dtype = getattr(torch, config["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        must(f"{CONFIG} dtype", "be one of torch", repr(config["dtype"]))
    return SavedAdapter(config["parts"], weights, dtype)


def _check_fields(name: str, values: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """Raise ValueError unless exactly these fields are given, each of its type."""
    for field in values:
        if field not in types:
            must(f"{name} {field}", f"be a field ({', '.join(types)})", values[field])
    for field, kind in types.items():
        if field not in values:
            must(name, f"have the field {field}", ", ".join(values) or "none")
        if not isinstance(values[field], kind):
            must(f"{name} {field}", f"be of type {kind.__name__}", repr(values[field]))


def adapter_weights(modules: Mapping[int, nn.Module], shared: Mapping[str, nn.Module]) -> Any:
    """Weights of an adapter by their names in a file."""
    return {
        f"{prefix}.{name}": tensor
        for prefix, module in _prefixes(modules, shared).items()
        for name, tensor in module.state_dict().items()
    }


def load_weights(
    modules: Mapping[int, nn.Module], shared: Mapping[str, nn.Module], weights: Mapping[str, Tensor]
) -> None:
    """Put saved weights into new modules.

    Raises:
        ValueError: If names or shapes differ.
    """
    wanted = adapter_weights(modules, shared)
    for what, names in (
        ("have", wanted.keys() - weights.keys()),
        ("not have", weights.keys() - wanted.keys()),
    ):
        if names:
            must(WEIGHTS, f"{what} {min(names)}", f"{len(weights)} tensors")
    for name, tensor in wanted.items():
        if tensor.shape != weights[name].shape:
            allowed = f"have {name} of shape {list(tensor.shape)}"
            must(WEIGHTS, allowed, list(weights[name].shape))
    for prefix, module in _prefixes(modules, shared).items():
        own = {name: weights[f"{prefix}.{name}"] for name in module.state_dict()}
        module.load_state_dict(own)


def _prefixes(
    modules: Mapping[int, nn.Module], shared: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """The modules of an adapter by the prefix of their names in a file."""
    found = {f"shared.{part}": module for part, module in shared.items()}
    return found | {f"layers.{layer}": module for layer, module in modules.items()}
