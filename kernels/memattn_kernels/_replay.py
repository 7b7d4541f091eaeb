"""The steps of a recorded call: allocations, operators of PyTorch and launches."""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

ALIGNMENT = 16  # bytes; Triton compiles a kernel anew for pointers that are not multiples of it
_aten = torch.ops.aten
ALLOCATIONS = (
    *(_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default),
    *(_aten.new_empty.default, _aten.new_empty_strided.default),
)
# operators whose results depend on values, or whose shapes do
UNKNOWN_BEFORE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

_of_thread = threading.local()


class Place:
    """Stands for a tensor of the call by its number; PyTorch does not take it for a container."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class _Operator(NamedTuple):
    """A call of an operator of PyTorch."""

    function: Any
    args: Any  # with a Place for each tensor
    kwargs: Any
    found: tuple[int, ...]  # numbers of its results


class _Allocation(NamedTuple):
    """A new tensor, uninitialised."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    number: int


class _Launch(NamedTuple):
    """A launch of a compiled kernel."""

    kernel: Any
    compiled: CompiledKernel
    grid: tuple[int, int, int]
    values: list[Any]
    # index among the values, number of the tensor, bytes from its pointer
    pointers: tuple[tuple[int, int, int], ...]
    # index of those of new tensors, and whether they are aligned; the signature says it of others
    new: tuple[tuple[int, bool], ...]


Step = _Operator | _Allocation | _Launch


def on_launch(kernel: Any, grid: tuple[int, ...], compiled: Any, values: Sequence[Any]) -> None:
    """Tell the recorder of this thread, if there is one, what was launched."""
    recorder = getattr(_of_thread, "recorder", None)
    if recorder is not None:
        recorder.launched(kernel, grid, compiled, values)


class Recorder(TorchDispatchMode):
    """Context that records what happens to the tensors of a call."""

    def __init__(self, values: Sequence[Any]) -> None:
        """``values``: the arguments, whose tensors are all different objects."""
        super().__init__()
        self.steps: list[Step] = []
        self.problem: str | None = None
        self.device: int | None = None  # of the launches
        self._tensors: list[Tensor] = []  # by number; kept alive, and so their ids
        self._numbers: dict[int, int] = {}  # by id
        self.n_tensors = 0
        # of a view: the number of its base, and bytes from the base's pointer
        self._views: dict[int, tuple[int, int]] = {}
        self.inputs = tuple(
            (index, self._number(value))
            for index, value in enumerate(values)
            if isinstance(value, Tensor)
        )
        self._devices = {value.device for value in values if isinstance(value, Tensor)}

    def __enter__(self) -> "Recorder":
        _of_thread.recorder = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _of_thread.recorder = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if _depends_on_values(func, args):
            self.problem = f"{func} depends on values"
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        results = [t for t in tree_flatten(found)[0] if isinstance(t, Tensor)]
        if any(id(t) not in self._numbers for t in given):
            self.problem = f"{func} takes a tensor from elsewhere"
        elif any(t.device not in self._devices for t in results):
            self.problem = f"{func} moves to another device"
        else:
            self._called(func, args, kwargs, given, results)
        return found

    def launched(
        self, kernel: Any, grid: tuple[int, ...], compiled: Any, values: Sequence[Any]
    ) -> None:
        """Record a launch."""
        if not isinstance(compiled, CompiledKernel) or kernel.pre_run_hooks:
            self.problem = f"{kernel} is compiled or launched in a way of its own"
            return
        device = driver.active.get_current_device()
        if self.device not in (None, device):
            self.problem = f"{kernel} is launched on another device"
        self.device = device
        kept, pointers, new = list(values), [], []
        given = {number for _, number in self.inputs}
        for index, value in enumerate(values):
            if isinstance(value, Tensor):
                if not value.numel():
                    kept[index] = 0  # the pointer of an empty tensor
                    continue
                number = self._numbers.get(id(value))
                if number is None:
                    self.problem = f"{kernel} takes a tensor from elsewhere"
                    return
                root, delta = self._views.get(number, (number, 0))
                kept[index] = None
                pointers.append((index, root, delta))
                if root not in given:
                    new.append((index, value.data_ptr() % ALIGNMENT == 0))
            elif not isinstance(value, int | float | str | None):
                self.problem = f"{kernel} takes a {type(value).__name__}"
        whole = (*grid, 1, 1)[:3]
        self.steps.append(_Launch(kernel, compiled, whole, kept, tuple(pointers), tuple(new)))

    def replay(self, results: Sequence[Tensor]) -> "Replay | None":
        """The steps that compute these results again, or None if they are not known."""
        numbers = [self._numbers.get(id(result)) for result in results]
        if self.problem is not None or None in numbers:
            return None
        return Replay(self, tuple(n for n in numbers if n is not None))

    def _number(self, tensor: Tensor) -> int:
        number = self._numbers[id(tensor)] = self.n_tensors
        self.n_tensors += 1
        self._tensors.append(tensor)
        return number

    def _called(
        self, func: Any, args: Any, kwargs: Any, given: list[Tensor], results: list[Tensor]
    ) -> None:
        """Record the call of an operator, whose results may be arguments that it changed."""
        place = lambda x: Place(self._numbers[id(x)]) if isinstance(x, Tensor) else x
        args, kwargs = tree_map(place, args), tree_map(place, kwargs)
        found = tuple(
            self._numbers[id(t)] if id(t) in self._numbers else self._number(t) for t in results
        )
        if func in ALLOCATIONS:
            new = results[0]
            size, stride = tuple(new.shape), tuple(new.stride())
            self.steps.append(_Allocation(size, stride, new.dtype, new.device, found[0]))
            return
        if func.is_view:
            number = self._numbers[id(given[0])]
            root, delta = self._views.get(number, (number, 0))
            for own, tensor in zip(found, results, strict=True):
                further = tensor.data_ptr() - given[0].data_ptr() if tensor.numel() else 0
                self._views.setdefault(own, (root, delta + further))
        self.steps.append(_Operator(func, args, kwargs, found))


