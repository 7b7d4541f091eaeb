"""Checks of the ahead-of-time gate on a compiled kernel, and the counts that it compares with."""

import json
from pathlib import Path

import triton

from memattn_kernels.aot_kernel import Report, Variant

# bytes of shared memory that one program may have
SHARED_LIMITS = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
TENSOR_MEMORY_LIMIT = 512
# bytes of a thread: eight registers, most of them stored and loaded once by a program
SPILL_LIMIT = 32
# of the instructions of a hot loop, for loads and stores of spilled registers
LOOP_SPILL_LIMIT = 0.01
# of the matrix products of a hot loop: with one each ptxas has serialised them, for any reason
WAIT_LIMIT = 0.5
# a hot loop may be this much longer than the committed count
TOLERANCE = 0.02


def promised_programs(config: dict[str, int]) -> int:
    """Programs that a multiprocessor holds according to the configuration's cap on registers."""
    if "maxnreg" not in config:
        return 1
    return 65536 // (32 * config["num_warps"] * config["maxnreg"])


def faults(variant: Variant, report: Report) -> list[str]:
    """Reasons why a compiled kernel must not be shipped."""
    if report.error is not None:
        return [report.error]
    found = []
    limit = SHARED_LIMITS[variant.arch]
    if report.shared > limit:
        found.append(f"needs {report.shared} B of shared memory, {limit} are there")
    if report.tensor_memory > TENSOR_MEMORY_LIMIT:
        found.append(f"needs {report.tensor_memory} columns of tensor memory")
    if "specialized" in variant.config and report.warps == variant.config["num_warps"]:
        found.append("Triton left out its warp specialisation")
    if report.is_serialised:
        found.append("ptxas serialises its matrix products (C7515)")
    for loop in report.loops:
        if loop.spills > LOOP_SPILL_LIMIT * loop.instructions:
            found.append(f"{loop.spills} of {loop.instructions} instructions of a hot loop spill")
        if loop.waits > WAIT_LIMIT * loop.products:
            found.append(f"waits {loop.waits} times for {loop.products} matrix products")
    if report.spilled > SPILL_LIMIT:
        found.append(f"spills {report.spilled} B, {SPILL_LIMIT} may be")
    promised = promised_programs(variant.config)
    if report.programs < promised:
        found.append(f"{report.programs} programs on a multiprocessor, {promised} were promised")
    return found


def counts(reports: dict[str, Report]) -> dict[str, list]:
    """The committed part of the reports: registers, spilled bytes, programs, and hot loops."""
    return {
        name: [r.registers, r.spilled, r.programs, [loop.instructions for loop in r.loops]]
        for name, r in reports.items()
        if r.error is None
    }


def write_counts(path: Path, reports: dict[str, Report]) -> None:
    """Renew the entries of these kernels; those of another version of Triton are dropped."""
    old = read_counts(path) if path.exists() else {}
    lines = [
        f"  {json.dumps(name)}: {json.dumps(entry)}"
        for name, entry in sorted((old | counts(reports)).items())
    ]
    head = f'{{\n "triton": "{triton.__version__}",\n "counts": {{\n'
    path.write_text(head + ",\n".join(lines) + "\n }\n}\n")


def read_counts(path: Path) -> dict[str, list]:
    """The committed counts by name; empty if another version of Triton made them."""
    content = json.loads(path.read_text())
    return content["counts"] if content["triton"] == triton.__version__ else {}


def worse(old: dict[str, list], reports: dict[str, Report]) -> list[str]:
    """Changes for the worse against the committed counts: longer loops, spills, fewer programs."""
    found = []
    for name, (_, spilled, programs, loops) in counts(reports).items():
        if name not in old:
            continue
        _, old_spilled, old_programs, old_loops = old[name]
        if spilled > old_spilled:
            found.append(f"{name}: spills {spilled} B, not {old_spilled}")
        if programs < old_programs:
            found.append(f"{name}: {programs} programs on a multiprocessor, not {old_programs}")
        if len(loops) != len(old_loops):
            found.append(f"{name}: {len(loops)} hot loops, not {len(old_loops)}")
        for new, before in zip(loops, old_loops, strict=False):
            if new > before * (1 + TOLERANCE):
                found.append(f"{name}: {new} instructions in a hot loop, not {before}")
    return found
