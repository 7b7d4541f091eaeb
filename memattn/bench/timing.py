"""Time several functions round by round, so that drift of the machine affects all equally."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MAX_ROUNDS = 1000
MIN_SAMPLE = 2e-3  # seconds on the CPU


@dataclass(frozen=True)
class Timing:
    """Seconds of one call; one sample per round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return quantile(self.samples, 0.5)

    @property
    def fastest(self) -> float:
        return min(self.samples)

    @property
    def q20(self) -> float:
        return quantile(self.samples, 0.2)

    @property
    def q80(self) -> float:
        return quantile(self.samples, 0.8)


def quantile(values: tuple[float, ...], q: float) -> float:
    """The quantile ``q``, interpolated."""
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()


def speedup(subject: Timing, peer: Timing) -> Timing:
    """How many times faster ``subject`` is than ``peer`` in each round."""
    pairs = zip(subject.samples, peer.samples, strict=True)
    return Timing(tuple(theirs / ours for ours, theirs in pairs))


def interleave(
    functions: Mapping[str, Callable[[], object]],
    *,
    device: str,
    seconds: float = 0.5,
    warmup: int = 1,
    min_rounds: int = 5,
    min_sample: float = MIN_SAMPLE,
) -> dict[str, Timing]:
    """Time the functions round by round: A B C, A B C and so on.

    On CUDA a call is timed by events on the stream, after a write over a buffer larger than the
    L2 cache. The write also lets the host run ahead, which hides launch costs as in real use.
    On the CPU the wall clock is read; a sample of a short call is the mean of several.

    Args:
        functions: Functions to time, by name. Their results are discarded.
        device: Where they run.
        seconds: Time to spend on each function, roughly.
        warmup: Rounds before the counted ones, at least 1.
        min_rounds: Least number of counted rounds.
        min_sample: Seconds of one sample on the CPU: shorter calls are repeated within it.

    Returns:
        A ``Timing`` for each name; all have the same number of samples, in the order of rounds.
    """
    on_cuda = torch.device(device).type == "cuda"
    clock = _CudaClock(device) if on_cuda else _CpuClock(min_sample)
    once: dict[str, float] = {}
    for _ in range(max(warmup, 1)):
        once = {name: clock.time(function, 1) for name, function in functions.items()}
    # at least two calls of each: the first may have compiled or paged in
    once = {name: min(once[name], clock.time(f, 1)) for name, f in functions.items()}
    calls = {name: 1 if on_cuda else clock.calls(once[name]) for name in functions}
    round_seconds = sum(once[name] * calls[name] for name in functions)
    rounds = int(seconds * len(functions) / max(round_seconds, 1e-9))
    rounds = min(max(rounds, min_rounds), MAX_ROUNDS)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            samples[name].append(clock.time(function, calls[name]))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


class _CpuClock:
    def __init__(self, min_sample: float) -> None:
        self.min_sample = min_sample

    def calls(self, once: float) -> int:
        return max(1, min(10_000, round(self.min_sample / max(once, 1e-9))))

    def time(self, function: Callable[[], object], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls


class _CudaClock:
    def __init__(self, device: str) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.flush = torch.empty(
            max(4 * properties.L2_cache_size, 1 << 28), dtype=torch.int8, device=device
        )

    def calls(self, once: float) -> int:
        return 1

    def time(self, function: Callable[[], object], calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls
