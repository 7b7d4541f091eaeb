"""Peak memory of one call, above its inputs.

On CUDA the allocator counts. On the CPU the process counts: the peak of its resident set, which
includes what an extension or a library allocates behind PyTorch's back. A fresh process is used,
told to give freed memory back at once, so that no call hides in memory that another one left.
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
    """A case, the direction, and who computes it: a backend of ours or the name of a peer."""

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
    """A call of one direction, inputs and cotangent made."""
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
    """Bytes at the peak of the call above those before it."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def cpu_peaks(jobs: Sequence[MemoryJob]) -> list[int | None]:
    """Peaks of the jobs, measured one after another in a fresh process; None where not Linux.

    Raises:
        RuntimeError: If that process fails, with the end of what it wrote.
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
    """Bytes at the peak of a call above those before it, in this process; None where unknown.

    On the CPU the process gives back what it has freed first, and the first call, in which
    libraries load and threads start, is not counted. What else the process does at the same time
    counts, so this is for calls of many mebibytes, such as a training step.
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
    """Let this process keep what it frees on the CPU, as PyTorch does on CUDA.

    Otherwise the C library returns blocks above 32 MiB to the system, which maps and clears them
    anew at each call: that is no work of an operator, and differs from length to length.
    """
    _set_malloc(M_MMAP_MAX=0, M_TRIM_THRESHOLD=(1 << 31) - 1)


def _set_malloc(**options: int) -> None:
    """Options of the GNU C library's malloc; other libraries have none."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for name, value in options.items():
            libc.mallopt(_MALLOC_OPTIONS[name], value)


def _serve() -> None:
    """The fresh process: jobs on stdin, peaks on stdout."""
    _set_malloc(M_MMAP_THRESHOLD=1 << 16, M_TRIM_THRESHOLD=1 << 16)  # return what is freed
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
        _CLEAR.write_text("5")  # the peak starts again from here
        before = _status("VmRSS")
        call()
        peaks.append(max(_status("VmHWM") - before, 0))
    return sorted(peaks)[_CALLS // 2]


def _status(field: str) -> int:
    """A field of the process status, in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
