"""``memattn bench --all``: measure every operator on one device; write records, plots and pages.

The output folder holds ``bench.md``, which compares all machines, and for each machine
``bench-<machine>.md`` with all its rows and ``machines/<machine>/<operator>.json`` and ``.png``.
All numbers on the pages come from the records. The pages are rewritten after each operator, so
an interrupted run keeps what it measured.
"""

import json
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from memattn.bench import pages, report
from memattn.bench.case import check_choice, operators
from memattn.bench.engine import TimingBudget
from memattn.bench.memory import keep_freed_memory
from memattn.bench.run import DEVICES, default_timing_budget, suite_timing_budget
from memattn.bench.suite import run_suite
from memattn.checks import check_int, must
from memattn.files import check_writable
from memattn.ops._dispatch import BACKENDS

FOLDER = "docs/results"
FORMAT = 2  # of a record; a change of what records hold raises it
SUITE_OF = {"cpu": "cpu-bars", "cuda": "gpu-bars"}


def run_all(
    names: Sequence[str] | None = None,
    *,
    out: Path,
    device: str = "auto",
    backend: str = "auto",
    seed: int = 0,
    budget: TimingBudget | None = None,
) -> str:
    """Measure the bars of one device, operator by operator, and write pages of all records.

    Args:
        names: Operators; None for all. Records of other operators are left unchanged.
        out: The folder of pages and records.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``: CUDA where there is one.
        backend: Backend of our operators.
        seed: Seed of the inputs.
        budget: How long to measure; None for the times of a suite.

    Returns:
        The machine's name in files and pages.

    Raises:
        WrongResultError: If one of our operators is wrong. What was measured before is kept.
        ValueError: Before anything is measured: an operator, device or backend that does not
            exist, a folder that cannot be written to, a record in it of another format.
    """
    known = operators()
    for name in names or ():
        check_choice("operators", name, tuple(known))
    check_choice("device", device, DEVICES)
    check_choice("backend", backend, BACKENDS)
    check_int("seed", seed, 0)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        must("device", "be there: torch sees no CUDA device", device)
    check_writable("out", out)
    records = read_records(out)
    keep_freed_memory()
    budget = suite_timing_budget(default_timing_budget()) if budget is None else budget
    machine = machine_name(report.machine(seed), device)
    for name in names or known:
        record = run_suite(SUITE_OF[device], [known[name]], backend, seed, budget)
        if not record["bars"]:
            continue
        record = {"format": FORMAT, "operator": name, **record}
        folder = out / "machines" / machine
        report.save_json(record, folder / f"{name}.json")
        if record["sweeps"] and find_spec("matplotlib") is not None:
            title = f"{name} on {machine}: a line is flat where cost is linear"
            report.plot_sweeps(record["sweeps"], folder / f"{name}.png", title)
        records.setdefault(machine, {})[name] = record
        written = pages.write(records, out)
        report.say(f"wrote {folder / name}.json, {', '.join(map(str, written))}")
    return machine


def machine_name(machine: Mapping[str, Any], device: str) -> str:
    """The machine's name in files: the GPU, or the processor with vector set and threads."""
    cpu = machine["cpu"]
    text = machine["gpu"] if device == "cuda" else None
    text = text or f"{cpu['name']} {cpu['capability']} {cpu['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records in a folder, by machine and operator.

    Raises:
        ValueError: If one cannot be read, or was written in another format.
    """
    records: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("machines/*/*.json")):
        try:
            record = json.loads(path.read_text())
            found = record.get("format")
        except (OSError, ValueError, AttributeError) as error:
            must("out", "hold records that can be read", f"{path}: {error}")
        if found != FORMAT:
            must("out", f"hold records of format {FORMAT}", f"{path} of format {found}")
        records.setdefault(path.parent.name, {})[path.stem] = record
    return records
