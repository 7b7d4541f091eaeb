"""Peak memory of one call, above its inputs.

On CUDA, PyTorch's allocator counts the bytes. On the CPU, the peak of the process's resident set
is read, which includes memory that extensions and libraries allocate without PyTorch. This is done
in a fresh process that returns freed memory to the system at once, so that no call reuses memory
that an earlier call left.
"""

import ctypes
import gc
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from memattn.bench.case import Case, Forward
from memattn.bench.result_check import leaves_of

_MALLOC_OPTIONS = {"M_TRIM_THRESHOLD": -1, "M_MMAP_THRESHOLD": -3, "M_MMAP_MAX": -4}
_CALLS = 3  # the median counts: the system's counters lag by up to 128 KiB for each core
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class MemoryJob:
    """A case, a direction, and what computes it: a backend of our operator or a peer."""

    case: Case
    direction: str  # "forward" or "forward+backward"
    backend: str | None = None
    peer: str | None = None

    def build(self, case: Case) -> Forward:
        """The function to measure, for this case or a smaller one."""
        if self.peer is not None:
            return case.peers()[self.peer].build()
        assert self.backend is not None
        return case.subject(self.backend)


def call_of(case: Case, forward: Forward, direction: str) -> Callable[[], object]:
    """A function without arguments that runs one direction; inputs and cotangent are made here."""
    gradients = direction != "forward"
    leaves = leaves_of(case.inputs(), gradients=gradients)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    if not gradients:

        def call() -> object:
            with torch.no_grad():
                return forward(leaves)

        return call
    with torch.no_grad():
        d_out = torch.randn_like(forward(leaves))
    if direction == "forward+backward":
        # a yardstick does not use all inputs
        return lambda: torch.autograd.grad(forward(leaves), wanted, d_out, allow_unused=True)
    out = forward(leaves)
    return lambda: torch.autograd.grad(out, wanted, d_out, retain_graph=True, allow_unused=True)


def cuda_peak(call: Callable[[], object], device: str) -> int:
    """Peak bytes during the call minus the bytes allocated before it."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def cpu_peaks(jobs: Sequence[MemoryJob]) -> list[int | None]:
    """Peak bytes of the jobs, measured in a fresh process; None on systems other than Linux.

    Raises:
        RuntimeError: If that process fails; the message ends with its error output.
    """
    if not jobs or not _CLEAR.exists():
        return [None] * len(jobs)
    payload = pickle.dumps((torch.get_num_threads(), list(jobs)))
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from memattn.bench.memory import _serve; _serve()"
    )
    done = subprocess.run([sys.executable, "-c", code], input=payload, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"memory could not be measured: {done.stderr.decode()[-2000:]}")
    return pickle.loads(done.stdout)


def step_peak(call: Callable[[], object], device: str) -> int | None:
    """Peak bytes of a call above those before it, in this process; None if unknown.

    On the CPU, freed memory is returned to the system first, and a first call, in which libraries
    load and threads start, is not counted. Other threads of the process are counted too, so this
    is meant for calls of many MiB, such as a training step.
    """
    if device.startswith("cuda"):
        call()
        return cuda_peak(call, device)
    if not _CLEAR.exists():
        return None
    call()
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    _CLEAR.write_text("5")
    before = _status("VmRSS")
    call()
    return max(_status("VmHWM") - before, 0)


def keep_freed_memory() -> None:
    """Make this process keep freed CPU memory, as PyTorch does on CUDA.

    Otherwise the C library returns blocks above 32 MiB to the system, which maps and clears them
    again in each call. That time does not belong to an operator and varies with the length.
    """
    _set_malloc(M_MMAP_MAX=0, M_TRIM_THRESHOLD=(1 << 31) - 1)


def _set_malloc(**options: int) -> None:
    """Set options of the GNU C library's malloc; does nothing with other C libraries."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for name, value in options.items():
            libc.mallopt(_MALLOC_OPTIONS[name], value)


def _serve() -> None:
    """Main function of the fresh process: reads jobs from stdin, writes peaks to stdout."""
    _set_malloc(M_MMAP_THRESHOLD=1 << 16, M_TRIM_THRESHOLD=1 << 16)  # return freed memory at once
    threads, jobs = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    sys.stdout.buffer.write(pickle.dumps([_peak(job) for job in jobs]))


def _peak(job: MemoryJob) -> int:
    # libraries load, threads start
    small = job.case.resized(min(job.case.T, 64))
    call_of(small, job.build(small), job.direction)()
    call = call_of(job.case, job.build(job.case), job.direction)
    gc.collect()
    peaks = []
    for _ in range(_CALLS):
        _CLEAR.write_text("5")  # resets the peak
        before = _status("VmRSS")
        call()
        peaks.append(max(_status("VmHWM") - before, 0))
    return sorted(peaks)[_CALLS // 2]


def _status(field: str) -> int:
    """A field of the process status, in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
