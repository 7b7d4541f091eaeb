"""Measure one case: check the peers, then time all competitors round by round."""

import gc
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from memattn.bench.case import Case, Forward, Peer
from memattn.bench.memory import MemoryJob, call_of, cpu_peaks, cuda_peak
from memattn.bench.result_check import SMALL_T, ExpectedResults, check_peer, check_subject
from memattn.bench.roof_samples import RoofSamples
from memattn.bench.timing import MIN_SAMPLE, Timing, interleave, speedup
from memattn.ops._dispatch import resolve_backend

DIRECTIONS = ("forward", "backward", "forward+backward")
OURS = "memattn"


@dataclass
class Measurement:
    """What was measured of one competitor on one case in one direction."""

    case: Case
    direction: str
    competitor: str
    timing: Timing | None = None
    reason: str | None = None  # why it was not timed
    speedup: Timing | None = None  # of our operator over this one, round by round
    peak_bytes: int | None = None
    roof_sample: int | None = None  # index of the roof sample taken straight after


@dataclass(frozen=True)
class TimingBudget:
    """How long to time each competitor, and from what size on one is left out."""

    seconds: float = 0.5  # for each competitor and direction
    min_rounds: int = 5
    min_sample: float = MIN_SAMPLE  # seconds of one sample on the CPU
    max_score_bytes: int = 1 << 30
    compiled: bool = True  # whether to measure peers that must be compiled


@dataclass
class Competitor:
    """A function to time, or by direction the reasons why it cannot be."""

    name: str
    forward: Forward | None = None
    reasons: dict[str, str] = field(default_factory=dict)


def refusal(case: Case, backend: str, budget: TimingBudget) -> str | None:
    """Why our operator cannot be measured on this machine; None if it can."""
    if "cuda" in case.device and not torch.cuda.is_available():
        return "not measured: no CUDA device"
    query = torch.empty(0, dtype=case.dtype, device=case.device)
    if resolve_backend(backend, query) != "reference":
        return None
    return _too_large(case.peers()["naive"], budget)


def _too_large(peer: Peer, budget: TimingBudget) -> str | None:
    if peer.score_bytes <= budget.max_score_bytes:
        return None
    return f"not run: would store {peer.score_bytes / 2**30:.1f} GiB of scores or masks"


def check_all(
    cases: Mapping[Case, Iterable[str]],
    backend: str,
    budget: TimingBudget,
    step: Callable[[str], None],
) -> None:
    """Check our operator on all cases and directions before anything is timed.

    Raises:
        WrongResultError: If a result exceeds the error budget.
    """
    for case, directions in cases.items():
        step(f"checking {case.label()}")
        if refusal(case, backend, budget) is None:
            check_subject(case, backend, gradients=any(d != "forward" for d in directions))


def measure_case(
    case: Case,
    *,
    backend: str,
    directions: Sequence[str] = DIRECTIONS,
    peers: Sequence[str] | None = None,
    budget: TimingBudget,
    check_peers: bool = True,
) -> list[Measurement]:
    """Time our operator and its peers on one case. Our operator must have passed ``check_all``.

    Args:
        case: What to compute.
        backend: Backend of our operator.
        directions: From ``DIRECTIONS``.
        peers: Names of peers, or None for all that the case has.
        budget: How long to measure.
        check_peers: Whether to compare the peers' results first; False if they have been compared.

    Returns:
        One row for each direction and competitor, ours first.
    """
    reason = refusal(case, backend, budget)
    if reason is not None:
        return [Measurement(case, direction, OURS, reason=reason) for direction in directions]
    competitors = [Competitor(OURS, case.subject(backend))]
    wanted = {n: peer for n, peer in case.peers().items() if peers is None or n in peers}
    if wanted:
        expected = _expected_results(case, directions) if check_peers else None
        for name, peer in wanted.items():
            competitors.append(_admit(case, expected, name, peer, directions, budget))
        del expected
    rows = []
    for direction in directions:
        rows += _time_direction(case, direction, competitors, budget)
    return rows


def _expected_results(case: Case, directions: Sequence[str]) -> ExpectedResults:
    """Expected results for peers, at a small length if ``case.is_checked_short()``."""
    small = case.resized(min(case.T, SMALL_T))
    part = small if case.is_checked_short() else case
    gradients = any(direction != "forward" for direction in directions)
    return ExpectedResults(
        part, gradients=gradients and (part == small or part.rows_are_independent())
    )


def measure_together(
    cases: Sequence[Case], *, backend: str, direction: str, budget: TimingBudget
) -> list[Timing]:
    """Time our operator on several cases round by round, so that their times are comparable.

    Short calls are repeated within a sample; a single short call would run with cold caches after
    the long ones.
    """
    calls = {
        str(index): call_of(case, case.subject(backend), direction)
        for index, case in enumerate(cases)
    }
    return list(_interleave(calls, cases[0].device, budget).values())


def _interleave(
    calls: Mapping[str, Callable[[], object]], device: str, budget: TimingBudget
) -> dict[str, Timing]:
    return interleave(
        calls,
        device=device,
        seconds=budget.seconds,
        min_rounds=budget.min_rounds,
        min_sample=budget.min_sample,
    )


