"""Losses of parts: sums and counts over the layers of a call, and their place in model outputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memattn.parts.base import PARTS, PartConfig, PartOutput


def check_output(part: PartConfig, output: PartOutput, *, measured: bool) -> None:
    """Raise ValueError unless a part returned exactly the losses and the carry that it declares."""
    wanted: set[str] = set(part.losses) if measured else set()
    if set(output.losses) != wanted or output.carry.keys() - set(part.carries):
        raise ValueError(
            f"{part.path} must return losses {sorted(wanted)} and carry of "
            f"{list(part.carries)}, got {sorted(output.losses)} and {sorted(output.carry)}"
        )


class LossSums:
    """Sums and counts of losses over layers, and their means."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}
        self._counts: dict[str, list[Tensor]] = {}

    def add(self, losses: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add losses by name, each as a sum and a count."""
        for name, (total, count) in losses.items():
            self._sums.setdefault(name, []).append(total)
            self._counts.setdefault(name, []).append(count)

    def means(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Means and counts by name; a mean with count 0 is 0."""
        counts = {name: torch.stack(found).sum() for name, found in self._counts.items()}
        means = {
            name: torch.stack(found).sum() / counts[name].clamp(min=1.0)
            for name, found in self._sums.items()
        }
        return means, counts


class NamedLosses:
    """Base of outputs with ``losses``: each loss is also an attribute.

    The attribute is None if the loss was not measured.
    """

    losses: dict[str, Tensor] | None

    def __getattr__(self, name: str) -> Any:
        losses: dict[str, Tensor] = self.__dict__.get("losses") or {}
        if name in losses or any(name in part.reports for part in PARTS.values()):
            return losses.get(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
