"""Compile every shipped configuration ahead of time, without a GPU, and say what it needs.

``python -m memattn_kernels.aot`` prints a table of registers, spilled bytes, shared memory and
tensor-core instructions for each kernel, head dimension, dtype and architecture. Every variant is
compiled in a process of its own, as a compiler that aborts takes its process with it.
"""

import argparse
import importlib
import json
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import memattn_kernels
from memattn_kernels import configs
from memattn_kernels._common import IS_INTERPRETED
from memattn_kernels.aot_kernel import TRITON_TYPES, AotKernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# bytes of shared memory that one program may have
SHARED_LIMITS = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
TENSOR_MEMORY_LIMIT = 512
TENSOR_CORES = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma)")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel for one architecture, head dimension and dtype."""

    kernel: AotKernel
    arch: str
    head_dim: int
    dtype: str
    config: dict[str, int] = field(hash=False)

    @property
    def name(self) -> str:
        """A short name, such as ``sm_90-segmented_attention_fwd-64-bfloat16``."""
        return f"{self.arch}-{self.kernel.title}-{self.head_dim}-{self.dtype}"


@dataclass(kw_only=True)
class Report:
    """What the compiler made of a variant; ``error`` is None if it compiled."""

    error: str | None = None
    registers: int = 0
    spilled: int = 0  # bytes of stack for one thread
    shared: int = 0  # bytes for one program
    tensor_memory: int = 0  # columns for one program, on sm_100
    tensor_cores: dict[str, int] = field(default_factory=dict)  # instructions by name


def declared() -> Iterator[AotKernel]:
    """The kernels that every operator declares in its module ``aot_variants``."""
    for package in pkgutil.iter_modules(memattn_kernels.__path__, "memattn_kernels."):
        name = f"{package.name}.aot_variants"
        if package.ispkg and find_spec(name) is not None:
            yield from importlib.import_module(name).KERNELS


def variants(
    archs: tuple[str, ...] = configs.ARCHITECTURES,
    widths: tuple[int, ...] = configs.WIDTHS,
    dtypes: tuple[str, ...] = ("bfloat16", "float32"),
    kernels: tuple[str, ...] = ("*",),
) -> Iterator[Variant]:
    """Every declared kernel with every shipped configuration.

    Args:
        archs: Architectures of ``configs``.
        widths: Head dimensions.
        dtypes: Dtypes by name.
        kernels: Patterns of which a kernel's title must match one, such as ``"*_fwd"``.
    """
    for arch in archs:
        for kernel in declared():
            if not any(fnmatchcase(kernel.title, pattern) for pattern in kernels):
                continue
            for width in widths:
                for dtype in dtypes:
                    kind = "float" if dtype == "float32" else "half"
                    config = configs.table(arch)[kernel.name][str(width)][kind]
                    yield Variant(
                        kernel=kernel, arch=arch, head_dim=width, dtype=dtype, config=config
                    )


def compile_variant(variant: Variant) -> triton.compiler.CompiledKernel:
    """Compile one variant for its architecture; no GPU is needed.

    Raises:
        RuntimeError: If this process runs Triton's interpreter.
    """
    if IS_INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET must be unset to compile kernels, got 1")
    kernel = variant.kernel
    constants = kernel.constants(variant.head_dim, variant.dtype, variant.config)
    types, attributes = {}, {}
    for index, name in enumerate(kernel.function.arg_names):
        if name in constants:
            types[name] = "constexpr"
            continue
        types[name] = kernel.argument_type(name, variant.dtype)
        if name.endswith("_ptr") or (name.startswith("stride") and variant.head_dim >= 16):
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {name: n for name, n in variant.config.items() if not name.startswith("BLOCK")}
    source = ASTSource(kernel.function, types, constants, attributes)
    return triton.compile(source, target=TARGETS[variant.arch], options=options)


