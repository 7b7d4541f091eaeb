"""A session on a GPU: stages with time limits, results written at once, a summary at the end."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memattn.bench import report
from memattn.bench.gpu import compare, correctness, host, predictions, speed, tuning
from memattn.bench.gpu.pool import Job, Pool, Result
from memattn.files import write_json, write_text

# relative time of each stage; time that a stage leaves over goes to the next
STAGES = {"correct": 110, "before": 90, "host": 15, "speed": 185, "tests": 110, "retune": 65}
CHECK_SECONDS = 100  # time limit of one job of the stages "correct" and "speed"
PREPARE_SHARE = 0.45  # largest share of the stage "speed" for checks and compilations
FIRST_TESTS = "tests/test_cuda.py"
OUTCOME = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) +(?:\[ *\d+%\] +)?(tests/\S.*)")


OnResult = Callable[[Job, Result], None]


@dataclass
class Session:
    """One run of the command."""

    folder: Path
    stages: Sequence[str]
    operators: tuple[str, ...]
    seconds: float
    dry: bool = False
    n_workers: int = 2
    before: Path | None = None  # checkout of an earlier build
    results: list[tuple[Job, Result]] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=dict)
    planned: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / "results.jsonl").open("w")
        self._lock = threading.Lock()
        environment = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        # the workers already use all cores
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        if self.dry:
            environment["TRITON_INTERPRET"] = "1"
        # a page is made from this file and the results
        session = {"seconds": self.seconds, "machine": machine_line()}
        write_json(self.folder / "session.json", session)
        log = self.folder / "workers.log"
        self.checkers = Pool(self.n_workers, log, environment)
        self.timer = Pool(1, log, environment | {"OMP_NUM_THREADS": str(self.n_workers)})
        self.builds: dict[str, Pool] = {}
        if self.before is not None:
            self.builds = compare.pools(self.before, self.n_workers, log.resolve(), environment)
        self._tests: subprocess.Popen | None = None

    def run(self) -> int:
        """Run the stages; returns the exit code: 1 if a result was wrong or a test failed."""
        start = time.monotonic()
        weight = sum(STAGES[stage] for stage in self.stages)
        used = 0.0
        for stage in self.stages:
            used += STAGES[stage] / weight * self.seconds
            began = time.monotonic()
            report.say(f"\n== {stage}: until {used:.0f} s ==")
            try:
                getattr(self, f"_run_{stage}")(start + used)
            except Exception as error:  # an error of this script must not end the other stages
                traceback.print_exc()
                reason = f"{type(error).__name__}: {error}"
                self.on_result(
                    {"task": stage, "label": f"stage {stage}"},
                    {"status": "error", "reason": reason},
                )
            self.spent[stage] = time.monotonic() - began
        self.finish()
        return int(any(_is_bad(job, result) for job, result in self.results))

    def finish(self) -> None:
        """Stop all processes and print the summary."""
        for pool in (self.checkers, self.timer, *self.builds.values()):
            pool.close()
        if self._tests is not None and self._tests.poll() is None:
            os.killpg(self._tests.pid, signal.SIGKILL)
        self._file.close()
        text = summary(self)
        write_text(self.folder / "summary.txt", text)
        report.say(text)

    def on_result(self, job: Job, result: Result) -> None:
        """Store a result, write it to the file at once and print it."""
        with self._lock:
            if self._file.closed:
                return
            self.results.append((job, result))
            self._file.write(json.dumps({"job": job, "result": result}) + "\n")
            self._file.flush()
            report.say(line_of(job, result))

    @property
    def timed(self) -> tuple[str, ...]:
        """The operators that are also timed and tuned."""
        return tuple(name for name in self.operators if name not in correctness.CHECKED_ONLY)

    def _run_correct(self, deadline: float) -> None:
        jobs = correctness.jobs(self.operators, dry=self.dry)
        self.planned["correct"] = len(jobs)
        self._check(jobs, self.on_result, deadline)

    def _check(self, jobs: Sequence[Job], on_result: OnResult, deadline: float) -> None:
        """Run jobs in parallel; those that ran out of GPU memory are repeated alone afterwards."""
        crowded: list[Job] = []

        def keep(job: Job, result: Result) -> None:
            if "OutOfMemoryError" in result.get("reason", ""):
                crowded.append(job)
            else:
                on_result(job, result)

        self.checkers.run(jobs, keep, deadline=deadline, job_seconds=CHECK_SECONDS)
        alone = time.monotonic() + 0.2 * max(deadline - time.monotonic(), 100.0)
        self.timer.run(crowded, on_result, deadline=alone, job_seconds=CHECK_SECONDS)

    def _run_before(self, deadline: float) -> None:
        try:
            compare.run(
                self.builds, self.operators, self.on_result, dry=self.dry, deadline=deadline
            )
        finally:
            for pool in self.builds.values():
                pool.close()

    def _run_host(self, deadline: float) -> None:
        jobs = host.jobs(self.operators, dry=self.dry)
        self.planned["host"] = len(jobs)
        self.timer.run(jobs, self.on_result, deadline=deadline, job_seconds=CHECK_SECONDS)

    def _run_speed(self, deadline: float) -> None:
        now = time.monotonic()
        prepare = speed.prepare_jobs(self.timed, dry=self.dry)
        wrong: set[str] = set()
        cases = speed.plan(self.timed, self.dry).cases

        def prepared(job: Job, result: Result) -> None:
            self.on_result(job, result)
            if job["peer"] is None and result["status"] != "ok":
                wrong.add(cases[job["index"]].label())

        self._check(prepare, prepared, now + PREPARE_SHARE * (deadline - now))
        timed = speed.speed_jobs(self.timed, dry=self.dry, wrong=wrong)
        ours = [job for job in timed if not job.get("peers", True)]
        rest = [job for job in timed if job not in ours]
        jobs = [*ours, *predictions.jobs(self.operators, dry=self.dry), *rest]
        self.planned["speed"] = len(prepare) + len(jobs)
        self.timer.run(jobs, self.on_result, deadline=deadline, job_seconds=CHECK_SECONDS)

    def _run_tests(self, deadline: float) -> None:
        """Run the tests of whole models and long offsets first, then all other CUDA tests."""
        runs: list[tuple[list[str], str]] = [([FIRST_TESTS], "gpu")]
        if not self.dry:
            marked = re.compile(r"mark\.(gpu|operator)\b")
            files = sorted(str(p) for p in Path("tests").glob("test_*.py"))
            own = [f for f in files if f != FIRST_TESTS and marked.search(Path(f).read_text())]
            runs.append((own, "gpu or operator"))
        for files, marker in runs:
            if time.monotonic() < deadline:
                self._run_pytest(files, marker, deadline)

    def _run_pytest(self, files: list[str], marker: str, deadline: float) -> None:
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
        command += ["-m", marker, "--color=no", "-W", "default", *files]
        if not self.dry:
            # give each worker one test at a time, in order
            command += ["-n", str(min(self.n_workers, 10)), "--maxschedchunk", "1"]
            command += ["-k", "not cpp"]  # the C++ extension is not built here
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self._tests = process
        assert process.stdout is not None
        killer = threading.Timer(max(deadline - time.monotonic(), 0.0), _kill_group, [process])
        killer.start()
        in_summary = False
        with (self.folder / "tests.txt").open("a") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                in_summary |= "short test summary info" in line
                outcome = read_outcome(line)
                if in_summary and line.startswith(("FAILED", "ERROR")):
                    report.say(line.rstrip()[:300])
                elif not in_summary and outcome is not None:
                    name, status = outcome
                    self.on_result({"task": "test", "label": name}, {"status": status})
        killer.cancel()
        process.wait()

    def _run_retune(self, deadline: float) -> None:
        rows = [row for _, result in self.results for row in result.get("rows", ())]
        tuning.run(
            self.checkers,
            self.timer,
            tuning.targets(rows, self.timed),
            self.folder,
            self.on_result,
            dry=self.dry,
            deadline=deadline,
        )


def _kill_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def read_outcome(line: str) -> tuple[str, str] | None:
    """Name and status of a test from a line of ``pytest -v``, with or without xdist."""
    found = OUTCOME.search(line)
    if found is not None and "::" in found[2]:
        return found[2].strip(), found[1].lower()
    found = re.match(r"(tests/\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", line)
    return None if found is None else (found[1], found[2].lower())


def _is_bad(job: Job, result: Result) -> bool:
    """Whether a result makes the session fail; failing candidates and peers do not."""
    if job["task"].startswith("tune") or job.get("peer"):
        return False
    return result["status"] in ("wrong", "error", "failed")


def label_of(job: Job) -> str:
    """A job in a few words."""
    if job["task"] == "correct":
        words = (job["operator"], job["case"], job["direction"], job["dtype"], f"D={job['D']}")
        return ", ".join(words)
    return job["label"]


def line_of(job: Job, result: Result) -> str:
    """A result in one line; a wrong one with its reason, seed and configurations."""
    took = f" ({result['took']} s)" if "took" in result else ""
    text = f"[{job['task']}] {label_of(job)}: {result['status']}{took}"
    if result["status"] in ("wrong", "error"):
        text += f": {result['reason']}"
        if "configurations" in result:
            text += f"; seed {job['seed']}, T={job['T']}, {json.dumps(result['configurations'])}"
    elif result.get("milliseconds") is not None:
        text += f", {result['milliseconds']} ms"
    for row in result.get("predictions", ()):
        text += f"\n    {_prediction(row)}"
    for line in host.lines([(job, result)]):
        text += f"\n    {line}"
    for row in result.get("rows", ()):
        text += "\n    " + "  ".join(cell for cell in report.row_cells(row)[1:] if cell)
    return text


def _prediction(row: Mapping[str, Any]) -> str:
    predicted = row["predicted"]
    range_ = "no prediction" if predicted is None else f"predicted {predicted[0]}-{predicted[1]}"
    measured = "not measured" if row["measured"] is None else f"measured {row['measured']}"
    return f"{row['what']}: {range_}, {measured} TFLOP/s"


def summary(session: Session) -> str:
    """Summary of all results, as plain text."""
    results = session.results
    lines = ["", "summary", "-------"]
    if session.dry:
        lines.append("dry run on a CPU: nothing was timed")
    for stage in session.stages:
        own = [pair for pair in results if _stage_of(pair[0]) == stage]
        counts: dict[str, int] = {}
        for _, result in own:
            counts[result["status"]] = counts.get(result["status"], 0) + 1
        of = f" of {session.planned[stage]}" if stage in session.planned else ""
        took = f", {session.spent[stage]:.0f} s" if stage in session.spent else ", not finished"
        told = ", ".join(f"{n} {status}" for status, n in counts.items()) or "nothing"
        lines.append(f"{stage}: {len(own)}{of} results: {told}{took}")
    bad = [pair for pair in results if pair[1]["status"] in ("wrong", "error", "failed")]
    if bad:
        lines += ["", "what failed", "-----------", *(line_of(*pair) for pair in bad)]
    told = [row for _, result in results for row in result.get("predictions", ())]
    if told:
        lines += ["", "predictions", "-----------", *(_prediction(row) for row in told)]
    calls = host.lines(results)
    if calls:
        lines += ["", f"small calls; goal: {host.AIM} us above the GPU alone"]
        lines += ["-" * len(lines[-1]), *calls]
    ratios = compare.ratios(results)
    if ratios:
        lines += ["", "compared with the earlier build", "-------------------------------"]
        lines += [
            f"{row['case']}, {row['direction']}: {row['speedup']:.2f}x as fast "
            f"({min(row['before']):.3f} -> {min(row['now']):.3f} ms)"
            for row in ratios
        ]
    bars = {bar["bar"]: bar for _, result in results for bar in result.get("bars", ())}
    if bars:
        lines += ["", "bars", "----", *(_bar(bar) for bar in bars.values())]
    return "\n".join([*lines, "", machine_line()]) + "\n"


def _bar(bar: Mapping[str, Any]) -> str:
    sign, unit = "<=" if bar["at_most"] else ">=", bar["unit"]
    least = "" if bar["must"] is None else f" (at least {bar['must']:g})"
    text = f"{bar['bar']}: required {sign} {bar['target']:g}{least} {unit}"
    if bar["reached"] is None:
        return f"{text}: {bar['reason']}"
    verdict = "met" if bar["met"] else "least met" if bar["met_must"] else "MISSED"
    return f"{text}, reached {bar['reached']:.3g}: {verdict}"


def _stage_of(job: Job) -> str:
    task = job["task"]
    if task in STAGES:
        return task
    return "tests" if task == "test" else "retune" if task.startswith("tune") else "speed"


def machine_line() -> str:
    """Date, device and versions."""
    machine = report.machine(0)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['date']}; {machine['gpu'] or 'no GPU'}; {versions}"


def install_signal_handlers(session: Session) -> None:
    """On SIGTERM and SIGINT, stop the workers and print the summary."""

    def stop(number: int, frame: object) -> None:
        report.say(f"\nstopped by signal {number}")
        session.finish()
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
