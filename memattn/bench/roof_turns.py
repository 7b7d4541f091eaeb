"""Roofs that hold: measured in turns with the cases, where each rate counts at its best.

One measurement at the end of a run meets the machine as it is then: something else that runs
there makes the roof low, and shares of it high. Here a short turn stands before the first case
and after each, so the best of them is the machine's own, and the turns around a case tell
whether the machine was disturbed while the case was timed.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from memattn.bench.roofline import Roofs, Work, measure_roofs

DISTURBED = 0.85  # of the best rate; below it the machine was doing something else as well
RATES = ("matmul_flops", "exps", "copy_bytes")
RoofKey = tuple[str, torch.dtype]


@dataclass
class RoofTurns:
    """What the machine reached in each turn, by device and dtype.

    Attributes:
        seconds: Time to spend, roughly, on each roof of a turn.
        measure: What takes a turn; called as ``memattn.bench.roofline.measure_roofs``.
        turns: The turns in their order.
    """

    seconds: float
    measure: Callable[..., Roofs] = measure_roofs
    turns: dict[RoofKey, list[Roofs]] = field(default_factory=dict)

    def begin(self, key: RoofKey) -> None:
        """Take the turn before the first case of its kind."""
        if key not in self.turns:
            self.turn(key)

    def turn(self, key: RoofKey) -> int:
        """Take a turn; returns how many there were before of its kind."""
        turns = self.turns.setdefault(key, [])
        turns.append(self.measure(*key, seconds=self.seconds))
        return len(turns) - 1

    def best(self) -> dict[RoofKey, Roofs]:
        """The roofs: each rate as in its best turn."""
        return {
            key: Roofs(*(max(getattr(turn, rate) for turn in turns) for rate in RATES))
            for key, turns in self.turns.items()
        }

    def beside(self, key: RoofKey, turn: int, work: Work) -> float:
        """The rate that rules ``work`` before and at ``turn``, the slower, over the best."""
        best = self.best()[key]
        rate = best.ruling(work)
        around = self.turns[key][max(turn - 1, 0) : turn + 1]
        return min(getattr(roofs, rate) for roofs in around) / getattr(best, rate)

    def records(self) -> list[dict[str, Any]]:
        """For JSON: the roofs, and every turn."""
        return [
            {
                "device": key[0],
                "dtype": str(key[1]).removeprefix("torch."),
                **asdict(best),
                "turns": [asdict(turn) for turn in self.turns[key]],
            }
            for key, best in self.best().items()
        ]
