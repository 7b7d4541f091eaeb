"""How an operator declares its kernels for the ahead-of-time gate, ``memattn_kernels.aot``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import triton

from memattn_kernels import configs
from memattn_kernels._common import block_width
from memattn_kernels.machine_code import HotLoop

PINNED_WIDTH = 128
TRITON_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def is_specialized(function: triton.JITFunction, argument: str) -> bool:
    """Whether a launch makes an integer argument that is 1 a compile-time constant."""
    return not function.params[function.arg_names.index(argument)].do_not_specialize


def usual_constants(head_dim: int, dtype: str, config: dict[str, int]) -> dict[str, object]:
    """The compile-time arguments that the kernels of every operator have."""
    constants: dict[str, object] = {
        "D": head_dim,
        "DV": head_dim,
        "BLOCK_D": block_width(head_dim),
        "BLOCK_DV": block_width(head_dim),
        "BLOCK_M": config["BLOCK_M"],
        "BLOCK_N": config["BLOCK_N"],
    }
    return constants if dtype == "float32" else constants | {"residual_ptr": None}


def taken(function: triton.JITFunction, constants: dict[str, object]) -> dict[str, object]:
    """Those of the constants that the kernel has."""
    return {name: value for name, value in constants.items() if name in function.arg_names}


@dataclass(frozen=True, kw_only=True)
class AotKernel:
    """One kernel, to be compiled with every configuration that the tables have for it.

    A package ``memattn_kernels.<operator>`` joins the gate with a module ``aot_variants`` that has
    a tuple ``KERNELS`` of these.

    Attributes:
        name: Name in the tables of ``configs``, such as ``"segmented_attention_fwd"``.
        part: What sets it apart from another kernel with this name, such as a key source, or "".
        function: The kernel.
        constants: Gives the compile-time arguments, and those that are None, by name, from the head
            dimension, the dtype's name and the configuration.
        in_float32: Whether float32 is compiled too.
        widths: Head dimensions at which it is compiled.
        pinned: Configurations by dtype class, ``"half"`` or ``"float"``, of a kernel that is not in
            the tables: compiled at head dimension 128 only, and for these classes.
        candidates: Configurations by architecture and head dimension that the tables do not ship
            yet; None for all else.
        candidates_kind: The dtype class that candidates are for.
        tiles: Of arguments that are tensor descriptors, by name, the compile-time arguments that
            say the lengths of a tile.
        types: Triton's types, by name, of the run-time arguments that are not as usual. As usual
            ``*_ptr`` points to the dtype of the inputs, ``scale`` is float32, all else is int32.
    """

    name: str
    part: str = ""
    function: triton.JITFunction
    constants: Callable[[int, str, dict[str, int]], dict[str, object]]
    in_float32: bool = True
    widths: tuple[int, ...] = configs.WIDTHS
    pinned: Mapping[str, dict[str, int]] | None = None
    candidates: Mapping[str, Mapping[int, dict[str, int]]] | None = None
    candidates_kind: str = "half"
    tiles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)

    def config(self, arch: str, head_dim: int, dtype: str) -> dict[str, int] | None:
        """The shipped configuration, or the candidate; None where this is not compiled."""
        kind = "float" if dtype == "float32" else "half"
        if self.candidates is not None:
            by_width = self.candidates.get(arch, {}) if kind == self.candidates_kind else {}
            return by_width.get(head_dim)
        if self.pinned is not None:
            return self.pinned.get(kind) if head_dim == PINNED_WIDTH else None
        if head_dim not in self.widths or dtype == "float32" and not self.in_float32:
            return None
        return configs.table(arch)[self.name][str(head_dim)][kind]

    @property
    def title(self) -> str:
        """Name and part."""
        return f"{self.name}-{self.part}" if self.part else self.name

    def argument_type(self, argument: str, dtype: str, constants: Mapping[str, object]) -> str:
        """Triton's type of a run-time argument for inputs of this dtype."""
        if argument in self.types:
            return self.types[argument]
        if argument in self.tiles:
            lengths = [constants[name] for name in self.tiles[argument]]
            if len(lengths) == 1:  # numbers of rows, which are float32
                return f"tensordesc<fp32{lengths}>"
            return f"tensordesc<{TRITON_TYPES[dtype]}{[1, 1, *lengths]}>"
        if argument.endswith("_ptr"):
            return "*" + TRITON_TYPES[dtype]
        return "fp32" if argument == "scale" else "i32"


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
    warps: int = 0  # of a program, with those that warp specialisation adds
    programs: int = 0  # that a multiprocessor holds
    is_serialised: bool = False  # ptxas waits after each matrix product of a warpgroup
    loops: list[HotLoop] = field(default_factory=list)
