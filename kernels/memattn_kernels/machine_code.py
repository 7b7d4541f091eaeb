"""Measures of a kernel's machine code: its hot loops, and how many programs a core holds.

A *hot loop* is an innermost loop that holds a matrix product. Its instructions are those that one
warp issues for each tile. The loops are in the order of the source: those of masked tiles first.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# matrix products on tensor cores; kernels without any have them in single multiplications
TENSOR_PRODUCT = re.compile(r"^(HGMMA|HMMA|UTC\w*MMA|v_mfma)")
SCALAR_PRODUCT = re.compile(r"^(FFMA|v_(pk_)?fma)")
SPILL = re.compile(r"^(LDL|STL|scratch_)")
WAIT = re.compile(r"^WARPGROUP\.DEPBAR")
# waits that were moved out of the way stand after the end of the program
END = re.compile(r"^(EXIT|s_endpgm)")
SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]+?)\s*;")
SASS_BRANCH = re.compile(r"^BRA\S*\s+(?:\S+,\s*)?0x([0-9a-f]+)")
GCN_LABEL = re.compile(r"^(\.L\w+):")
GCN_BRANCH = re.compile(r"^s_c?branch\w*\s+(\.L\w+)")


@dataclass(frozen=True, kw_only=True)
class Core:
    """Resources that the programs on one multiprocessor or compute unit share."""

    registers: int  # of 32 bits
    shared: int  # bytes
    reserved: int  # bytes of shared memory that each program takes besides its own
    threads: int
    register_step: int  # registers of a thread come in multiples of this
    most_registers: int  # of one thread
    tensor_memory: int = 0  # columns


CORES = {
    "sm_80": Core(registers=65536, shared=167936, reserved=1024, threads=2048, register_step=8,
                  most_registers=255),
    "sm_90": Core(registers=65536, shared=233472, reserved=1024, threads=2048, register_step=8,
                  most_registers=255),
    "sm_100": Core(registers=65536, shared=233472, reserved=1024, threads=2048, register_step=8,
                   most_registers=255, tensor_memory=512),
    "gfx942": Core(registers=131072, shared=65536, reserved=0, threads=2048, register_step=8,
                   most_registers=512),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HotLoop:
    """One innermost loop around a matrix product, per warp and tile."""

    instructions: int
    products: int
    waits: int  # for matrix products of a warpgroup
    spills: int  # loads and stores of spilled registers


def programs_per_core(
    arch: str, threads: int, registers: int, shared: int, tensor_memory: int = 0
) -> int:
    """How many programs one core holds at a time; more of them hide latency better."""
    core = CORES[arch]
    registers = -(-max(registers, 1) // core.register_step) * core.register_step
    limits = [
        core.registers // (registers * threads),
        core.shared // (shared + core.reserved) if shared + core.reserved else core.threads,
        core.threads // threads,
    ]
    if tensor_memory:
        limits.append(core.tensor_memory // tensor_memory)
    return min(limits)


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of one thread."""
    usage = re.findall(r"REG:(\d+) STACK:(\d+)", _cuobjdump(cubin, "--dump-resource-usage"))
    return int(usage[-1][0]), int(usage[-1][1])


def hot_loops(code: bytes | str) -> list[HotLoop]:
    """The hot loops of a cubin, or of AMD's assembly text, in the order of the code."""
    instructions, branches = _amd_code(code) if isinstance(code, str) else _nvidia_code(code)
    for product in (TENSOR_PRODUCT, SCALAR_PRODUCT):
        # several branches back to one place are one loop
        ends: dict[int, int] = {}
        for place, target in branches:
            inside = instructions[target : place + 1]
            if any(map(product.match, inside)) and not any(map(END.match, inside)):
                ends[target] = max(place, ends.get(target, 0))
        if ends:
            return [
                HotLoop(
                    instructions=end + 1 - first,
                    products=_count(product, instructions[first : end + 1]),
                    waits=_count(WAIT, instructions[first : end + 1]),
                    spills=_count(SPILL, instructions[first : end + 1]),
                )
                for first, end in sorted(ends.items())
                if not any(first < other < end and ends[other] <= end for other in ends)
            ]
    return []


def _count(pattern: re.Pattern, instructions: list[str]) -> int:
    return sum(pattern.match(instruction) is not None for instruction in instructions)


def _nvidia_code(cubin: bytes) -> tuple[list[str], list[tuple[int, int]]]:
    """Instructions, and the branches among them: place and target."""
    lines = SASS_LINE.findall(_cuobjdump(cubin, "--dump-sass"))
    places = {int(address, 16): place for place, (address, _) in enumerate(lines)}
    instructions = [instruction for _, instruction in lines]
    found = [(place, SASS_BRANCH.match(code)) for place, code in enumerate(instructions)]
    return instructions, [(place, places[int(m[1], 16)]) for place, m in found if m]


def _amd_code(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Instructions, and the branches among them: place and target."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in map(str.strip, text.splitlines()):
        if label := GCN_LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif line and line[0] not in ".;" and not line.endswith(":"):
            instructions.append(line)
    found = [(place, GCN_BRANCH.match(code)) for place, code in enumerate(instructions)]
    return instructions, [(place, labels[m[1]]) for place, m in found if m and m[1] in labels]


def _cuobjdump(cubin: bytes, option: str) -> str:
    """The output of the tool in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [TOOLS / "cuobjdump", option, file.name], check=True, capture_output=True, text=True
        ).stdout
