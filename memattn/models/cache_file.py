"""Caches as safetensors files: the tensors of each part of each layer.

A tensor is named ``layers.<i>.<part>.<kind>.<name>``; its kind is ``tokens`` or ``rows``, or
``restart`` for the rows that will restart. Names that begin with ``extra.`` belong to no layer.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memattn.checks import must
from memattn.files import read_tensors, write_tensors
from memattn.parts import PartState, part_type

FORMAT, OLD_FORMAT = "memattn-cache-2", "memattn-cache-1"
EXTRA = "extra."


class SavedCache(NamedTuple):
    """Content of a file."""

    layers: Sequence[Mapping[str, PartState]]
    position: int
    seq_start: Tensor  # int64 [B]
    seq_end: Tensor  # int64 [B]
    notes: Mapping[str, str] = {}  # further metadata
    extra: Mapping[str, Tensor] = {}  # tensors that belong to no layer
    columns: Tensor | None = None  # bool [B, position], if rows have holes


def write_cache(path: str | os.PathLike[str], cache: SavedCache) -> None:
    """Write a file atomically."""
    tensors = {"seq_start": cache.seq_start, "seq_end": cache.seq_end}
    if cache.columns is not None:
        tensors["columns"] = cache.columns
    tensors |= {f"{EXTRA}{name}": tensor for name, tensor in cache.extra.items()}
    for i, parts in enumerate(cache.layers):
        for name, state in parts.items():
            kinds = {"tokens": state.tokens, "rows": state.rows}
            if state.restart is not None:
                kinds["restart"] = {"rows": state.restart}
            if state.floor is not None:
                kinds["floor"] = {"rows": state.floor}
            tensors |= {
                f"layers.{i}.{name}.{kind}.{key}": tensor
                for kind, group in kinds.items()
                for key, tensor in group.items()
            }
    layers = [{name: state.describe() for name, state in parts.items()} for parts in cache.layers]
    metadata = {"format": FORMAT, "position": str(cache.position), "layers": json.dumps(layers)}
    metadata |= {f"{EXTRA}{name}": note for name, note in cache.notes.items()}
    write_tensors(path, tensors, metadata)


def read_cache(path: str | os.PathLike[str], device: str | torch.device) -> SavedCache:
    """Read a file of this format, or of format 1, which had only attention."""
    tensors, metadata = read_tensors(path, "MemAttnCache.save", device)
    layers: list[dict[str, PartState]] = []
    if metadata.get("format") == OLD_FORMAT:
        spans = json.loads(metadata["spans"])
        layers = [{"attention": PartState("", *span)} for span in spans]
        tensors = {_new_name(name): tensor for name, tensor in tensors.items()}
    elif metadata.get("format") == FORMAT:
        described = json.loads(metadata["layers"])
        layers = [{name: _empty(facts) for name, facts in parts.items()} for parts in described]
    else:
        must("path", f"be a saved MemAttnCache of format {FORMAT}", metadata.get("format"))
    bounds = [tensors.pop(name).cpu() for name in ("seq_start", "seq_end")]
    columns = tensors.pop("columns", None)
    columns = None if columns is None else columns.cpu()
    extra = {n.removeprefix(EXTRA): x for n, x in tensors.items() if n.startswith(EXTRA)}
    notes = {n.removeprefix(EXTRA): x for n, x in metadata.items() if n.startswith(EXTRA)}
    for name, tensor in tensors.items():
        if name.startswith(EXTRA):
            continue
        _, i, part, kind, key = name.split(".", 4)
        state = layers[int(i)][part]
        if kind in ("restart", "floor"):
            setattr(state, kind, tensor.cpu())
        else:
            getattr(state, kind)[key] = tensor
    position = int(metadata["position"])
    return SavedCache(layers, position, bounds[0], bounds[1], notes, extra, columns)


def _empty(facts: dict[str, Any]) -> PartState:
    """Create the state from ``PartState.describe``; files of format 1 do not name the part."""
    kind = facts["kind"]
    return (part_type(kind, "path").state_type if kind else PartState)(**facts)


def _new_name(name: str) -> str:
    """The new name of a tensor of format 1, which had only keys and values of attention."""
    prefix, _, key = name.rpartition(".")
    return f"{prefix}.attention.tokens.{key}" if prefix else name
