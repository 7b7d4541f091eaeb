"""What an operator says about itself, so that the tests that all operators share can call it."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from memattn.ops._dispatch import cpp_is_built, triton_is_installed
from memattn.testing import assert_results_within_budget, run_with_gradients

CUDA = torch.cuda.is_available()
INTERPRETED = not CUDA  # Triton kernels take a second for each case then
needs_cpp = pytest.mark.skipif(not cpp_is_built(), reason="the C++ extension is not built")
needs_triton = pytest.mark.skipif(not triton_is_installed(), reason="Triton is not installed")
MARKS = {"cpp": needs_cpp, "triton": needs_triton, "reference": ()}
COMPILED = [pytest.param(name, marks=MARKS[name]) for name in ("cpp", "triton")]
EVERY = [pytest.param(name, marks=marks) for name, marks in MARKS.items()]
DEVICE = {"cpp": "cpu", "triton": "cuda" if CUDA else "cpu", "reference": "cpu"}
# of the C++ kernels, the fastest first
INSTRUCTION_SETS = ["amx_bf16", "avx512_bf16", "avx512", "avx2", "portable"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DOCUMENTS = [0, 1, 9, 9, 30, 37]  # bounds of packed documents, one of them empty
ONE = dict(B=1, H=2, Hkv=1)
Arguments = tuple[dict[str, Tensor], dict[str, Any]]  # floating inputs, further arguments


@dataclass(frozen=True)
class Case:
    """One call: sizes of the inputs, options of the operator, index tensors as lists."""

    sizes: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    bounds: dict[str, list[int]] = field(default_factory=dict)


Cases = dict[str, Case]


def unchanged(tensors: dict[str, Tensor], options: dict[str, Any], *place: int) -> Arguments:
    """The arguments as they are: nothing but tokens depends on the place."""
    return tensors, options


@dataclass(frozen=True, kw_only=True)
class OperatorSpec:
    """An operator for the shared tests. ``make_inputs`` gives floating inputs and options.

    Every mapping of cases is by the name under which the test shows.
    """

    operator: Callable[..., Any]
    backends: tuple[str, ...] = ("cpp", "triton", "reference")
    lacks: tuple[str, ...] = ()  # shared tests, or <test>-<backend>, that are not for it
    make_inputs: Callable[..., Arguments]  # of the sizes, dtype=, device= and seed=
    # -- against the reference: all cases, each with every variant of the options
    cases: Cases
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    interpreted: tuple[str, ...] | None = None  # in the interpreter, float32: None is all
    interpreted_half: tuple[str, ...]  # and float16; bfloat16, computed in float32, on the first
    gradcheck: Cases  # tiny, in float64
    empty: Cases  # no sequences, queries or keys
    at_length: dict[str, Callable[[int], Case]]  # C++: around the sizes of tiles and panels
    longest: tuple[int, ...]
    at_head_dim: Case  # C++: to which head dimensions are added
    at_instruction_set: Cases
    at_threads: Cases  # few heads, so that threads share a head
    # -- what the inputs are
    own_axes: bool = False  # not [B, H, T, D]: messages about shapes are in its own file
    tokens: tuple[str, ...] = ("query", "key", "value")  # with a row for each token
    # with a row for each sequence, options among them
    batched: tuple[str, ...] = ("query", "key", "value")
    float32: tuple[str, ...] = ()  # beside inputs of half precision too
    rows: tuple[str, ...] = ("out", "lse")  # results with a row for each query
    means: dict[str, Callable[[int], int]] = field(default_factory=dict)  # over so many queries
    # -- what holds without a reference
    small: Case  # all kinds of inputs, every query sees a key
    causal: Cases  # 37 queries that see nothing later
    padded: Cases  # one sequence of 21
    pad: Callable[..., Arguments] = unchanged  # the rest for (left, right) more tokens
    packed: Cases = field(default_factory=dict)  # one row; empty where nothing may be packed
    document: Callable[..., Arguments] = unchanged  # the rest for document (d, first, last)
    unseen: Cases  # with keys that no query sees
    repeated: Case  # all sources, for bits that repeat
    large: Case  # D = 64
    opcheck: Cases
    compiled: dict[str, Callable[[int], Case]]  # at a length
    gpu_large: Cases  # many tiles of the shipped configurations
    few_variants: tuple[str, ...] = ("",)  # that differ in kind, where each call takes seconds
    # -- bad input, beside what all operators refuse
    wrong: Case  # B=2, H=4, Hkv=2, T=S=9, D=16
    wrong_packed: Case | None = None  # the same with B=1

    def __str__(self) -> str:
        return self.operator.__name__

    def takes(self, argument: str) -> bool:
        """Whether the operator has an argument of this name."""
        return argument in inspect.signature(self.operator).parameters

    def make(
        self,
        case: Case,
        backend: str = "reference",
        dtype: torch.dtype = torch.float32,
        **sizes: Any,
    ) -> Arguments:
        """Inputs and options of a case, the backend among them."""
        device = DEVICE[backend]
        if backend == "triton" and INTERPRETED:
            sizes = {"H": 2, "Hkv": 1, **case.sizes, **sizes}
        tensors, options = self.make_inputs(**{**case.sizes, **sizes}, dtype=dtype, device=device)
        bounds = {name: int32(*values, device=device) for name, values in case.bounds.items()}
        return tensors, {**options, **case.options, **bounds, "backend": backend}

    def run(self, tensors: dict[str, Tensor], options: dict[str, Any]) -> Any:
        """The operator's results."""
        return self.operator(**tensors, **options)

    def each_variant(self, backend: str, *, few: bool = False) -> list[dict[str, Any]]:
        """Options of the variants; in the interpreter of those that differ in kind."""
        if few or (backend == "triton" and INTERPRETED):
            return [self.variants[name] for name in self.few_variants]
        return list(self.variants.values())

    def gradients(
        self, tensors: dict[str, Tensor], options: dict[str, Any], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Results and gradients by name."""
        return run_with_gradients(self.operator, tensors, options, **kwargs)

    def check(self, tensors: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
        """Assert the error rule for outputs and all gradients, and return them."""
        return check(self.operator, tensors, options)

    def check_case(self, case: Case, backend: str, dtype: torch.dtype, **sizes: Any) -> None:
        """Assert the error rule for a case with every variant of the options."""
        tensors, options = self.make(case, backend, dtype, **sizes)
        for variant in self.variants.values():
            self.check(tensors, {**options, **variant})


class Recorder(TorchFunctionMode):
    """Which registered operators are called, and with what."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if isinstance(func, torch._ops.OpOverload) and func.namespace.startswith("memattn"):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def check(
    operator: Callable[..., Any],
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    names: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """Assert the error rule for outputs and all gradients of a backend, and return them."""
    reference = {**options, "backend": "reference"}
    actual = run_with_gradients(operator, tensors, options)
    assert_results_within_budget(
        actual,
        run_with_gradients(operator, tensors, reference),
        run_with_gradients(operator, tensors, reference, dtype=torch.float64),
        names,
    )
    return actual


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert the same bits."""
    assert actual.keys() == expected.keys()
    for name, result in actual.items():
        assert torch.equal(result, expected[name]), name


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert the same values up to the order of sums."""
    assert actual.keys() == expected.keys()
    for name, result in actual.items():
        torch.testing.assert_close(result, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def queries(name: str, results: dict[str, Tensor], first: int, last: int) -> Tensor:
    """Rows of some of the queries of a result: ``lse`` has an axis less."""
    result = results[name]
    return result[..., first:last] if name == "lse" else result[..., first:last, :]


def int32(*values: int, device: str = "cpu") -> Tensor:
    """An index tensor."""
    return torch.tensor(values, dtype=torch.int32, device=device)


def reference_params(specs: Iterable[OperatorSpec]) -> list:
    """Operator, backend, dtype, case and options for the test against the reference.

    In the interpreter: every index set in float32, half precision on cases that differ in kind.
    """
    params = []
    for spec in specs:
        backends = [b for b in ("cpp", "triton") if b in spec.backends]
        for backend, dtype in ((b, d) for b in backends for d in DTYPES):
            names = tuple(spec.cases)
            if backend == "triton" and INTERPRETED:
                half = {torch.float16: spec.interpreted_half}.get(dtype, spec.interpreted_half[:1])
                names = (spec.interpreted or names) if dtype == torch.float32 else half
            for name in names:
                for label, options in spec.variants.items():
                    parts = [str(spec), backend, str(dtype).removeprefix("torch."), name, label]
                    params.append(
                        pytest.param(
                            *(spec, backend, dtype, spec.cases[name], options),
                            marks=MARKS[backend],
                            id="-".join(filter(None, parts)),
                        )
                    )
    return params


def over(specs: Iterable[OperatorSpec], field_name: str) -> pytest.MarkDecorator:
    """Parametrise by operator and each case of one of its fields."""
    return pytest.mark.parametrize(
        ("spec", "case"),
        [
            pytest.param(spec, case, id=f"{spec}-{name}")
            for spec in specs
            for name, case in getattr(spec, field_name).items()
        ],
    )
