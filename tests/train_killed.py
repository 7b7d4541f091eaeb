"""Run as a script: trains, and is killed or starved in the middle. One JSON argument.

It imports once and forks for each case, since importing takes longer than training.
"""

import json
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path

import torch
from train_factories import tiny_config

from memattn.train import checkpoint, loop
from memattn.train.metrics import MetricsLog


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_step(step: int) -> None:
    """Die when the row of a step is half written."""
    write = MetricsLog.write

    def write_half(self, **row):
        if row["step"] == step:
            self._file.write(f"{step},12")
            kill()
        write(self, **row)

    MetricsLog.write = write_half


def kill_in_save(call: int) -> None:
    """Die when the file of the n-th call of ``save_file`` is half written."""
    save_file, calls = checkpoint.save_file, []

    def save_half(tensors, path, *metadata):
        save_file(tensors, path, *metadata)
        calls.append(path)
        if len(calls) == call:
            os.truncate(path, os.path.getsize(path) // 2)
            kill()

    checkpoint.save_file = save_half


def small_disk(kilobytes: int) -> None:
    """No file may grow over this size; a write beyond it fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, kilobytes * 1024))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # so that all is imported before the fork
        loop.train(tiny_config(Path(folder), max_steps=1), progress=False)
    cases = json.loads(sys.argv[1])
    codes = []
    for case in cases:
        child = os.fork()
        if child == 0:
            for name, argument in case["faults"].items():
                globals()[name](argument)
            try:
                loop.train(tiny_config(Path(case["folder"])), resume=True, progress=False)
            except OSError as error:
                sys.stderr.write(str(error))
                os._exit(3)
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    sys.stdout.write(json.dumps(codes))