def _admit(
    case: Case,
    expected: ExpectedResults | None,
    name: str,
    peer: Peer,
    directions: Sequence[str],
    budget: TimingBudget,
) -> Competitor:
    """Build a peer and check it against ``expected``, if given; on failure record the reason."""
    competitor = Competitor(name)
    reason = None
    if peer.compiled and not budget.compiled:
        reason = "not run: takes long to compile"
    else:
        reason = _too_large(peer, budget)
    if reason is None:
        needs = {direction: direction != "forward" for direction in directions}
        for gradients in sorted(set(needs.values()), reverse=True):
            problem = _try_peer(case, expected, competitor, peer, gradients)
            if problem is not None:
                competitor.reasons |= {d: problem for d in needs if needs[d] >= gradients}
                # rebuild for the other directions: after a failed compilation PyTorch would run
                # the same function uncompiled
                competitor.forward = None
    else:
        competitor.reasons = dict.fromkeys(directions, reason)
    return competitor


def _try_peer(
    case: Case,
    expected: ExpectedResults | None,
    competitor: Competitor,
    peer: Peer,
    gradients: bool,
) -> str | None:
    """Check a peer; returns why it cannot be used, or None."""
    with warnings.catch_warnings(record=True) as caught:
        # PyTorch reports in warnings why a backend cannot run
        warnings.simplefilter("always")
        try:
            if competitor.forward is None:
                competitor.forward = peer.build()
            if expected is not None and peer.yardstick is None:
                check_peer(expected, competitor.forward, gradients=gradients)
            else:
                direction = "forward+backward" if gradients else "forward"
                call_of(case, competitor.forward, direction)()
        except Exception as error:  # a peer may fail in any way; the row gives the reason
            texts = [str(error), *(str(warning.message) for warning in caught)]
            lines = [text.strip().splitlines()[0] for text in texts if text.strip()]
            return "not available: " + "; ".join(dict.fromkeys(lines))[:300]
    return None


def _time_direction(
    case: Case, direction: str, competitors: Sequence[Competitor], budget: TimingBudget
) -> list[Measurement]:
    """Time our operator and the peers round by round, in one group.

    Slow peers and peers that store all scores are each timed apart, together with our operator
    only: after them the next call runs with cold caches and fragmented memory.
    """
    rows = {c.name: Measurement(case, direction, c.name) for c in competitors}
    peers = case.peers()
    calls = {}
    for competitor in competitors:
        if direction in competitor.reasons:
            rows[competitor.name].reason = competitor.reasons[direction]
        else:
            assert competitor.forward is not None
            calls[competitor.name] = call_of(case, competitor.forward, direction)
    heavy = [n for n in calls if n != OURS and (peers[n].score_bytes or peers[n].slow)]
    groups = [[name for name in calls if name not in heavy], *([OURS, name] for name in heavy)]
    for group in groups:
        few = any(name != OURS and peers[name].slow for name in group)
        timings = _interleave(
            {name: calls[name] for name in group},
            case.device,
            replace(budget, seconds=0.0, min_rounds=min(budget.min_rounds, 3)) if few else budget,
        )
        for name, timing in timings.items():
            rows[name].timing = rows[name].timing or timing
            if name != OURS:
                rows[name].speedup = speedup(timings[OURS], timing)
    for name in calls:
        if "cuda" in case.device and direction != "backward":
            rows[name].peak_bytes = cuda_peak(calls[name], case.device)
    del calls
    gc.collect()
    return list(rows.values())


def add_cpu_memory(rows: Sequence[Measurement], backend: str) -> None:
    """Measure the peak memory of all rows that ran on the CPU, in one fresh process.

    The backward alone has no peak: the forward keeps its tensors. A compiled peer has none either,
    because it would have to be compiled again.
    """
    jobs: list[tuple[Measurement, MemoryJob]] = []
    for row in rows:
        if row.timing is None or row.direction == "backward" or row.case.device != "cpu":
            continue
        if row.competitor == OURS:
            jobs.append((row, MemoryJob(row.case, row.direction, backend=backend)))
        elif not row.case.peers()[row.competitor].compiled:
            jobs.append((row, MemoryJob(row.case, row.direction, peer=row.competitor)))
    peaks = cpu_peaks([job for _, job in jobs])
    for (row, _), peak in zip(jobs, peaks, strict=True):
        row.peak_bytes = peak


def roof_key(case: Case) -> tuple[str, torch.dtype]:
    """Device and dtype, for which the roofs of a case are measured."""
    return case.device, case.dtype


def make_roof_samples(budget: TimingBudget) -> RoofSamples:
    """Roof samples that take a tenth of the budget."""
    return RoofSamples(budget.seconds / 10)


def measure_between_roofs(
    case: Case, roof_samples: RoofSamples, *, backend: str, budget: TimingBudget, **options: Any
) -> list[Measurement]:
    """``measure_case`` between two samples of the roofs."""
    if refusal(case, backend, budget) is not None:
        return measure_case(case, backend=backend, budget=budget, **options)
    roof_samples.sample_once(roof_key(case))
    rows = measure_case(case, backend=backend, budget=budget, **options)
    index = roof_samples.sample(roof_key(case))
    for row in rows:
        row.roof_sample = index
    return rows