class Replay:
    """The steps of a call, without views that only launches use."""

    def __init__(self, recorder: Recorder, results: tuple[int, ...]) -> None:
        self.inputs, self.results, self.device = recorder.inputs, results, recorder.device
        needed, steps = set(results), []
        for step in reversed(recorder.steps):
            if isinstance(step, _Launch):
                needed |= {number for _, number, _ in step.pointers}
            elif isinstance(step, _Allocation):
                if step.number not in needed:
                    continue
            elif step.function.is_view and needed.isdisjoint(step.found):
                continue
            else:
                leaves = tree_flatten((step.args, step.kwargs))[0]
                needed |= {leaf.number for leaf in leaves if isinstance(leaf, Place)}
            steps.append(step)
        self.steps: tuple[Step, ...] = tuple(reversed(steps))
        self.n_tensors = recorder.n_tensors

    def __call__(self, values: Sequence[Any]) -> tuple[Tensor, ...] | None:
        """The results for other values of the same signature; None if the steps do not apply."""
        if self.device is None:  # without a launch
            return self._run(values, 0)
        active = driver.active
        stream = active.get_current_stream(self.device)
        if active.get_current_device() == self.device:
            return self._run(values, stream)
        with torch.cuda.device(self.device):
            return self._run(values, stream)

    def _run(self, values: Sequence[Any], stream: int) -> tuple[Tensor, ...] | None:
        tensors: list[Any] = [None] * self.n_tensors
        for index, number in self.inputs:
            tensors[number] = values[index]
        step: Any
        for step in self.steps:
            kind = step.__class__
            if kind is _Launch:
                if not _launch(step, tensors, stream):
                    return None
            elif kind is _Allocation:
                size, stride, dtype, device, number = step
                tensors[number] = torch.empty_strided(size, stride, dtype=dtype, device=device)
            else:
                _call(step, tensors)
        return tuple(tensors[number] for number in self.results)


def _depends_on_values(func: Any, args: Any) -> bool:
    """Whether the result of an operator, or its shape, depends on values."""
    if func is _aten.index.Tensor:  # has the tag because of masks
        masks = (torch.bool, torch.uint8)
        return any(index is not None and index.dtype in masks for index in args[1])
    return any(tag in func.tags for tag in UNKNOWN_BEFORE)


def _launch(step: _Launch, tensors: list[Any], stream: int) -> bool:
    """Launch the kernel; False if it has hooks, or was compiled for other pointer alignment."""
    kernel, compiled, grid, values, pointers, new = step
    if kernel.pre_run_hooks:
        return False
    values = values.copy()
    for index, number, delta in pointers:
        values[index] = tensors[number].data_ptr() + delta
    for index, is_aligned in new:
        if (values[index] % ALIGNMENT == 0) != is_aligned:
            return False
    # the arguments of Triton 3.6; without metadata and hooks, of which there are none
    compiled.run(
        *grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *values
    )
    return True


def _call(step: _Operator, tensors: list[Any]) -> None:
    """Call an operator of PyTorch."""

    def fill(value: Any) -> Any:
        if isinstance(value, Place):
            return tensors[value.number]
        return [fill(x) for x in value] if isinstance(value, list | tuple) else value

    kwargs = {name: fill(value) for name, value in step.kwargs.items()}
    found = step.function(*map(fill, step.args), **kwargs)
    several = found if isinstance(found, list | tuple) else (found,)
    for number, tensor in zip(step.found, several, strict=True):
        tensors[number] = tensor
