"""Run benchmarks: check, measure, print, save. Every printed number was measured in this run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from memattn.bench import report
from memattn.bench.case import Case, check_choice, operators
from memattn.bench.engine import (
    DIRECTIONS,
    Measurement,
    TimingBudget,
    add_cpu_memory,
    check_all,
    make_roof_samples,
    measure_between_roofs,
)
from memattn.bench.memory import keep_freed_memory
from memattn.bench.suite import SUITES, run_suite
from memattn.checks import check_int, must
from memattn.files import check_writable
from memattn.ops._dispatch import BACKENDS

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEVICES = ("auto", "cpu", "cuda")
LENGTHS = {"cpu": (1024, 2048, 4096), "cuda": (2048, 8192, 32768)}
SUITE_SECONDS = 2.0  # for each competitor and direction of a bar
SUITE_SAMPLE = 0.1  # seconds of one sample
QUICK_LENGTHS = {"cpu": (256, 512), "cuda": (2048, 4096)}


def run(
    names: Sequence[str] | None = None,
    *,
    kinds: Sequence[str] | None = None,
    seq_lens: Sequence[int] | None = None,
    shape: Mapping[str, int] | None = None,
    directions: Sequence[str] | None = None,
    peers: Sequence[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    quick: bool = False,
    suite: str | None = None,
    seed: int = 0,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Measure operators beside their peers, print tables, and save JSON and plots.

    Each operator is first checked against its definition in float64, on every case that will be
    measured; if a case is wrong, nothing is printed for that operator. Peers are checked too; the
    row of a peer that is wrong or cannot run gives the reason. The process keeps freed memory from
    here on; see ``memattn.bench.memory.keep_freed_memory``.

    Args:
        names: Operators; None for all.
        kinds: Kinds of cases, such as ``"causal"``; None for all, or for a few if ``quick``.
        seq_lens: Lengths T to measure at.
        shape: Sizes that differ from the defaults, such as ``{"H": 16, "window_size": 512}``.
        directions: From ``forward``, ``backward``, ``forward+backward``.
        peers: Names of peers, such as ``"sdpa flash"``; None for all, empty for none.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``: CUDA where there is one.
        dtype: ``"float32"``, ``"float16"``, ``"bfloat16"``, or ``"auto"``: float32 on the CPU,
            bfloat16 on CUDA.
        backend: Backend of our operators.
        quick: Small sizes, fewer samples, no compiled peers: under a minute.
        suite: ``"cpu-bars"`` or ``"gpu-bars"``: measure these performance targets and print what
            was reached. Kinds, lengths, shape, directions and peers cannot be given with it.
        seed: Seed of the inputs.
        out: Folder for ``bench.json`` and the plots; None writes nothing.

    Returns:
        The content of ``bench.json``.

    Raises:
        WrongResultError: If one of our operators is wrong.
        ValueError: If an argument is unknown or does not fit the operator.
    """
    classes = _choose(names, kinds or (), shape or {})
    check_choice("device", device, DEVICES)
    check_choice("dtype", dtype, ("auto", *DTYPES))
    check_choice("backend", backend, BACKENDS)
    check_int("seed", seed, 0)
    if out is not None:
        check_writable("out", Path(out))
    chosen = {
        "kinds": kinds,
        "seq_lens": seq_lens,
        "shape": shape,
        "directions": directions,
        "peers": peers,
    }
    budget = default_timing_budget(quick)
    if suite is not None:
        check_choice("suite", suite, tuple(SUITES))
        for name, value in {**chosen, "quick": quick or None}.items():
            if value is not None:
                must(name, "be left out with suite", value)
        keep_freed_memory()
        budget = suite_timing_budget(budget)
        record = run_suite(suite, classes, backend, seed, budget)
    else:
        for direction in directions or ():
            check_choice("directions", direction, DIRECTIONS)
        default = ("forward", "backward") if quick else DIRECTIONS
        keep_freed_memory()
        cases = _cases(classes, kinds, seq_lens, shape or {}, device, dtype, quick, seed)
        record = _run_cases(cases, directions or default, peers, backend, seed, budget)
    if out is not None:
        save(record, Path(out))
    return record


def default_timing_budget(quick: bool = False) -> TimingBudget:
    """Timing budget outside suites; quick runs have less."""
    budget = TimingBudget(seconds=0.1, min_rounds=3, compiled=False) if quick else TimingBudget()
    return replace(budget, max_score_bytes=8 << 30) if torch.cuda.is_available() else budget


def suite_timing_budget(budget: TimingBudget) -> TimingBudget:
    """The budget with the times of a suite."""
    return replace(budget, seconds=SUITE_SECONDS, min_sample=SUITE_SAMPLE)


