"""Stage "retune": time other tile configurations, kernels far from their roof first."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from memattn.bench import retune
from memattn.bench.gpu.pool import Job, Pool, Result

DRY_LENGTH = 20
DRY_HEAD_DIM = 64  # a head dimension of the tables; the interpreter uses its own tiles
CHECK_SECONDS, TIME_SECONDS = 90, 60
PARTS = {"forward": ("fwd",), "backward": ("bwd_dkdv", "bwd_dq")}
BY_CHAPTER = {"forward": ("fwd_by_chapter",), "backward": ("bwd_dkdv", "bwd_dq_by_chapter")}
PRODUCTS = {"forward": ("logits",), "backward": ("d_weight", "d_hidden")}
# kinds of cases with their own kernels
KINDS = {"segmented_attention": ("dense", "causal", "window")}
WIDEST = 256  # widest head dimension of the tables


def targets(rows: Iterable[Mapping[str, Any]], operators: Iterable[str]) -> list[tuple[str, int]]:
    """Kernels and head dimensions, the furthest from the roof first; all without ``rows``."""
    shares: dict[tuple[str, int], float] = {}
    for row in rows:
        sizes, share = row["sizes"], row.get("roof_share")
        width = sizes["D"] if "D" in sizes else min(sizes["E"], WIDEST)
        if row["competitor"] != "memattn" or share is None or width not in (64, 128, WIDEST):
            continue
        for part in parts_of(row["operator"], row["case"]).get(row["direction"], ()):
            kernel = f"{row['operator']}_{part}"
            shares[kernel, width] = min(share, shares.get((kernel, width), share))
    if shares:
        return sorted(shares, key=lambda target: shares[target])
    found = (
        (f"{operator}_{part}", D)
        for D in (64, 128)
        for operator in operators
        for kind in KINDS.get(operator, ("sequence",))
        for parts in parts_of(operator, kind).values()
        for part in parts
    )
    return list(dict.fromkeys(found))


def parts_of(operator: str, kind: str) -> dict[str, tuple[str, ...]]:
    """The kernels of a case by direction, by their names in the tables."""
    if operator == "chapter_router":
        return PRODUCTS
    if operator == "segmented_attention" and kind in ("dense", "causal"):
        return {"forward": (f"fwd_{kind}",), "backward": (f"bwd_dkdv_{kind}", "bwd_dq")}
    is_by_chapter = operator == "chapter_attention" and kind in ("token", "int8", "independent")
    return BY_CHAPTER if is_by_chapter else PARTS


def jobs(kernel: str, head_dim: int, task: str, *, dry: bool) -> list[Job]:
    """One job for each candidate, the shipped configuration first."""
    from memattn_kernels import configs

    present = configs.table(retune.table_name())[kernel][str(head_dim)]["half"]
    candidates = list(retune.trials(kernel, head_dim, "half", present))
    return [
        {
            "task": task,
            "kernel": kernel,
            "head_dim": head_dim,
            "kind": "half",
            "config": trial.config,
            "label": f"{kernel} D={head_dim} {describe(trial.config)}",
            "dry": dry,
        }
        for trial in (candidates[:1] if dry else candidates)
    ]


def describe(config: Mapping[str, int]) -> str:
    """A configuration in a few words."""
    tile = "x".join(str(config[name]) for name in sorted(config) if name.startswith("BLOCK"))
    text = f"{tile}, {config['num_warps']} warps"
    text += f", {config['num_stages']} stages"
    text += f", {config['maxnreg']} registers" if "maxnreg" in config else ""
    text += ", descriptors" * ("descriptors" in config)
    text += f", parts of {config['part']} keys" if "part" in config else ""
    return text + ", specialized" * ("specialized" in config)


def check(job: Job) -> Result:
    """Compile a candidate and check its results."""
    trial = _trial(job)
    try:
        retune.check_trial(trial, length=DRY_LENGTH if job["dry"] else 700)
    except AssertionError as error:
        return {"status": "wrong", "reason": str(error)}
    return {"status": "ok"}


def measure(job: Job) -> Result:
    """Time a checked candidate."""
    if job["dry"]:
        return {"status": "ok", "milliseconds": None}
    return {"status": "ok", "milliseconds": round(retune.time_trial(_trial(job)), 4)}


def _trial(job: Job) -> retune.Trial:
    return retune.Trial(job["kernel"], job["head_dim"], job["kind"], job["config"])


def run(
    checkers: Pool,
    timer: Pool,
    chosen: list[tuple[str, int]],
    folder: Path,
    on_result: Callable[[Job, Result], None],
    *,
    dry: bool,
    deadline: float,
) -> None:
    """Tune one kernel after another until the deadline; write the table after each kernel."""
    from memattn_kernels import configs

    table = json.loads(json.dumps(configs.table(retune.table_name())))
    milliseconds: dict[str, float] = {}
    for kernel, head_dim in chosen[:1] if dry else chosen:
        if time.monotonic() >= deadline:
            return
        passed: list[dict[str, int]] = []

        def checked(job: Job, result: Result, passed: list = passed) -> None:
            if result["status"] == "ok":
                passed.append(job["config"])
            else:
                on_result(job, result)

        best: dict[str, Any] = {}

        def timed(job: Job, result: Result, best: dict = best) -> None:
            on_result(job, result)
            value = result.get("milliseconds")
            if value is not None and value < best.get("milliseconds", float("inf")):
                best.update(milliseconds=value, config=job["config"])

        candidates = jobs(kernel, head_dim, "tune-check", dry=dry)
        checkers.run(candidates, checked, deadline=deadline, job_seconds=CHECK_SECONDS)
        ready = jobs(kernel, head_dim, "tune-time", dry=dry)
        ready = [job for job in ready if job["config"] in passed]
        timer.run(ready, timed, deadline=deadline, job_seconds=TIME_SECONDS)
        if best:
            table[kernel][str(head_dim)]["half"] = best["config"]
            milliseconds[f"{kernel}/{head_dim}/half"] = best["milliseconds"]
            retune.write_table(folder / "table.json", table, milliseconds)
