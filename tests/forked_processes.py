"""Runs a program of the tests that forks processes, each of which leaves a file."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent
SECONDS = 300  # one process that waits for another would wait for ever


def results_of(script: str, folder: Path, world: int) -> list[Any]:
    """What each of the processes of ``python SCRIPT FOLDER`` left in ``FOLDER/<rank>.pt``."""
    paths = (ROOT.parent, ROOT.parent / "kernels", ROOT)
    done = subprocess.run(
        [sys.executable, str(ROOT / script), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def fork(work: Callable[[int, Path], None], world: int) -> None:
    """Call ``work(rank, folder)`` in so many processes and exit; 1 where one of them failed."""
    processes = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            work(rank, Path(sys.argv[1]))
            sys.stdout.flush()
            os._exit(0)
        processes.append(pid)
    sys.exit(any([os.waitpid(pid, 0)[1] for pid in processes]))