def save(record: Mapping[str, Any], folder: Path) -> None:
    """Write ``bench.json``, and plots of the cases measured at several lengths."""
    report.save_json(record, folder / "bench.json")
    report.say(f"wrote {folder / 'bench.json'}")
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for row in record["rows"]:
        groups.setdefault((row["operator"], row["case"], row["device"]), []).append(row)
    sweeps = record.get("sweeps")
    if (groups or sweeps) and find_spec("matplotlib") is None:
        report.say("no plots: matplotlib is not installed")
        return
    if sweeps:
        path = folder / "sweeps.png"
        report.plot_sweeps(sweeps, path, f"{record['suite']}: a line is flat where cost is linear")
        report.say(f"wrote {path}")
    for (operator, kind, device), rows in groups.items():
        if len({row["T"] for row in rows if row["seconds"] is not None}) > 1:
            name = record["machine"]["gpu" if device == "cuda" else "cpu"]
            name = name if isinstance(name, str) else f"{name['name']}, {name['threads']} threads"
            path = folder / f"{operator}-{kind}.png"
            report.plot(rows, path, f"{operator}, {kind}, {rows[0]['dtype']}, {name}")
            report.say(f"wrote {path}")


def parse_shape(entries: Iterable[str]) -> dict[str, int]:
    """Sizes from texts such as ``"H=16"``.

    Raises:
        ValueError: If a text is not NAME=INTEGER.
    """
    shape = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        if not name or not value.isdecimal():
            must("shape", "be NAME=INTEGER", repr(entry))
        shape[name] = int(value)
    return shape


def _choose(
    names: Sequence[str] | None, kinds: Sequence[str], shape: Mapping[str, int]
) -> list[type[Case]]:
    """The named operators; without names those with all these kinds and sizes, else all."""
    known = operators()
    if names:
        for name in names:
            check_choice("operators", name, tuple(known))
        return [known[name] for name in dict.fromkeys(names)]
    fitting = [
        cls
        for cls in known.values()
        if set(kinds) <= cls.kinds.keys() and shape.keys() <= set(cls.size_names())
    ]
    return fitting or list(known.values())


def _cases(
    classes: Sequence[type[Case]],
    kinds: Sequence[str] | None,
    seq_lens: Sequence[int] | None,
    shape: Mapping[str, int],
    device: str,
    dtype: str,
    quick: bool,
    seed: int,
) -> list[Case]:
    """The chosen cases, also those of a missing device: their rows give that as the reason."""
    for T in seq_lens or ():
        check_int("seq_lens", T, 1)
    devices = (
        [device] if device != "auto" else ["cuda"] if torch.cuda.is_available() else DEVICES[1:]
    )
    cases: list[Case] = []
    for cls in classes:
        cls.check_sizes(shape)
        for kind in kinds or ():
            cls.check_kind(kind)
        for place in devices:
            sizes = {**(cls.cuda_sizes if place == "cuda" else {}), **shape}
            lengths = seq_lens or (QUICK_LENGTHS if quick else LENGTHS)[place]
            if place == "cuda" and not torch.cuda.is_available():
                lengths = lengths[:1]
            auto = torch.bfloat16 if place == "cuda" else torch.float32
            cases += [
                cls(
                    kind=kind,
                    T=T,
                    dtype=DTYPES.get(dtype, auto),
                    device=place,
                    seed=seed,
                    **sizes,
                )
                for kind in kinds or (cls.quick_kinds if quick else cls.kinds)
                for T in lengths
            ]
    return cases


def _run_cases(
    cases: Sequence[Case],
    directions: Sequence[str],
    peers: Sequence[str] | None,
    backend: str,
    seed: int,
    budget: TimingBudget,
) -> dict[str, Any]:
    """Measure operator by operator, and print each operator when it is complete."""
    if peers is not None:
        known = dict.fromkeys(name for case in cases for name in case.peers())
        for peer in peers:
            check_choice("peers", peer, tuple(known))
    roof_samples = make_roof_samples(budget)
    kept: dict[str, list[Measurement]] = {}
    for operator in dict.fromkeys(case.operator for case in cases):
        own = [case for case in cases if case.operator == operator]
        rows: list[Measurement] = []
        with report.progress(2 * len(own) + 1) as step:
            had = {case: [d for d in directions if case.has(d)] for case in own}
            check_all(had, backend, budget, step)
            for case, own_directions in had.items():
                step(case.label())
                rows += measure_between_roofs(
                    case,
                    roof_samples,
                    backend=backend,
                    directions=own_directions,
                    peers=peers,
                    budget=budget,
                )
            step("memory")
            add_cpu_memory(rows, backend)
        # later samples may raise the roofs: the shares in the final record are the valid ones
        report.print_rows(operator, report.row_records(rows, roof_samples))
        kept[operator] = rows
    record = {
        "machine": report.machine(seed),
        "backend": backend,
        "roofs": roof_samples.records(),
        "rows": [
            record for rows in kept.values() for record in report.row_records(rows, roof_samples)
        ],
    }
    report.print_machine(record)
    return record
