"""Replays have the bits of plain calls: with other tensors than were recorded, interpreted."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from operator_contract import INTERPRETED, assert_same
from operator_specs import having
from torch import Tensor

from memattn.bench.host_driver import HostDriver
from memattn.testing import run_with_gradients

triton = pytest.importorskip("triton")
from triton.compiler import CompiledKernel  # noqa: E402

from memattn.bench.gpu import correctness  # noqa: E402
from memattn_kernels import _launch, _replay, recording  # noqa: E402

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are not interpreted")


class InterpretedKernel(CompiledKernel):
    """Runs a kernel in the interpreter, on pointers in place of tensors."""

    def __init__(self, kernel, values):
        self.kernel, self.launches = kernel, 0
        self.dtypes = [v.dtype if isinstance(v, Tensor) else None for v in values]
        self.function = self.packed_metadata = None
        self._run = self.launch

    def launch(self, x, y, z, stream, function, metadata, data, enter, leave, *values):
        self.launches += 1
        given = [
            value if dtype is None else element_at(value, dtype)
            for value, dtype in zip(values, self.dtypes, strict=True)
        ]
        self.kernel[x, y, z](*given)


def element_at(pointer: int, dtype: torch.dtype) -> Tensor:
    """A tensor of one element at this address."""
    if not pointer:
        return torch.empty(0, dtype=dtype)
    memory = (ctypes.c_char * dtype.itemsize).from_address(pointer)
    return torch.frombuffer(memory, dtype=dtype)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch):
    """The kernels that were recorded, while interpreted calls are recorded."""
    found = []

    def on_launch(kernel, grid, compiled, values):
        if getattr(_replay._of_thread, "recorder", None) is not None:
            found.append(InterpretedKernel(kernel, values))
            _replay.on_launch(kernel, grid, found[-1], values)

    monkeypatch.setattr(_launch, "on_launch", on_launch)
    monkeypatch.setattr(_replay, "driver", SimpleNamespace(active=HostDriver()))
    monkeypatch.setattr(recording, "obstacle", lambda: None)
    monkeypatch.setattr(recording, "SIGHTS", 1)
    recording.switch(True)
    yield found
    recording.switch(False)


def some_cases():
    """One case of each operator: the others' launches are compared in another file."""
    firsts = [(spec, spec.interpreted_half[0], spec.few_variants[0]) for spec in having("triton")]
    return [
        pytest.param(spec, spec.cases[name], spec.variants[variant], id=f"{spec}-{name}-{variant}")
        for spec, name, variant in firsts
    ]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch):
    """What replays returned."""
    found = []
    replay = _replay.Replay.__call__

    def call(self, values):
        found.append(replay(self, values))
        return found[-1]

    monkeypatch.setattr(_replay.Replay, "__call__", call)
    return found


@pytest.mark.parametrize("operator", ["chapter_router", "neural_memory"])
def test_replay_of_other_operators(operator, kernels, replays):
    """The bits of a plain call, with other tensors than were recorded."""
    jobs = correctness.jobs((operator,), dry=True)
    for seed in range(recording.SIGHTS + 1):
        function, tensors, options = correctness.build(jobs[0] | {"seed": seed})
        options |= {"backend": "triton"}
        assert not replays
        actual = run_with_gradients(function, tensors, options)
    assert len(replays) >= 2  # the neural memory reads in two calls
    assert None not in replays
    recording.switch(False)
    assert_same(actual, run_with_gradients(function, tensors, options))


@pytest.mark.parametrize(("spec", "case", "options"), some_cases())
def test_replay_of_attention(spec, case, options, kernels, replays):
    """The same for the operators of the shared tests, which are right where they are plain."""
    for seed in range(recording.SIGHTS + 1):
        tensors, own = spec.make(case, "triton", seed=seed)
        assert not replays
        actual = spec.gradients(tensors, {**own, **options})
    assert len(replays) == 2
    assert None not in replays
    assert {kernel.launches for kernel in kernels} == {1}
    recording.switch(False)
    assert_same(actual, spec.gradients(tensors, {**own, **options}))
