"""Processes that do the demo's jobs side by side: small models gain little from a second thread."""

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from rich.console import Console

from memattn.train.interrupt import StopRequest

T = TypeVar("T")
_POLL_SECONDS = 0.2  # how often a Ctrl-C is looked for


def default_processes(num_jobs: int) -> int:
    """How many jobs a machine does at a time: one on each CPU core, or one alone on a GPU."""
    if torch.accelerator.is_available():
        return 1
    return max(1, min(num_jobs, torch.get_num_threads()))


@dataclass
class _Worker:
    """A process, the way to it, and the name of the job that it does."""

    process: BaseProcess
    connection: Any  # its type has another name on Windows
    job: str | None = None


class Workers:
    """Runs jobs in processes of their own, or one after the other in this process.

    Use it as a context manager. The processes begin with the first job and stay for later ones.

    Args:
        processes: How many jobs run at a time; 1 runs them in this process. Each process has an
            equal share of PyTorch's threads.
        console: Where to show what is running.
    """

    def __init__(self, processes: int, console: Console) -> None:
        self.processes = processes
        self._console = console
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.connection.close()  # which ends an idle process
            worker.process.join()
        self._workers.clear()

    @property
    def alone(self) -> bool:
        """Whether jobs run in this process."""
        return self.processes == 1

    def run(
        self, jobs: Mapping[str, Callable[[], T]], status: str | None
    ) -> Iterator[tuple[str, T]]:
        """Run jobs, the first ones first, and give each result when it is there.

        Args:
            jobs: By name. With several processes they are pickled, and so are their results.
            status: What they do, shown with the names of those that run; None where they show
                that themselves.

        Raises:
            KeyboardInterrupt: On Ctrl-C or SIGTERM, once all running jobs have ended; names them.
            Exception: What a job raises, once the others have ended.
        """
        if self.alone:
            for name, job in jobs.items():
                try:
                    with self._shown(status, name):
                        result = job()
                except KeyboardInterrupt as stop:
                    raise _interrupted(name) from stop
                yield name, result
            return
        waiting = dict(jobs)
        try:
            with StopRequest() as stop:
                while waiting or self._busy:
                    self._give(waiting)
                    with self._shown(status, names := self._names):
                        done = self._wait()
                    if stop.received:
                        raise _interrupted(names)
                    for worker in done:
                        yield self._take(worker)
        finally:
            self._end()

    @property
    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.job is not None]

    @property
    def _names(self) -> str:
        """The jobs that run."""
        return ", ".join(str(worker.job) for worker in self._busy)

    def _give(self, waiting: dict[str, Callable[[], T]]) -> None:
        """Give jobs to idle processes, of which there may be new ones."""
        while waiting and len(self._busy) < self.processes:
            idle = next((worker for worker in self._workers if worker.job is None), None)
            if idle is None:
                idle = _start(max(1, torch.get_num_threads() // self.processes))
                self._workers.append(idle)
            idle.job = next(iter(waiting))
            idle.connection.send(waiting.pop(idle.job))

    def _wait(self) -> list[_Worker]:
        """Those that are done by now."""
        ready = wait_for_any([worker.connection for worker in self._busy], _POLL_SECONDS)
        return [worker for worker in self._busy if worker.connection in ready]

    def _take(self, worker: _Worker) -> tuple[str, Any]:
        """The result of a job that is done, by its name."""
        name, worker.job = str(worker.job), None
        try:
            result, error, told = worker.connection.recv()
        except EOFError as lost:
            self._workers.remove(worker)
            worker.process.join()
            code = worker.process.exitcode
            raise RuntimeError(f"the process of {name} ended with exit code {code}") from lost
        if error is not None:
            raise error from RuntimeError(f"in the process of {name}:\n{told}")
        return name, result

    def _end(self) -> None:
        """Tell the jobs that run to end, which training does behind a checkpoint."""
        for worker in self._busy:
            worker.process.terminate()
        for worker in self._busy:
            worker.process.join()
            self._workers.remove(worker)

    def _shown(self, status: str | None, names: str) -> AbstractContextManager[Any]:
        return nullcontext() if status is None else self._console.status(f"{status} {names}")


def _interrupted(names: str) -> KeyboardInterrupt:
    return KeyboardInterrupt(f"in {names}; the same command goes on from there")


def _start(threads: int) -> _Worker:
    # a fork of a process that has run PyTorch's threads may hang
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, threads), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here)


def _work(connection: Any, threads: int) -> None:
    """Do jobs until there are no more. SIGTERM ends the process, Ctrl-C is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            connection.send((job(), None, ""))
        except Exception as error:  # any error of a job is raised where its result is awaited
            connection.send((None, error, traceback.format_exc()))
