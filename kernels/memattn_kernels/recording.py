"""Calls of operators that are recorded once and then replayed without choosing launches again.

On the host a call of an operator spends most of its time on choosing what to launch. With
``MEMATTN_RECORD_LAUNCHES=1`` this is done once for each signature: shapes, strides, dtypes, devices
and alignment of the tensors, and the options. A later call with the same signature allocates the
same tensors, calls the same operators of PyTorch and launches the same compiled kernels, with the
pointers of its own tensors (``_replay``). It does not pass PyTorch's dispatcher, so it is only
replayed where the dispatcher would just call the operator.

It uses internals of Triton, so it is off by default and works with one version of Triton only.
"""

import os
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
import triton
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from triton import knobs

from memattn_kernels._replay import ALIGNMENT, Recorder, Replay

VARIABLE = "MEMATTN_RECORD_LAUNCHES"
TRITON_VERSION = "3.6"
# a signature is recorded after this many calls, as recording takes longer than a plain call
SIGHTS = 3
# signatures of an operator; beyond this number all are forgotten
MAX_SIGNATURES = 1024

Values = tuple[Any, ...]
_recorded: list["Recorded"] = []


def obstacle() -> str | None:
    """Why calls cannot be recorded here, or None."""
    if not _is_wanted:
        return f"{VARIABLE}=1 is not set"
    if not triton.__version__.startswith(f"{TRITON_VERSION}."):
        return f"it needs Triton {TRITON_VERSION}, and this is {triton.__version__}"
    if knobs.runtime.interpret:
        return "kernels are interpreted"
    if torch.version.hip is not None:
        return "it is for NVIDIA cards"
    return None


def switch(is_wanted: bool) -> None:
    """Switch recording on, unless there is an obstacle, or off."""
    global _is_wanted, _is_on
    _is_wanted = is_wanted
    _is_on = obstacle() is None
    forget()


def forget() -> None:
    """Forget all recorded calls, for code that changes a table of configurations."""
    for recorded in _recorded:
        recorded.replays.clear()


def is_on() -> bool:
    """Whether calls may be recorded and replayed at all."""
    return _is_on


def is_plain() -> bool:
    """Whether PyTorch would only run the operator in this call, and Triton only launch.

    That is so without a graph, a mode, a function transform or a profiler, and with Triton's hooks
    and switches at their defaults.
    """
    if torch.compiler.is_compiling():
        return False
    runtime = knobs.runtime
    return (
        torch._C._dispatch_tls_local_include_set().raw_repr() in _PLAIN_KEYS
        and peek_interpreter_stack() is None
        and not torch.autograd._profiler_enabled()
        and not runtime.debug
        and not knobs.compilation.instrumentation_mode
        and _is_idle(runtime.launch_enter_hook)
        and _is_idle(runtime.launch_exit_hook)
    )


def _is_idle(hook: Any) -> bool:
    return hook is None or not getattr(hook, "calls", True)


def _plain_keys() -> frozenset[int]:
    """Dispatch keys that every call has, within inference mode and without."""
    found = []
    for is_inference in (False, True):
        with torch.inference_mode(is_inference):
            found.append(torch._C._dispatch_tls_local_include_set().raw_repr())
    return frozenset(found)


_PLAIN_KEYS = _plain_keys()
_is_wanted = os.environ.get(VARIABLE) == "1"
_is_on = obstacle() is None


class Recorded:
    """A function of an operator's arguments whose calls are recorded."""

    def __init__(
        self, compute: Callable[[Values], tuple[Tensor, ...]], tensor_places: Sequence[int], n: int
    ) -> None:
        """``compute`` makes results by allocations, PyTorch's operators and launches.

        It takes ``n`` values, of which those at ``tensor_places`` are tensors or None.
        """
        self.compute, self.tensor_places = compute, tuple(tensor_places)
        self.options = itemgetter(*(i for i in range(n) if i not in tensor_places))
        # how often a signature was seen, then its replay, or None if it cannot be replayed
        self.replays: dict[Values, int | Replay | None] = {}
        _recorded.append(self)

    def __call__(self, values: Values, plain: Callable[..., Any]) -> tuple[Tensor, ...]:
        """The results for these arguments; ``plain`` is called where there is no replay."""
        signature = self.signature(values)
        replay = None if signature is None else self.replays.get(signature, 0)
        if isinstance(replay, Replay):
            found = replay(values)
            return plain(*values) if found is None else found
        if signature is None or replay is None:
            return plain(*values)
        return self._count(signature, replay + 1, values, plain)

    def signature(self, values: Values) -> Values | None:
        """All that allocations, launches and their options depend on.

        None with a tensor that the dispatcher turns into another one first, such as a subclass's.
        """
        parts: list[Any] = [self.options(values)]
        for place in self.tensor_places:
            tensor = values[place]
            if tensor is None:
                parts.append(None)
                continue
            if tensor.__class__ is not Tensor and tensor.__class__ is not torch.nn.Parameter:
                return None
            keys = torch._C._dispatch_keys(tensor).raw_repr()
            if keys not in _PLAIN_TENSORS and not _is_plain_tensor(tensor, keys):
                return None
            parts += (tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(), keys)
            parts.append(tensor.data_ptr() % ALIGNMENT)
        return tuple(parts)

    def _count(
        self, signature: Values, sights: int, values: Values, plain: Callable[..., Any]
    ) -> tuple[Tensor, ...]:
        """Count a call of a signature, and record the signature once it was called often enough."""
        if len(self.replays) >= MAX_SIGNATURES:
            self.replays.clear()
        if sights < SIGHTS:
            self.replays[signature] = sights
            return plain(*values)
        # tensors of this call alone, each one an object of its own
        own = tuple(v.detach() if isinstance(v, Tensor) else v for v in values)
        with torch.no_grad(), Recorder(own) as recorder:
            results = self.compute(own)
        self.replays[signature] = recorder.replay(results)
        return results


def _is_plain_tensor(tensor: Tensor, keys: int) -> bool:
    """Whether a tensor has the dispatch keys of a new tensor on its device; the answer is kept."""
    for is_inference in (False, True):
        with torch.inference_mode(is_inference):
            new = torch.empty(0, device=tensor.device)
        _PLAIN_TENSORS.add(torch._C._dispatch_keys(new).raw_repr())
    return keys in _PLAIN_TENSORS


_PLAIN_TENSORS: set[int] = set()
