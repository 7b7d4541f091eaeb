"""The states of the parts of one layer."""

from collections.abc import Mapping, Sequence
from typing import Any

from memattn.parts.state import PartState


class LayerStates:
    """The states of the parts of one layer, by name.

    Args:
        parts: State of each part.
    """

    def __init__(self, parts: Mapping[str, PartState]) -> None:
        self.parts = dict(parts)
        self.position = 0  # columns seen so far, set by SequenceStates


def same_parts(own: Mapping[str, PartState], wanted: Mapping[str, PartState]) -> bool:
    """Whether states are of the same parts."""
    return own.keys() == wanted.keys() and all(own[name].fits(wanted[name]) for name in own)


def same_layers(layers: Sequence[Any], wanted: Sequence[Mapping[str, PartState]]) -> bool:
    """Whether layers have exactly these parts."""
    return len(layers) == len(wanted) and all(
        same_parts(layer.parts, parts) for layer, parts in zip(layers, wanted, strict=True)
    )
