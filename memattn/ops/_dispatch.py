"""Which backend computes an operator."""

import importlib
import importlib.util
import pkgutil
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch.autograd import forward_ad

from memattn.checks import check_string, must

Backend = Literal["triton", "cpp", "reference"]
BACKENDS = ("auto", "triton", "cpp", "reference")
BUILD_CPP = "pip install --no-build-isolation --no-deps --force-reinstall ."


def _loads(module: str) -> bool:
    """Whether a module of the extension is there and loads beside this torch."""
    if importlib.util.find_spec(module) is None:
        return False
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


# looked up once, at import: torch.compile traces through the functions below
_CPP_IS_BUILT = _loads("memattn._C")
# torch has no public list of kernels
_CPP_KERNELS = frozenset(
    torch._C._dispatch_get_registrations_for_dispatch_key("CPU")  # pyright: ignore[reportPrivateUsage]
)
_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def cpp_is_built() -> bool:
    """Whether the C++ extension is there and loads beside this torch."""
    return _CPP_IS_BUILT


def multiplies_bfloat16() -> bool:
    """Whether the C++ extension has products of bfloat16 on this processor."""
    return _CPP_IS_BUILT and torch.ops.memattn_cpp.cpu_capability().endswith("_bf16")


def _has_kernels(operator: str | None) -> bool:
    return operator is None or f"memattn_cpp::{operator}" in _CPP_KERNELS


def has_cpp_kernel(operator: str) -> bool:
    """Whether the C++ extension is built and has this operator: an earlier build may lack it."""
    return _CPP_IS_BUILT and _has_kernels(operator)


def triton_is_installed() -> bool:
    """Whether Triton can be imported."""
    return _TRITON_IS_INSTALLED


def triton_is_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    from memattn_kernels._common import IS_INTERPRETED

    return IS_INTERPRETED


def load_operators() -> None:
    """Register the operators of every backend that is installed.

    An operator is otherwise registered by its first call. ``torch.export.load`` needs them before:
    in a process that has not called this it says which one is not registered.
    """
    from memattn import cpp

    found = [module.name for module in pkgutil.iter_modules(cpp.__path__) if module.name[0] != "_"]
    for name in found if cpp_is_built() else ():
        importlib.import_module(f"memattn.cpp.{name}")
    for name in found if triton_is_installed() else ():
        if importlib.util.find_spec(f"memattn_kernels.{name}") is not None:
            importlib.import_module(f"memattn_kernels.{name}")


def resolve_backend(
    backend: str, query: Tensor, name: str = "query", operator: str | None = None
) -> Backend:
    """The backend that runs: ``auto`` looks at device, dtype and installation, never at sizes.

    Args:
        backend: What the caller asked for.
        query: The tensor whose dtype and device decide.
        name: Its name in messages.
        operator: An operator that an extension built from older sources may lack; it then counts as
            not built.

    Raises:
        NotImplementedError: If kernels do not support the input, or the call is inside a
            transformation, such as ``torch.func.jvp``, that they do not support.
    """
    check_string("backend", backend, BACKENDS)
    chosen = _choose(backend, query, name, operator)
    transform = None if chosen == "reference" else untaken_transform()
    if transform is not None:
        got = f'"{chosen}"' if backend == chosen else f'"{backend}", which takes "{chosen}"'
        must("backend", f'be "reference" in {transform}', got, NotImplementedError)
    return chosen


def _is_for_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


# Dynamo takes torch's own function to be False; what is marked so it calls
_is_for_onnx._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def untaken_transform() -> str | None:
    """The active transformation that custom operators do not support, or None."""
    if forward_ad._current_level >= 0:  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType]
        return "forward-mode differentiation, as by torch.func.jvp"
    if torch.compiler.is_compiling():  # which cannot look at the other levels, nor trace through
        return "torch.onnx.export" if _is_for_onnx() else None
    level: Any = peek_interpreter_stack()  # None where nothing is transformed
    if level is not None and level.key() == TransformType.Grad:
        return "torch.func.grad, vjp and what is built on them"
    return None


def _choose(backend: str, query: Tensor, name: str, operator: str | None) -> Backend:
    """As ``resolve_backend``, by the input alone."""
    match backend:
        case "auto":
            if query.dtype == torch.float64:
                return "reference"
            if query.is_cuda and triton_is_installed():
                return "triton"
            if query.device.type == "cpu" and cpp_is_built() and _has_kernels(operator):
                return "cpp"
            return "reference"
        case "reference":
            return "reference"
        case "triton":
            if not triton_is_installed():
                raise ImportError('backend "triton" is not installed; run `pip install triton`')
            if query.dtype == torch.float64:
                _lacks(name, "triton", "dtype", "float16, bfloat16 or float32", query.dtype)
            if not query.is_cuda and not triton_is_interpreted():
                _lacks(name, "triton", "device", "cuda (or TRITON_INTERPRET=1 set)", query.device)
            return "triton"
        case "cpp":
            if not (cpp_is_built() and _has_kernels(operator)):
                raise ImportError(
                    f'backend "cpp" is not built; run `{BUILD_CPP}` in the source folder'
                )
            if query.dtype == torch.float64:
                _lacks(name, "cpp", "dtype", "float16, bfloat16 or float32", query.dtype)
            if query.device.type != "cpu":
                _lacks(name, "cpp", "device", "cpu", query.device)
            return "cpp"
        case _:
            must("backend", f"be one of {', '.join(BACKENDS)}", repr(backend))


def _lacks(name: str, backend: str, what: str, requirement: str, got: object) -> None:
    """Raise NotImplementedError for an input that this backend cannot take."""
    raise NotImplementedError(
        f'{name} must have {what} {requirement} for backend "{backend}", got {got}; '
        'backend "reference" takes it'
    )
