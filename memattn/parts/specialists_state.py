"""Cached state of specialists: keys and values of the open ones, and sums for the gate."""

from collections.abc import Callable, Iterable
from typing import Any

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
        super().__init__(kind, segment_len, window_size)

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
        if wanted != self.names and not self.kept and begins():
            self.names = wanted
            self.tokens = {}
        for name in wanted:
            if name not in self.names:
                had = ", ".join(self.names) or "none"
                what = f"hold specialist {name}, open since the first call"
                must("past_key_values", what, had)
        return self.names
