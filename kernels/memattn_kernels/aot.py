"""Compile every shipped configuration ahead of time, without a GPU, and say what it needs.

``python -m memattn_kernels.aot`` prints a table of registers, spilled bytes, shared memory,
programs on a multiprocessor and the instructions of hot loops for each kernel, form, head
dimension, dtype and architecture, and fails if ``aot_checks`` finds a fault. Every variant is
compiled in a process of its own, as a compiler that aborts takes its process with it. Reports are
kept by the hash of all that they depend on, so that only what changed is compiled anew.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import memattn_kernels
from memattn_kernels import configs, machine_code
from memattn_kernels._common import IS_INTERPRETED
from memattn_kernels._products import launch_precision
from memattn_kernels.aot_checks import faults, write_counts
from memattn_kernels.aot_kernel import TRITON_TYPES, AotKernel, Report, Variant
from memattn_kernels.machine_code import HotLoop

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# counts up when reports change their meaning
REPORT_VERSION = 1
TENSOR_CORES = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma)")


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
    """Every declared kernel with every shipped configuration, and every candidate.

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
                    config = kernel.config(arch, width, dtype)
                    if config is not None:
                        yield Variant(
                            kernel=kernel, arch=arch, head_dim=width, dtype=dtype, config=config
                        )


def compile_variant(variant: Variant) -> tuple[triton.compiler.CompiledKernel, str]:
    """Compile one variant for its architecture, and what ptxas said; no GPU is needed.

    Raises:
        RuntimeError: If this process runs Triton's interpreter.
    """
    if IS_INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET must be unset to compile kernels, got 1")
    constants, types = _signature(variant)
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(types.items())
        if kind != "constexpr" and (name.endswith("_ptr") or name.startswith("stride"))
    }
    options = {n: variant.config[n] for n in configs.LAUNCH_OPTIONS if n in variant.config}
    options |= launch_precision(variant.config)
    source = ASTSource(variant.kernel.function, types, constants, attributes)
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True  # a cached kernel would say nothing
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=TARGETS[variant.arch], options=options)
    return compiled, log.getvalue()


def _signature(variant: Variant) -> tuple[dict[str, object], dict[str, str]]:
    """Compile-time arguments, and the types of all, by name."""
    kernel = variant.kernel
    constants = kernel.constants(variant.head_dim, variant.dtype, variant.config)
    types = {
        name: "constexpr"
        if name in constants
        else kernel.argument_type(name, variant.dtype, constants)
        for name in kernel.function.arg_names
    }
    return constants, types


def inspect(variant: Variant) -> Report:
    """Compile a variant and read registers, spills, shared memory and instructions."""
    compiled, log = compile_variant(variant)
    text = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
    cubin = compiled.asm.get("cubin")
    if cubin is None:
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
        spilled = int(re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text)[0])
    else:
        registers, spilled = machine_code.resource_usage(cubin)
    shared = compiled.metadata.shared
    tensor_memory = getattr(compiled.metadata, "tmem_size", 0) or 0
    threads = compiled.metadata.num_warps * compiled.metadata.warp_size
    return Report(
        registers=registers,
        spilled=spilled,
        shared=shared,
        tensor_memory=tensor_memory,
        tensor_cores=dict(Counter(TENSOR_CORES.findall(text))),
        warps=compiled.metadata.num_warps,
        programs=machine_code.programs_per_core(
            variant.arch, threads, registers, shared, tensor_memory
        ),
        is_serialised="C7515" in log,
        loops=machine_code.hot_loops(text if cubin is None else cubin),
    )


def report_key(variant: Variant) -> str:
    """The hash of all that a report depends on: kernel and helpers, arguments, versions."""
    constants, types = _signature(variant)
    arguments = [sorted(d.items(), key=str) for d in (variant.config, constants, types)]
    kernel = variant.kernel.function.cache_key  # of its source and that of its helpers
    parts = [kernel, variant.arch, triton.__version__, REPORT_VERSION, *arguments]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _kept_report(folder: Path, variant: Variant) -> Report | None:
    """The report of a variant from an earlier run."""
    path = folder / f"{report_key(variant)}.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    return Report(**content | {"loops": [HotLoop(**loop) for loop in content["loops"]]})


def _keep_report(folder: Path, variant: Variant, report: Report) -> None:
    """Keep what another run need not compile."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report_key(variant)}.json"
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(asdict(report)))
    os.replace(unfinished, path)


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
    folder: Path | None = None,
) -> dict[str, Report]:
    """Inspect variants in ``n_jobs`` processes at a time.

    Args:
        chosen: The variants.
        n_jobs: Processes at a time.
        folder: Where reports are kept from run to run, or None.

    Returns:
        The reports by the variants' names, in their order.
    """
    context = multiprocessing.get_context("fork")  # torch and Triton are loaded once
    reports: dict[str, Report] = {variant.name: Report() for variant in chosen}
    waiting, running = [], {}
    for variant in reversed(chosen):
        kept = None if folder is None else _kept_report(folder, variant)
        if kept is None:
            waiting.append(variant)
        else:
            reports[variant.name] = kept
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
            if folder is not None and report.error is None:
                _keep_report(folder, variant, report)
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
        "| shared B | programs | hot loops | faults |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in chosen:
        report, config = reports[variant.name], variant.config
        head = f"| {variant.arch} | {variant.kernel.title} | {variant.head_dim} | {variant.dtype} "
        tile = " x ".join(str(n) for name, n in config.items() if name.startswith("BLOCK"))
        head += f"| {tile} | {config['num_warps']} "
        head += f"| {config['num_stages']} "
        loops = " / ".join(str(loop.instructions) for loop in report.loops)
        tail = f"| {report.registers} | {report.spilled} | {report.shared} | {report.programs} "
        lines.append(f"{head}{tail}| {loops} | {'; '.join(faults(variant, report))} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Print the table; exit with 1 if a kernel has a fault."""
    parser = argparse.ArgumentParser(prog="python -m memattn_kernels.aot", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--head-dim", nargs="+", type=int, default=list(configs.WIDTHS))
    parser.add_argument(
        "--dtype", nargs="+", choices=list(TRITON_TYPES), default=["bfloat16", "float32"]
    )
    parser.add_argument("--kernel", nargs="+", default=["*"], help="patterns, such as '*_fwd'")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    parser.add_argument(
        "--cache", type=Path, default=Path("build/aot"), help="keep reports in this folder"
    )
    parser.add_argument("--update", type=Path, help="renew these counts, docs/kernels/counts.json")
    args = parser.parse_args(argv)
    filters = (args.arch, args.head_dim, args.dtype, args.kernel)
    chosen = list(variants(*map(tuple, filters)))
    if not chosen:
        parser.error(f"--kernel must match a kernel, got {' '.join(args.kernel)}")
    reports = inspect_all(chosen, args.jobs, args.cache)
    found = {v.name: faults(v, reports[v.name]) for v in chosen}
    if args.json:
        content = [
            describe(v) | asdict(reports[v.name]) | {"faults": found[v.name]} for v in chosen
        ]
        args.json.write_text(json.dumps(content, indent=1))
    if args.update:
        write_counts(args.update, reports)
    sys.stdout.write(markdown(chosen, reports))
    if any(found.values()) and not args.json:
        sys.exit(1)


if __name__ == "__main__":
    main()
