"""Run jobs in worker processes, so that a crash or hang loses only the result of its own job."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Result = dict[str, Any]


class Pool:
    """Worker processes; each takes one job at a time as a line of JSON and answers with one.

    Args:
        n_workers: Number of processes.
        log: File to which the workers' error output is appended.
        environment: Environment variables added to those of this process.
        worker: Arguments of Python that start a worker.
        folder: Working directory of the workers; the current one by default.
    """

    def __init__(
        self,
        n_workers: int,
        log: Path,
        environment: dict[str, str],
        worker: Sequence[str] = ("-m", "memattn.bench.gpu.worker"),
        folder: Path | None = None,
    ) -> None:
        self.n_workers, self.log, self.worker, self.folder = n_workers, log, worker, folder
        self._idle: list[subprocess.Popen] = []
        self.environment = os.environ | environment
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._closed = False

    def run(
        self,
        jobs: Sequence[Job],
        on_result: Callable[[Job, Result], None],
        *,
        deadline: float,
        job_seconds: float,
        keep_workers: bool = False,
    ) -> int:
        """Run jobs in order until ``deadline``; returns the number of finished jobs.

        Args:
            jobs: Jobs in the form of ``memattn.bench.gpu.worker``.
            on_result: Called with each job and its result, from one thread at a time.
            deadline: Value of ``time.monotonic()`` at which everything still running is killed.
            job_seconds: Time limit of one job, including the start of its worker.
            keep_workers: Keep the workers running for the next call, until ``close``.
        """
        waiting = list(reversed(jobs))
        done = 0

        def work() -> None:
            nonlocal done
            process = self._idle.pop() if self._idle else None
            while time.monotonic() < deadline and not self._closed:
                with self._lock:
                    if not waiting:
                        break
                    job = waiting.pop()
                if process is None:
                    process = self._start()
                limit = min(deadline, time.monotonic() + job_seconds)
                result = self._ask(process, job, limit)
                if result is None and time.monotonic() >= deadline:
                    break
                if result is None or result.pop("worker_is_lost", False):
                    result = result or _exit_reason(process, time.monotonic() >= limit)
                    self._end(process)
                    process = None
                with self._lock:
                    done += 1
                    on_result(job, result)
            if process is not None and keep_workers:
                self._idle.append(process)
            elif process is not None:
                self._end(process)

        threads = [
            threading.Thread(target=work, daemon=True)
            for _ in range(min(self.n_workers, len(jobs)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return done

    def close(self) -> None:
        """Kill all workers."""
        self._closed = True
        for process in list(self._running):
            self._end(process)

    def _start(self) -> subprocess.Popen:
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *self.worker],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment,
                cwd=self.folder,
                start_new_session=True,  # so that its child processes are killed with it
            )
        self._running.add(process)
        return process

    def _ask(self, process: subprocess.Popen, job: Job, limit: float) -> Result | None:
        """The worker's answer; None if it died or was killed at the time limit."""
        assert process.stdin is not None and process.stdout is not None
        killer = threading.Timer(max(limit - time.monotonic(), 0.0), _kill, [process])
        killer.start()
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                # libraries may print other lines
                if line.startswith("{"):
                    return json.loads(line)
        except (OSError, ValueError):
            pass
        finally:
            killer.cancel()
        return None

    def _end(self, process: subprocess.Popen) -> None:
        _kill(process)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # unsent input is lost with the process
                    pipe.close()
        self._running.discard(process)


def _kill(process: subprocess.Popen) -> None:
    """Kill a worker and its child processes."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _exit_reason(process: subprocess.Popen, in_time: bool) -> Result:
    if in_time:
        return {"status": "error", "reason": "exceeded its time limit"}
    try:
        code = process.wait(5)
    except subprocess.TimeoutExpired:
        code = None
    return {"status": "error", "reason": f"its process ended with exit code {code}"}
