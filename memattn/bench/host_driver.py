"""A fake GPU driver for Triton: measures the host time of calls on a machine without a GPU.

Tensors are on the CPU, kernels are neither compiled nor run, and results are uninitialised.
Launches are recorded, so that two versions can be compared launch by launch. Triton's interpreter
must be off. ``python -m memattn.bench.host_driver`` prints host times of small calls; they do not
include the driver and Triton's C launcher.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from memattn_kernels import configs

ARCHITECTURE = 90
N_CALLS, N_ROUNDS = 100, 20
Launch = tuple[Any, ...]


class _Kernel(CompiledKernel):
    """A compiled kernel as Triton represents it, without machine code."""

    def __init__(self, src: Any, options: dict, send: Callable[[Launch], None]) -> None:
        self.src, self.name, self.packed_metadata = src, src.fn.__name__, (4, 1, 0)
        # differs between specialisations and options
        self.identity = (self.name, src.signature, src.constants, src.attrs, options)
        self.module = self.function = id(self)
        launcher = object.__new__(CudaLauncher)
        launcher.num_ctas, launcher.launch_cooperative_grid, launcher.launch_pdl = 1, False, False
        launcher.global_scratch_size = launcher.profile_scratch_size = 0
        launcher.global_scratch_align = launcher.profile_scratch_align = 1
        launcher.launch = lambda *launch: send((self, *launch))
        self._run = launcher


class HostDriver:
    """Triton's active driver while installed; ``launches`` records the launches if ``keeps``.

    A launch is the kernel followed by the arguments of Triton's launcher: grid, stream, function,
    two flags, two scratch buffers, metadata, two hooks, and the kernel's arguments.
    """

    def __init__(self, keeps: bool = False) -> None:
        self.device = -1  # that of CPU tensors
        self.streams: dict[int, int] = {}  # by device, where they are not the default ones
        self.launches: list[Launch] = []
        self._send = self.launches.append if keeps else _drop

    def get_current_device(self) -> int:
        """The index of the current device."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        """The address of the current stream."""
        return self.streams.get(device, 0)

    def get_current_target(self) -> GPUTarget:
        """The target that kernels would be compiled for."""
        return GPUTarget("cuda", ARCHITECTURE, 32)

    def install(self) -> "HostDriver":
        """Replace Triton's driver and compiler and the architecture of the device."""
        from memattn.ops import _dispatch

        driver.set_active(self)  # type: ignore[arg-type]
        compiler: Any = triton.compiler
        compiler.compile = lambda src, target, options: _Kernel(src, options, self._send)
        configs.architecture = lambda device: f"sm_{ARCHITECTURE}"
        _dispatch.triton_is_interpreted = lambda: True  # lets the operators accept CPU tensors
        return self


def _drop(launch: Launch) -> None:
    """Forget a launch."""


def main() -> int:
    """Print the host's microseconds of small calls, plain and recorded."""
    from memattn.bench import report
    from memattn.bench.gpu import host
    from memattn_kernels import recording

    driver = HostDriver().install()
    names = ("segmented_attention", "future_attention", "task_masked_attention")
    for job in host.jobs(names, dry=False):
        calls = host.calls(job | {"device": "cpu"})
        found: dict[str, list[str]] = {}
        for name in ("plain", "recorded"):
            recording.switch(name == "recorded")
            found[name] = [f"{_microseconds(call):.0f}" for call in calls]
        for part, plain, recorded in zip(host.PARTS, *found.values(), strict=True):
            report.say(f"{job['operator']}, {part}: {plain} us, recorded {recorded} us")
    assert not driver.launches
    return 0


def _microseconds(call: Callable[[], object]) -> float:
    """Microseconds per call in the fastest of several rounds."""
    samples = []
    for _ in range(N_ROUNDS + 1):
        start = time.perf_counter()
        for _ in range(N_CALLS):
            call()
        samples.append((time.perf_counter() - start) / N_CALLS)
    return 1e6 * min(samples[1:])


if __name__ == "__main__":
    sys.exit(main())
