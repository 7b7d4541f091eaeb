"""Base classes of benchmark cases: how an operator is run, checked and counted.

Each operator has one file, ``memattn/bench/<operator>.py``, with the name of its file in
``memattn.ops``; ``models.py`` benchmarks whole models. The file defines a subclass of ``Case`` and
ends with ``CASE = <that class>``.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor

import memattn.bench
import memattn.ops
from memattn.bench.roofline import Work, attention_work
from memattn.checks import check_int, must

# from named inputs to the output; differentiable in the inputs
Forward = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Peer:
    """Another implementation of a case: how to build it, and its bytes that grow as T^2."""

    build: Callable[[], Forward]  # called once, outside the timing: masks, compilation
    score_bytes: int = 0
    compiled: bool = False  # takes seconds to build; left out of quick runs
    slow: bool = False  # takes seconds per call: timed apart from the other peers, in few rounds
    # set for a peer that computes something else than the case: its own work by direction. Only
    # its time is used; its results are not compared
    yardstick: dict[str, Work] | None = None


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One shape of one operator.

    The fields of type int, except ``T`` and ``seed``, are the sizes that a user may set
    (``shape={"H": 8}``).
    """

    operator: ClassVar[str]
    kinds: ClassVar[dict[str, str]]  # name: description in one line
    quick_kinds: ClassVar[tuple[str, ...]]  # kinds of a quick run
    cuda_sizes: ClassVar[dict[str, int]]  # defaults on CUDA that differ from the fields

    kind: str
    T: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    @abstractmethod
    def inputs(self) -> dict[str, Tensor]:
        """Random inputs by name. Floating-point inputs get gradients."""

    @abstractmethod
    def subject(self, backend: str) -> Forward:
        """Our operator with this backend."""

    def checked(self, backend: str) -> Forward:
        """The function that is compared with ``definition``; by default the subject."""
        return self.subject(backend)

    @abstractmethod
    def definition(self, rows: slice) -> Forward:
        """The reference for these query rows only; its output is ``[B, H, rows, Dv]``."""

    @abstractmethod
    def peers(self) -> dict[str, Peer]:
        """Implementations to compare with, by name: same results, or a yardstick for time."""

    @abstractmethod
    def work(self) -> dict[str, Work]:
        """Useful work, by ``"forward"`` and ``"backward"``."""

    def rows_are_independent(self) -> bool:
        """Whether sampled rows suffice to check gradients; they do not for a mean over all rows."""
        return True

    def is_checked_short(self) -> bool:
        """Whether the case is checked at a small length only, because a long one takes minutes."""
        return False

    def has(self, direction: str) -> bool:
        """Whether this case is measured in a direction."""
        return True

    @abstractmethod
    def label(self, T: str | None = None) -> str:
        """Short text for tables: the kind and the main sizes; ``T`` replaces the length."""

    @property
    def dtype_label(self) -> str:
        """End of a label: the dtype, if the case runs on the CPU and not in float32."""
        if self.device != "cpu" or self.dtype == torch.float32:
            return ""
        return f" {self.dtype}".replace("torch.", "")

    @abstractmethod
    def tokens(self) -> int:
        """Query positions in the batch."""

    def sizes(self) -> dict[str, int]:
        """The sizes of this case by name."""
        return {name: getattr(self, name) for name in self.size_names()}

    def resized(self, T: int) -> "Case":
        """The same case at another length."""
        return replace(self, T=T)

    @classmethod
    def bars(cls, suite: str) -> Sequence[Any]:
        """This operator's performance targets in a suite, as a sequence of ``Bar``."""
        return ()

    @classmethod
    def size_names(cls) -> tuple[str, ...]:
        """Names of the sizes that a user may set."""
        return tuple(
            field.name
            for field in fields(cls)
            if field.type in (int, int | None) and field.name not in ("T", "seed")
        )

    @classmethod
    def check_kind(cls, kind: str) -> None:
        """Raise ValueError unless this operator has that kind of case."""
        if kind not in cls.kinds:
            must("kinds", f"be from {', '.join(cls.kinds)} for {cls.operator}", kind)

    @classmethod
    def check_sizes(cls, shape: Mapping[str, Any]) -> None:
        """Raise unless every entry is a size of this operator, an integer of at least 1."""
        for name, value in shape.items():
            if name not in cls.size_names():
                must("shape", f"have names from {', '.join(cls.size_names())}", name)
            check_int(f"shape[{name}]", value, 1)


@dataclass(frozen=True, kw_only=True)
class TokenCase(Case):
    """One shape of an operator over tokens: ``batch`` rows of ``T`` queries and keys each."""

    B: int = 1
    H: int = 8
    Hkv: int | None = None  # None: as many as H
    D: int = 64

    @property
    def key_heads(self) -> int:
        return self.H if self.Hkv is None else self.Hkv

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self.B

    def tokens(self) -> int:
        return self.T * self.batch

    def draw(self, make: Callable[..., dict[str, Tensor]], **more: int) -> dict[str, Tensor]:
        """Random inputs of these sizes, by a function of ``memattn.bench.inputs``."""
        return make(
            B=self.batch,
            H=self.H,
            Hkv=self.key_heads,
            T=self.T,
            D=self.D,
            dtype=self.dtype,
            device=self.device,
            seed=self.seed,
            seed_device=self.device,
            **more,
        )

    def score_bytes(self, n_keys: int) -> int:
        """Bytes of a stored score matrix with ``n_keys`` keys."""
        return self.batch * self.H * self.T * n_keys * self.dtype.itemsize

    def softmax_work(self, pairs: int, keys: int, rows: int | None = None) -> dict[str, Work]:
        """Useful work of softmax attention; see ``attention_work``."""
        return attention_work(
            pairs=pairs,
            rows=self.batch * self.H * self.T if rows is None else rows,
            keys=keys,
            head_dim=self.D,
            value_dim=self.D,
            element_size=self.dtype.itemsize,
        )


def operators() -> dict[str, type[Case]]:
    """The operators that can be measured, by name; ``models`` if transformers is installed."""
    here, ops = (
        {module.name for module in pkgutil.iter_modules(package.__path__)}
        for package in (memattn.bench, memattn.ops)
    )
    if find_spec("transformers") is not None:
        ops.add("models")
    return {
        name: importlib.import_module(f"memattn.bench.{name}").CASE for name in sorted(here & ops)
    }


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        must(name, f"be one of {', '.join(choices)}", repr(value))
