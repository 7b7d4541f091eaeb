"""Run a suite: measure what the bars of the operators need, and report each bar."""

from collections.abc import Sequence
from typing import Any

from memattn.bench import report
from memattn.bench.bars import Bar, BarInputs, PeerPeakBar, Sweep
from memattn.bench.case import Case
from memattn.bench.engine import (
    OURS,
    Measurement,
    TimingBudget,
    add_cpu_memory,
    check_all,
    make_roof_samples,
    measure_between_roofs,
    measure_together,
    refusal,
)
from memattn.bench.memory import MemoryJob, call_of, cpu_peaks, cuda_peak

SUITES = ("cpu-bars", "gpu-bars")


def run_suite(
    suite: str, classes: Sequence[type[Case]], backend: str, seed: int, budget: TimingBudget
) -> dict[str, Any]:
    """Measure, print and return the record of a suite; see ``memattn.bench.run``."""
    bars = [bar for cls in classes for bar in cls.bars(suite)]
    checks: dict[Case, list[str]] = {}  # directions
    peers: dict[Case, list[str]] = {}
    for bar in bars:
        if bar.directions:
            checks.setdefault(bar.case, []).extend(bar.directions)
            peers.setdefault(bar.case, []).extend(bar.peers)
    cases = {case: list(dict.fromkeys(directions)) for case, directions in checks.items()}
    times = list(dict.fromkeys(bar.times for bar in bars if bar.times))
    memory = list(dict.fromkeys(bar.memory for bar in bars if bar.memory))
    for sweep, direction in [*times, *memory]:
        for case in sweep:
            checks.setdefault(case, []).append(direction)

    measured, roof_samples = BarInputs(), make_roof_samples(budget)
    rows: list[Measurement] = []
    with report.progress(len(checks) + len(cases) + 1 + len(times) + len(memory)) as step:
        check_all(checks, backend, budget, step)
        for case, directions in cases.items():
            step(case.label())
            rows += measure_between_roofs(
                case,
                roof_samples,
                backend=backend,
                directions=directions,
                peers=peers[case],
                budget=budget,
            )
        measured.rows = {(row.case, row.direction, row.competitor): row for row in rows}
        peaks = set[Any]().union(*(bar.peaks for bar in bars if isinstance(bar, PeerPeakBar)))
        step("memory beside peers")
        add_cpu_memory([row for key, row in measured.rows.items() if key in peaks], backend)
        for sweep, direction in times:
            step(f"{len(sweep)} cases of {sweep[0].kind}, {direction}")
            if _possible(sweep, backend, budget):
                measured.times[sweep, direction] = measure_together(
                    sweep, backend=backend, direction=direction, budget=budget
                )
        for sweep, direction in memory:
            step(f"{sweep[0].kind} at {len(sweep)} lengths, {direction}, memory")
            if _possible(sweep, backend, budget):
                measured.peaks[sweep, direction] = _peaks(sweep, direction, backend)
    measured.roofs = roof_samples.best()
    record = {
        "machine": report.machine(seed),
        "backend": backend,
        "suite": suite,
        "roofs": roof_samples.records(),
        "rows": report.row_records(rows, roof_samples),
        "sweeps": _sweep_records(measured),
        "bars": [bar_record(bar, measured, backend, budget) for bar in bars],
    }
    report.print_rows(suite, record["rows"])
    _print_bars(record["bars"])
    report.print_machine(record)
    return record


def _possible(sweep: Sequence[Case], backend: str, budget: TimingBudget) -> bool:
    return all(refusal(case, backend, budget) is None for case in sweep)


def _peaks(sweep: Sequence[Case], direction: str, backend: str) -> list[int | None]:
    if "cuda" not in sweep[0].device:
        return cpu_peaks([MemoryJob(case, direction, backend=backend) for case in sweep])
    return [
        cuda_peak(call_of(case, case.subject(backend), direction), case.device) for case in sweep
    ]


def _sweep_records(measured: BarInputs) -> list[dict[str, Any]]:
    """Times and peaks over the lengths, for JSON."""
    sweeps: dict[Sweep, None] = dict.fromkeys([*measured.times, *measured.peaks])
    records = []
    for sweep in sweeps:
        cases, direction = sweep
        timings, peaks = measured.times.get(sweep), measured.peaks.get(sweep)
        for index, case in enumerate(cases):
            records.append(
                {
                    "operator": case.operator,
                    "label": case.label(),
                    "T": case.T,
                    "tokens": case.tokens(),
                    "direction": direction,
                    "seconds": None if timings is None else report.timing_record(timings[index]),
                    "peak_bytes": None if peaks is None else peaks[index],
                }
            )
    return records


def bar_record(bar: Bar, measured: BarInputs, backend: str, budget: TimingBudget) -> dict[str, Any]:
    """What a bar requires and what was reached, for JSON."""
    reached = bar.reached(measured)
    record: dict[str, Any] = {
        "bar": bar.name,
        "operator": bar.case.operator,
        "device": bar.case.device,
        "unit": bar.unit.strip(),
        "at_most": bar.at_most,
        "target": bar.target,
        "must": bar.must,
        "reached": reached,
        "met": None if reached is None else bar.holds(reached, bar.target),
        "met_must": None,
        "limited_by": bar.limited_by,
        "reason": None,
    }
    if reached is None:
        record["reason"] = _reason(bar, measured, backend, budget)
    elif bar.must is not None:
        record["met_must"] = bar.holds(reached, bar.must)
    return record


def _reason(bar: Bar, measured: BarInputs, backend: str, budget: TimingBudget) -> str:
    """Why a bar could not be measured."""
    needed = [*(bar.times or ((), ""))[0], *(bar.memory or ((), ""))[0], bar.case]
    for case in needed:
        reason = refusal(case, backend, budget)
        if reason is not None:
            return reason
    names = [OURS, *bar.peers]
    rows = [measured.rows.get((bar.case, bar.direction, name)) for name in names]
    return "; ".join(f"{r.competitor}: {r.reason}" for r in rows if r and r.reason) or (
        "not measured: this system does not report the memory of a process"
    )


def _print_bars(bars: Sequence[dict[str, Any]]) -> None:
    rows = []
    for bar in bars:
        sign, unit = "<=" if bar["at_most"] else ">=", bar["unit"]
        limit = f"{sign} {bar['target']:g} {unit}"
        if bar["must"] is not None:
            limit += f" (at least {bar['must']:g})"
        if bar["met"] is None:
            rows.append([bar["bar"], limit, "", bar["reason"]])
            continue
        verdict = "met" if bar["met"] else "MISSED"
        if bar["met_must"] and not bar["met"]:
            verdict = "missed, but the minimum is met"
        rows.append([bar["bar"], limit, f"{bar['reached']:.3g} {unit}", verdict])
    report.table("bars", ("bar", "required", "reached", ""), rows)
