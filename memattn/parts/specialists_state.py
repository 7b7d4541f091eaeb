"""Cached state of specialists: keys and values of the open ones, and sums for the gate."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from memattn.checks import must
from memattn.parts.state import PartState


class SpecialistsState(PartState):
    """Keys and values ``[B, F, Hkv, S, D]`` of F specialists, and the sums that the gate needs.

    Args:
        kind: The part that it belongs to.
        segment_len: None.
        window_size: None.
        names: The specialists whose keys are kept, chosen by the first call.
    """

    def __init__(
        self,
        kind: str,
        segment_len: int | None = None,
        window_size: int | None = None,
        names: Iterable[str] = (),
    ) -> None:
        self.names = tuple(names)
        self._has_past = False
        super().__init__(kind, segment_len, window_size)

    def place(self, seq_start: Tensor, position: int) -> None:
        self._has_past = not (type(position) is int and position == 0)  # a traced one is unknown

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "names": list(self.names)}

    def fits(self, other: PartState) -> bool:
        """Whether this is a state of the same part, whichever specialists were open."""
        return self._facts(self) == self._facts(other)

    @staticmethod
    def _facts(state: PartState) -> dict[str, Any]:
        return {name: value for name, value in state.describe().items() if name != "names"}

    def choose(self, wanted: tuple[str, ...], begins: Callable[[], bool]) -> tuple[str, ...]:
        """The specialists whose keys are kept, including those in ``wanted``.

        Raises:
            ValueError: If one is wanted whose keys of earlier tokens are missing.
        """
        # a program has no values to look at
        first = (lambda: not self._has_past) if torch.compiler.is_exporting() else begins
        if wanted != self.names and not self.kept and first():
            self.names = wanted
            self.tokens = {}
        for name in wanted:
            if name not in self.names:
                had = ", ".join(self.names) or "none"
                what = f"hold specialist {name}, open since the first call"
                must("past_key_values", what, had)
        return self.names
