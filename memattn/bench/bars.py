"""Bars: performance targets of the operators, each measured and compared in one run."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from memattn.bench.case import Case
from memattn.bench.engine import OURS, Measurement, roof_key
from memattn.bench.limits import LITTLE_IN_BFLOAT16, PEER_ON_THE_SAME_TILES
from memattn.bench.roofline import Roofs, work_of
from memattn.bench.timing import Timing
from memattn.ops._dispatch import multiplies_bfloat16

Sweep = tuple[tuple[Case, ...], str]  # cases to compare with each other, and the direction


@dataclass
class BarInputs:
    """The measurements that the bars of a suite are computed from."""

    rows: dict[tuple[Case, str, str], Measurement] = field(default_factory=dict)
    roofs: dict[tuple[str, torch.dtype], Roofs] = field(default_factory=dict)
    times: dict[Sweep, list[Timing]] = field(default_factory=dict)
    peaks: dict[Sweep, list[int | None]] = field(default_factory=dict)

    def ours(self, case: Case, direction: str) -> Measurement:
        return self.rows[case, direction, OURS]


@dataclass(frozen=True, kw_only=True)
class Bar(ABC):
    """A requirement on one number: ``target`` is the goal, ``must`` (if given) the minimum.

    ``limited_by`` explains what prevents the goal on machines that miss it.
    """

    case: Case
    direction: str
    target: float
    must: float | None = None
    limited_by: str | None = None

    unit: ClassVar[str]
    at_most: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"{self.case.label()}, {self.direction}"

    @property
    def peers(self) -> tuple[str, ...]:
        """Peers that have to be measured."""
        return ()

    @property
    def times(self) -> Sweep | None:
        """Cases that have to be timed together."""
        return None

    @property
    def memory(self) -> Sweep | None:
        """Cases whose peak memory has to be measured."""
        return None

    @property
    def directions(self) -> tuple[str, ...]:
        """Directions that have to be measured."""
        return (self.direction,)

    @abstractmethod
    def reached(self, measured: BarInputs) -> float | None:
        """The number, or None if a measurement that it needs is missing."""

    def holds(self, value: float, limit: float) -> bool:
        return value <= limit if self.at_most else value >= limit


@dataclass(frozen=True, kw_only=True)
class SpeedBar(Bar):
    """At least ``target`` times as fast as the fastest of the peers ``against``."""

    against: tuple[str, ...]

    unit: ClassVar[str] = "x"

    @property
    def name(self) -> str:
        return f"{super().name}: speed over {' or '.join(self.against)}"

    @property
    def peers(self) -> tuple[str, ...]:
        return self.against

    def reached(self, measured: BarInputs) -> float | None:
        rows = [measured.rows.get((self.case, self.direction, name)) for name in self.against]
        ratios = [row.speedup.median for row in rows if row is not None and row.speedup]
        return min(ratios, default=None)


@dataclass(frozen=True, kw_only=True)
class CostBar(Bar):
    """At most ``target`` times the time that the same work takes at the rate of a yardstick.

    ``priced`` is the case whose work counts, if it is not ``case`` itself.
    """

    against: str
    priced: Case | None = None

    unit: ClassVar[str] = "x"
    at_most: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"{super().name}: time over that of the same work at the rate of {self.against}"

    @property
    def peers(self) -> tuple[str, ...]:
        return (self.against,)

    def reached(self, measured: BarInputs) -> float | None:
        row = measured.rows.get((self.case, self.direction, self.against))
        yardstick = self.case.peers()[self.against].yardstick
        if row is None or row.speedup is None or yardstick is None:
            return None
        ours, its = (
            work_of(work, self.direction).flops
            for work in ((self.priced or self.case).work(), yardstick)
        )
        return its / ours / row.speedup.median


@dataclass(frozen=True, kw_only=True)
class RateBar(Bar):
    """At least ``target`` useful TFLOP/s."""

    unit: ClassVar[str] = " TFLOP/s"

    @property
    def name(self) -> str:
        return f"{super().name}: useful rate"

    def reached(self, measured: BarInputs) -> float | None:
        timing = measured.ours(self.case, self.direction).timing
        if timing is None:
            return None
        return work_of(self.case.work(), self.direction).flops / timing.median / 1e12


@dataclass(frozen=True, kw_only=True)
class TimeBar(Bar):
    """At most ``target`` milliseconds."""

    unit: ClassVar[str] = " ms"
    at_most: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"{super().name}: time"

    def reached(self, measured: BarInputs) -> float | None:
        timing = measured.ours(self.case, self.direction).timing
        return None if timing is None else 1e3 * timing.median


@dataclass(frozen=True, kw_only=True)
class RoofBar(Bar):
    """At least ``target`` percent of the measured roof that limits the work."""

    unit: ClassVar[str] = " %"

    @property
    def name(self) -> str:
        return f"{super().name}: share of the roof"

    def reached(self, measured: BarInputs) -> float | None:
        timing = measured.ours(self.case, self.direction).timing
        if timing is None:
            return None
        roofs = measured.roofs[roof_key(self.case)]
        return 100 * roofs.seconds(work_of(self.case.work(), self.direction)) / timing.median


@dataclass(frozen=True, kw_only=True)
class BackwardBar(Bar):
    """The backward takes at most ``target`` times as long as the forward."""

    direction: str = "backward"

    unit: ClassVar[str] = "x"
    at_most: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"{self.case.label()}: time of backward over forward"

    @property
    def directions(self) -> tuple[str, ...]:
        return ("forward", "backward")

    def reached(self, measured: BarInputs) -> float | None:
        forward, backward = (measured.ours(self.case, d).timing for d in self.directions)
        if forward is None or backward is None:
            return None
        return backward.median / forward.median


@dataclass(frozen=True, kw_only=True)
class FasterBar(Bar):
    """At least ``target`` times as fast as our operator on case ``base``, in the same rounds."""

    base: Case

    unit: ClassVar[str] = "x"

    @property
    def name(self) -> str:
        return f"{super().name}: speed over {self.base.label()}"

    @property
    def times(self) -> Sweep:
        return (self.base, self.case), self.direction

    @property
    def directions(self) -> tuple[str, ...]:
        return ()

    def reached(self, measured: BarInputs) -> float | None:
        timings = measured.times.get(self.times)
        return None if timings is None else timings[0].median / timings[1].median


@dataclass(frozen=True, kw_only=True)
class SweepBar(Bar):
    """A bar over several lengths of one case."""

    lengths: tuple[int, ...]

    at_most: ClassVar[bool] = True
    unit: ClassVar[str] = "x"

    @property
    def sweep(self) -> Sweep:
        return tuple(self.case.resized(T) for T in self.lengths), self.direction

    @property
    def directions(self) -> tuple[str, ...]:
        return ()

    def span(self) -> str:
        return f"T={self.lengths[0]}..{self.lengths[-1]}"


@dataclass(frozen=True, kw_only=True)
class FlatTimeBar(SweepBar):
    """Slowest over fastest time per token over the lengths."""

    @property
    def name(self) -> str:
        return f"{self.case.label(T=self.span())}, {self.direction}: spread of time per token"

    @property
    def times(self) -> Sweep:
        return self.sweep

    def reached(self, measured: BarInputs) -> float | None:
        timings = measured.times.get(self.sweep)
        if timings is None:
            return None
        cases, _ = self.sweep
        costs = [t.median / case.tokens() for case, t in zip(cases, timings, strict=True)]
        return max(costs) / min(costs)


@dataclass(frozen=True, kw_only=True)
class LinearMemoryBar(SweepBar):
    """Peak bytes per token at the longest length over those at the shortest."""

    @property
    def name(self) -> str:
        return f"{self.case.label(T=self.span())}, {self.direction}: growth of memory per token"

    @property
    def memory(self) -> Sweep:
        return self.sweep

    def reached(self, measured: BarInputs) -> float | None:
        peaks = measured.peaks.get(self.sweep)
        if peaks is None or not peaks[0] or peaks[-1] is None:
            return None
        cases, _ = self.sweep
        return peaks[-1] / cases[-1].tokens() / (peaks[0] / cases[0].tokens())


@dataclass(frozen=True, kw_only=True)
class BytesBar(Bar):
    """Bytes of a case over those of case ``base``; nothing is timed."""

    base: Case

    at_most: ClassVar[bool] = True
    unit: ClassVar[str] = "x"
    what: ClassVar[str]

    @property
    def name(self) -> str:
        return f"{super().name}: {self.what} over that of {self.base.label()}"

    @property
    def directions(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True, kw_only=True)
class PeakBar(BytesBar):
    """Peak bytes of a case over those of case ``base``."""

    what: ClassVar[str] = "peak memory"

    @property
    def memory(self) -> Sweep:
        return (self.base, self.case), self.direction

    def reached(self, measured: BarInputs) -> float | None:
        peaks = measured.peaks.get(self.memory)
        if peaks is None or not peaks[0] or peaks[1] is None:
            return None
        return peaks[1] / peaks[0]


@dataclass(frozen=True, kw_only=True)
class PeerPeakBar(Bar):
    """Peak bytes of our operator over those of a peer; for directions with a forward."""

    against: str

    unit: ClassVar[str] = "x"
    at_most: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"{super().name}: peak memory over that of {self.against}"

    @property
    def peers(self) -> tuple[str, ...]:
        return (self.against,)

    @property
    def peaks(self) -> set[tuple[Case, str, str]]:
        """The rows whose peak has to be measured."""
        return {(self.case, self.direction, name) for name in (OURS, self.against)}

    def reached(self, measured: BarInputs) -> float | None:
        ours, its = (
            measured.rows.get((self.case, self.direction, name)) for name in (OURS, self.against)
        )
        if ours is None or its is None or ours.peak_bytes is None or not its.peak_bytes:
            return None
        return ours.peak_bytes / its.peak_bytes


def bfloat16_bars(
    base: Case,
    against: str | None = None,
    directions: Sequence[str] = ("forward", "backward"),
) -> list[Bar]:
    """Speed in bfloat16 over float32, for processors with bfloat16 products.

    Args:
        base: The case in float32.
        against: A peer that computes the same; adds a bar on the speed over it.
        directions: Directions in which the kernels use bfloat16 products.
    """
    if not multiplies_bfloat16():
        return []
    case = replace(base, dtype=torch.bfloat16)
    bars: list[Bar] = []
    over_peers = {"forward": 2.0, "backward": 1.6}
    for direction in directions:
        on: Any = dict(case=case, direction=direction)
        bars.append(FasterBar(**on, base=base, target=1.6, limited_by=LITTLE_IN_BFLOAT16))
        if against is not None:
            on |= dict(against=(against,), limited_by=PEER_ON_THE_SAME_TILES)
            bars.append(SpeedBar(**on, target=over_peers[direction]))
    return bars
