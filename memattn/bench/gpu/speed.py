"""Stage "speed": measure the bars of a GPU and their peers, our operators first.

First, several processes check and compile the cases in parallel (``prepare``). Then one process
that has the GPU to itself times them (``measure``); it finds the compiled kernels in the compilers'
caches.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, TypeVar

import torch

from memattn.bench import report
from memattn.bench.bars import Bar, BarInputs, Sweep
from memattn.bench.case import Case, operators
from memattn.bench.engine import (
    OURS,
    Measurement,
    TimingBudget,
    measure_between_roofs,
    measure_together,
)
from memattn.bench.gpu.pool import Job, Result
from memattn.bench.memory import call_of
from memattn.bench.result_check import ExpectedResults, WrongResultError, check_peer, check_subject
from memattn.bench.roof_samples import RoofSamples
from memattn.bench.suite import bar_record

TIMING_BUDGET = TimingBudget(seconds=0.12, min_rounds=5, max_score_bytes=8 << 30)
# peers that are measured even if no bar compares with them
ALWAYS_COMPARED = ("sdpa cudnn", "sdpa flash")
BOTH = ("forward", "backward")
CaseT = TypeVar("CaseT", bound=Case)
# sizes of a dry run, where a case has them
DRY = {"B": 1, "H": 2, "D": 16, "T": 40, "future_dim": 8, "n_tasks": 1, "window_size": 16}
DRY |= {"segment_len": 16, "P": 2, "M": 2, "C": 6, "K": 2, "E": 16, "F": 4}
DRY |= {"device": "cpu", "dtype": torch.float32}


@dataclass
class MeasurementPlan:
    """The cases and sweeps that the bars of some operators need, in the order to measure them."""

    bars: list[Bar]
    cases: list[Case] = field(default_factory=list)
    directions: dict[Case, list[str]] = field(default_factory=dict)
    peers: dict[Case, list[str]] = field(default_factory=dict)
    sweeps: list[Sweep] = field(default_factory=list)

    def compiled_peers(self, case: Case) -> list[str]:
        known = case.peers()
        return [name for name in self.peers[case] if known[name].compiled]


@cache
def plan(names: tuple[str, ...], dry: bool) -> MeasurementPlan:
    """The plan for these operators; it is the same in every process."""
    known = operators()
    own = [known[name].bars("gpu-bars") for name in names]
    bars = [_dry_bar(bar) if dry else bar for each in own for bar in each]
    found = MeasurementPlan(bars)
    # operators alternate, so that a time limit cuts off the last bars of each, not one operator
    queues = {name: [bar for bar in bars if bar.case.operator == name] for name in names}
    for place in range(max(map(len, queues.values()), default=0)):
        for queue in queues.values():
            if place < len(queue):
                _add(found, queue[place])
    return found


def _add(plan: MeasurementPlan, bar: Bar) -> None:
    if bar.directions and bar.case not in plan.directions:
        plan.cases.append(bar.case)
        plan.directions[bar.case] = []
        known = bar.case.peers()
        plan.peers[bar.case] = [name for name in ALWAYS_COMPARED if name in known]
    for name, values in (("directions", bar.directions), ("peers", bar.peers)):
        own = getattr(plan, name).get(bar.case)
        if own is not None:
            # a dry run lacks the peers that need a GPU
            known = values if name == "directions" else bar.case.peers()
            own += [value for value in values if value in known and value not in own]
    for sweep in (bar.times, bar.memory):
        if sweep is not None and sweep not in plan.sweeps:
            plan.sweeps.append(sweep)


def _dry_bar(bar: Bar) -> Bar:
    changes: dict[str, Any] = {"case": dry_case(bar.case)}
    if hasattr(bar, "lengths"):
        changes["lengths"] = (24, 40)
    return replace(bar, **changes)


def dry_case(case: CaseT) -> CaseT:
    """The case at the size of a dry run, on the CPU."""
    names = {field.name for field in fields(case)}
    sizes: dict[str, Any] = {name: value for name, value in DRY.items() if name in names}
    if "Hkv" in names:
        sizes["Hkv"] = None
    if case.operator == "chapter_attention":
        sizes["M"] = 16  # few rows per chapter, so that the interpreter runs few programs
    return replace(case, **sizes)


def prepare_jobs(names: tuple[str, ...], *, dry: bool) -> list[Job]:
    """Jobs that check every case and build every compiled peer; the slowest first."""
    chosen = plan(names, dry)
    common = {"task": "prepare", "operators": names, "dry": dry}
    peers = [
        common | {"index": index, "peer": name, "label": f"{case.label()}: {name}"}
        for index, case in enumerate(chosen.cases)
        for name in chosen.compiled_peers(case)
        if not dry
    ]
    own = [
        common | {"index": index, "peer": None, "label": case.label()}
        for index, case in enumerate(chosen.cases)
    ]
    return [*own[:3], *peers, *own[3:]]


def prepare(job: Job) -> Result:
    """Check our operator on a case, or build, check and run a compiled peer."""
    chosen = plan(tuple(job["operators"]), job["dry"])
    case = chosen.cases[job["index"]]
    directions = chosen.directions[case]
    gradients = any(direction != "forward" for direction in directions)
    small = _with_few_heads(case)
    try:
        if job["peer"] is None:
            check_subject(small, "triton", gradients=gradients)
            return {"status": "ok"}
        gradients = gradients and case.rows_are_independent()
        forward = small.peers()[job["peer"]].build()
        check_peer(ExpectedResults(small, gradients=gradients), forward, gradients=gradients)
    except WrongResultError as error:
        return {"status": "wrong", "reason": str(error)}
    torch.cuda.empty_cache()
    for direction in directions:  # fills the compilers' caches
        call_of(case, case.peers()[job["peer"]].build(), direction)()
    return {"status": "ok"}


def _with_few_heads(case: Case) -> Case:
    """The case with fewer heads, so that several processes can check at once."""
    sizes = case.sizes()
    few: dict[str, int] = {"B": 1}
    if "H" in sizes:
        most = 16 if case.T <= 8192 else 4  # 16 heads use the same kernel as 32
        few["H"] = min(sizes["H"], most)
        if (
            sizes["Hkv"] is not None
        ):  # as many query heads for each key head, which kernels depend on
            few["Hkv"] = max(sizes["Hkv"] * few["H"] // sizes["H"], 1)
            few["H"] = few["Hkv"] * (sizes["H"] // sizes["Hkv"])
    return replace(case, **few)


def speed_jobs(names: tuple[str, ...], *, dry: bool, wrong: Iterable[str]) -> list[Job]:
    """Timing jobs, the most important first: ours, with peers, with compiled peers, sweeps.

    Args:
        names: Operators.
        dry: Whether to run once without timing.
        wrong: Labels of cases that failed their check; they are not timed.
    """
    chosen, wrong = plan(names, dry), set(wrong)
    cases = [(i, case) for i, case in enumerate(chosen.cases) if case.label() not in wrong]
    common = {"task": "speed", "operators": names, "dry": dry}
    first: dict[str, tuple[int, Case]] = {}
    for index, case in cases:
        first.setdefault(case.operator, (index, case))
    jobs = [
        common | {"index": i, "peers": [], "directions": list(BOTH), "label": f"ours: {c.label()}"}
        for i, c in first.values()
    ]
    for compiled in (False, True):
        for index, case in cases:
            slow = chosen.compiled_peers(case)
            peers = slow if compiled else [n for n in chosen.peers[case] if n not in slow]
            if compiled and (dry or not slow):
                continue
            directions = chosen.directions[case]
            label = f"{case.label()} with {', '.join(peers) or 'no peers'}"
            jobs.append(
                common | {"index": index, "peers": peers, "directions": directions, "label": label}
            )
    for index, (sweep, direction) in enumerate(chosen.sweeps):
        if not wrong & {case.label() for case in sweep}:
            label = f"{sweep[0].kind} D={sweep[0].sizes()['D']} at {len(sweep)} lengths"
            jobs.append(
                common | {"task": "sweep", "index": index, "label": f"{label}, {direction}"}
            )
    return jobs


_BAR_INPUTS = BarInputs()  # measurements of this process
_ROOF_SAMPLES = RoofSamples(seconds=0.03)  # and the roofs sampled between them


def measure(job: Job) -> Result:
    """Time a case and its peers, which ``prepare`` has checked."""
    chosen = plan(tuple(job["operators"]), job["dry"])
    case, peers = chosen.cases[job["index"]], job["peers"]
    if job["dry"]:
        rows = _run_once(case, peers, job["directions"])
    else:
        rows = measure_between_roofs(
            case,
            _ROOF_SAMPLES,
            backend="triton",
            directions=job["directions"],
            peers=peers,
            budget=TIMING_BUDGET,
            check_peers=False,
        )
        _BAR_INPUTS.roofs = _ROOF_SAMPLES.best()
    _BAR_INPUTS.rows |= {(row.case, row.direction, row.competitor): row for row in rows}
    torch.cuda.empty_cache()
    return {
        "status": "ok",
        "rows": report.row_records(rows, _ROOF_SAMPLES),
        "roofs": _ROOF_SAMPLES.records(),
        "bars": [
            bar_record(bar, _BAR_INPUTS, "triton", TIMING_BUDGET)
            for bar in _complete_bars(chosen, case)
        ],
    }


def _complete_bars(chosen: MeasurementPlan, case: Case) -> list[Bar]:
    """Bars of the case whose measurements are complete."""
    rows = _BAR_INPUTS.rows
    return [
        bar
        for bar in chosen.bars
        if bar.case == case
        and bar.directions
        and all((case, direction, OURS) in rows for direction in bar.directions)
        and all((case, bar.direction, peer) in rows for peer in bar.peers)
    ]


def measure_sweep(job: Job) -> Result:
    """Time our operator at several lengths."""
    chosen = plan(tuple(job["operators"]), job["dry"])
    sweep, direction = chosen.sweeps[job["index"]]
    if job["dry"]:
        for case in sweep:
            call_of(case, case.subject("triton"), direction)()
        return {"status": "ok", "rows": [], "bars": []}
    _BAR_INPUTS.times[sweep, direction] = measure_together(
        sweep, backend="triton", direction=direction, budget=TIMING_BUDGET
    )
    torch.cuda.empty_cache()
    bars = [bar for bar in chosen.bars if bar.times == (sweep, direction)]
    return {
        "status": "ok",
        "rows": [],
        "bars": [bar_record(bar, _BAR_INPUTS, "triton", TIMING_BUDGET) for bar in bars],
    }


def _run_once(case: Case, peers: Iterable[str], directions: Iterable[str]) -> list[Measurement]:
    """Run our operator and the peers once, without timing."""
    rows = []
    known = case.peers()
    for name in (OURS, *peers):
        forward = case.subject("triton") if name == OURS else known[name].build()
        for direction in directions:
            reason = "dry run: not timed"
            try:
                call_of(case, forward, direction)()
            except RuntimeError as error:
                if name == OURS:
                    raise
                reason = f"not available: {error}".splitlines()[0]
            rows.append(Measurement(case, direction, name, reason=reason))
    return rows
