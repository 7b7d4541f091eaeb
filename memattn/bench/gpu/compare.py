"""Stage "before": time this build and an earlier one alternately on the same GPU."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

from memattn.bench.gpu import compare_worker
from memattn.bench.gpu.pool import Job, Pool, Result

ROUNDS = 2  # times that each build is timed, alternately
JOB_SECONDS = 60


def pools(before: Path, n_workers: int, log: Path, environment: dict[str, str]) -> dict[str, Pool]:
    """Worker pools of the earlier build and of this one."""
    trees = {"before": before.resolve(), "now": Path(__file__).parents[3]}
    worker = [str(Path(compare_worker.__file__).resolve())]
    return {
        name: Pool(
            max(n_workers // len(trees), 1),
            log,
            environment | {"PYTHONPATH": os.pathsep.join([str(tree), str(tree / "kernels")])},
            worker,
            folder=tree,
        )
        for name, tree in trees.items()
    }


def run(
    builds: dict[str, Pool],
    operators: tuple[str, ...],
    on_result: Callable[[Job, Result], None],
    *,
    dry: bool,
    deadline: float,
) -> None:
    """Compile both builds in parallel, then time them alternately, case by case."""
    cases = [
        (name, direction)
        for name, case in compare_worker.CASES.items()
        if case["operator"] in operators
        for direction in ("forward", "backward")
    ]
    if dry:
        cases = cases[:2]

    def job(name: str, direction: str, build: str, compile_only: bool) -> Job:
        return {
            "task": "before",
            "case": name,
            "direction": direction,
            "build": build,
            "compile_only": compile_only,
            "dry": dry,
            "label": f"{name}, {direction}, {build}",
        }

    failed: set[tuple[str, str]] = set()

    def compiled(job: Job, result: Result) -> None:
        if result["status"] != "ok":
            failed.add((job["case"], job["direction"]))
            on_result(job, result)

    def compile_all(build: str, pool: Pool) -> None:
        jobs = [job(name, direction, build, True) for name, direction in cases]
        pool.run(jobs, compiled, deadline=deadline, job_seconds=JOB_SECONDS)

    # both builds at once, each with half of the workers: in sequence they took a whole stage
    threads = [threading.Thread(target=compile_all, args=pair) for pair in builds.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pool in builds.values():
        pool.n_workers = 1
    for name, direction in cases:
        if (name, direction) in failed:
            continue
        for _ in range(ROUNDS):
            for build, pool in builds.items():
                pool.run(
                    [job(name, direction, build, False)],
                    on_result,
                    deadline=deadline,
                    job_seconds=JOB_SECONDS,
                    keep_workers=True,
                )


def ratios(pairs: list[tuple[Job, Result]]) -> list[dict]:
    """Times of both builds and the speed-up of this one, from the fastest medians."""
    times: dict[tuple[str, str], dict[str, list[float]]] = {}
    for job, result in pairs:
        if job["task"] == "before" and "milliseconds" in result:
            own = times.setdefault((job["case"], job["direction"]), {})
            own.setdefault(job["build"], []).append(result["milliseconds"])
    return [
        {"case": case, "direction": direction, **builds, "speedup": min(b) / min(n)}
        for (case, direction), builds in times.items()
        if (b := builds.get("before")) and (n := builds.get("now"))
    ]
