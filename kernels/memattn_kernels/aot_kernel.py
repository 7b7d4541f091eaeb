"""How an operator declares its kernels for the ahead-of-time gate, ``memattn_kernels.aot``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import triton

TRITON_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


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
        types: Triton's types, by name, of the run-time arguments that are not as usual. As usual
            ``*_ptr`` points to the dtype of the inputs, ``scale`` is float32, all else is int32.
    """

    name: str
    part: str = ""
    function: triton.JITFunction
    constants: Callable[[int, str, dict[str, int]], dict[str, object]]
    types: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name and part."""
        return f"{self.name}-{self.part}" if self.part else self.name

    def argument_type(self, argument: str, dtype: str) -> str:
        """Triton's type of a run-time argument for inputs of this dtype."""
        if argument in self.types:
            return self.types[argument]
        if argument.endswith("_ptr"):
            return "*" + TRITON_TYPES[dtype]
        return "fp32" if argument == "scale" else "i32"