def inspect(variant: Variant) -> Report:
    """Compile a variant and read registers, spills, shared memory and instructions."""
    compiled = compile_variant(variant)
    text = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
    counts: dict[str, int] = {}
    for instruction in TENSOR_CORES.findall(text):
        counts[instruction] = counts.get(instruction, 0) + 1
    if "cubin" in compiled.asm:
        registers, spilled = _cubin_usage(compiled.asm["cubin"])
    else:
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
        spilled = int(re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text)[0])
    return Report(
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        tensor_cores=counts,
    )


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of one thread, from the tool in Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    usage = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    return int(usage[-1][0]), int(usage[-1][1])


def _work(connection: Connection, variant: Variant) -> None:
    """Send the report of one variant, from a process of its own."""
    try:
        report = inspect(variant)
    except Exception as error:  # whatever the compiler raises belongs into the report
        report = Report(error=f"{type(error).__name__}: {error}".splitlines()[0])
    connection.send(report)


def inspect_all(
    chosen: list[Variant],
    n_jobs: int = 2,
    on_report: Callable[[Variant, Report], None] = lambda variant, report: None,
) -> dict[str, Report]:
    """Inspect variants in ``n_jobs`` processes at a time.

    Args:
        chosen: The variants.
        n_jobs: Processes at a time.
        on_report: Called with each variant as it is done.

    Returns:
        The reports by the variants' names, in their order.
    """
    context = multiprocessing.get_context("fork")  # torch and Triton are loaded once
    reports: dict[str, Report] = {variant.name: Report() for variant in chosen}
    waiting, running = list(reversed(chosen)), {}
    while waiting or running:
        while waiting and len(running) < n_jobs:
            variant = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(sender, variant))
            process.start()
            sender.close()
            running[receiver] = variant, process
        for receiver in wait(list(running)):
            variant, process = running.pop(receiver)
            try:
                report = receiver.recv()
            except EOFError:
                process.join()
                report = Report(error=f"the compiler aborted with exit code {process.exitcode}")
            process.join()
            receiver.close()
            reports[variant.name] = report
            on_report(variant, report)
    return reports


def describe(variant: Variant) -> dict:
    """What a variant is, for a JSON file."""
    return {
        "name": variant.name,
        "kernel": variant.kernel.title,
        "arch": variant.arch,
        "head_dim": variant.head_dim,
        "dtype": variant.dtype,
        "config": variant.config,
    }


def markdown(chosen: list[Variant], reports: dict[str, Report]) -> str:
    """A table of the reports."""
    lines = [
        "| architecture | kernel | D | dtype | tile | warps | stages | registers | spilled B "
        "| shared B | tensor cores |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in chosen:
        report, config = reports[variant.name], variant.config
        head = f"| {variant.arch} | {variant.kernel.title} | {variant.head_dim} | {variant.dtype} "
        head += f"| {config['BLOCK_M']} x {config['BLOCK_N']} | {config['num_warps']} "
        head += f"| {config['num_stages']} "
        counts = ", ".join(f"{n} {name}" for name, n in report.tensor_cores.items()) or "none"
        tail = f"| {report.registers} | {report.spilled} | {report.shared} | {counts} |"
        lines.append(head + (tail if report.error is None else f"| {report.error} | | | |"))
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Print the table; write it as JSON too if asked."""
    parser = argparse.ArgumentParser(prog="python -m memattn_kernels.aot", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--head-dim", nargs="+", type=int, default=list(configs.WIDTHS))
    parser.add_argument(
        "--dtype", nargs="+", choices=list(TRITON_TYPES), default=["bfloat16", "float32"]
    )
    parser.add_argument("--kernel", nargs="+", default=["*"], help="patterns, such as '*_fwd'")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    args = parser.parse_args(argv)
    filters = (args.arch, args.head_dim, args.dtype, args.kernel)
    chosen = list(variants(*map(tuple, filters)))
    if not chosen:
        parser.error(f"--kernel must match a kernel, got {' '.join(args.kernel)}")
    reports = inspect_all(chosen, args.jobs)
    if args.json:
        content = [describe(v) | asdict(reports[v.name]) for v in chosen]
        args.json.write_text(json.dumps(content, indent=1))
    sys.stdout.write(markdown(chosen, reports))


if __name__ == "__main__":
    main()
