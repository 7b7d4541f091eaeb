"""Compare rates predicted for an H100 with measured ones.

The predictions were computed from the instructions of the compiled kernels. A prediction that is
far off shows that the performance model behind planned changes is wrong.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from memattn.bench.case import Case
from memattn.bench.gpu.pool import Job, Result
from memattn.bench.gpu.speed import TIMING_BUDGET, dry_case
from memattn.bench.memory import call_of
from memattn.bench.result_check import check_subject
from memattn.bench.retune import table_name
from memattn.bench.roofline import work_of
from memattn.bench.segmented_attention import SegmentedCase
from memattn.bench.task_masked_attention import TaskMaskedCase
from memattn.bench.timing import interleave

ON_GPU: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
# name: (operator, description)
PREDICTIONS: dict[str, tuple[str, str]] = {
    "calibration": ("segmented_attention", "a bare forward loop"),
    "dense": ("segmented_attention", "our forward and both backward kernels, dense"),
    "cap": ("segmented_attention", "forward at D=64 with and without 128 registers a thread"),
    "window": ("segmented_attention", "a window of 512"),
    "heads": ("task_masked_attention", "backward with one and with two query heads a key head"),
    "partial": ("task_masked_attention", "random masks: every tile is partial"),
}
# predicted TFLOP/s of all pairs inside executed tiles (lowest, highest)
EXPECTED = {
    "bare forward D=128": (470, 490),
    "bare forward D=64": (381, 397),
    "segmented_attention_fwd D=64": (400, 450),
    "segmented_attention_bwd_dq D=64": (742, 798),
    "segmented_attention_bwd_dkdv D=64": (505, 548),
    "segmented_attention_fwd D=128": (465, 510),
    "segmented_attention_bwd_dq D=128": (662, 689),
    "segmented_attention_bwd_dkdv D=128": (478, 565),
    "forward D=64 without a cap": (311, 320),
    "forward D=64 capped at 128 registers": (400, 450),
    "window 512 forward D=64": (223, 334),
    "window 512 forward D=128": (322, 370),
    "task_masked_attention_bwd_dkdv D=64 G=1": (289, 323),
    "task_masked_attention_bwd_dkdv D=64 G=2": (289, 323),
    "task_masked_attention_bwd_dkdv D=128 G=1": (411, 460),
    "task_masked_attention_bwd_dkdv D=128 G=2": (411, 460),
    "partial tiles forward D=64": (97, 100),
    "partial tiles forward D=128": (155, 169),
}


def jobs(operators: tuple[str, ...], *, dry: bool) -> list[Job]:
    """One job for each prediction."""
    return [
        {"task": "predict", "name": name, "label": f"prediction: {text}", "dry": dry}
        for name, (operator, text) in PREDICTIONS.items()
        if operator in operators
    ]


def run_job(job: Job) -> Result:
    """Measure the rates that a prediction is about."""
    rows = [
        {
            "what": what,
            "predicted": EXPECTED.get(what),
            "measured": None if rate is None else round(rate / 1e12, 1),
        }
        for what, rate in _MEASURES[job["name"]](job["dry"])
    ]
    return {"status": "ok", "predictions": rows}


Rates = Iterator[tuple[str, float | None]]  # what, FLOP/s


def _calibration(dry: bool) -> Rates:
    from memattn.bench.gpu.calibration import bare_attention

    for D in reversed(_widths(dry)):
        case = _segmented("dense", D, dry)
        if dry:
            case = replace(case, T=32)
        inputs = case.inputs()
        q, k, v = inputs["query"], inputs["key"], inputs["value"]
        out = bare_attention(q, k, v)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert torch.allclose(out.float(), expected.float(), atol=2e-2), "wrong result"
        call = partial(bare_attention, q, k, v)
        yield f"bare forward D={D}", _rate(case, "forward", call, dry)


def _dense(dry: bool) -> Rates:
    for D in _widths(dry):
        case = _segmented("dense", D, dry)
        yield from _kernels(case, f"D={D}", case.pairs() * case.H, dry)


def _cap(dry: bool) -> Rates:
    case = _segmented("dense", 64, dry)
    call = call_of(case, case.subject("triton"), "forward")
    names = {None: "without a cap", 128: "capped at 128 registers"}
    calls = {}
    for cap, name in names.items():
        with _capped("segmented_attention_fwd_dense", 64, cap):
            call()  # compile

        def run(cap: int | None = cap) -> None:
            with _capped("segmented_attention_fwd_dense", 64, cap):
                call()

        calls[f"forward D=64 {name}"] = run
    yield from _rates(case, "forward", calls, dry)


def _window(dry: bool) -> Rates:
    for D in _widths(dry):
        case = replace(_segmented("window", D, dry), window_size=16 if dry else 512)
        call = call_of(case, case.subject("triton"), "forward")
        yield f"window 512 forward D={D}", _rate(case, "forward", call, dry)


def _heads(dry: bool) -> Rates:
    for D in _widths(dry):
        for groups in (1, 2):
            case = replace(_task_masked("blocks", D, dry), density=50)
            case = replace(case, Hkv=case.H // groups)
            # another group size is another kernel: check it
            check_subject(replace(case, B=1, T=min(case.T, 300)), "triton", gradients=True)
            for what, rate in _kernels(case, f"D={D} G={groups}", case.pairs() * case.H, dry):
                if "dkdv" in what:
                    yield what, rate


def _partial(dry: bool) -> Rates:
    for D in _widths(dry):
        # half of the pairs of every tile are allowed: executed tiles run at twice the useful rate
        case = replace(_task_masked("tokens", D, dry), density=50, n_tasks=1)
        call = call_of(case, case.subject("triton"), "forward")
        rate = _rate(case, "forward", call, dry)
        yield f"partial tiles forward D={D}", None if rate is None else 2 * rate


_MEASURES: dict[str, Callable[[bool], Rates]] = {
    "calibration": _calibration,
    "dense": _dense,
    "cap": _cap,
    "window": _window,
    "heads": _heads,
    "partial": _partial,
}


def _widths(dry: bool) -> tuple[int, ...]:
    """Head dimensions; one in a dry run."""
    return (64,) if dry else (64, 128)


def _segmented(kind: str, D: int, dry: bool) -> SegmentedCase:
    case = SegmentedCase(kind=kind, T=8192, B=4, H=32, D=D, **ON_GPU)
    return dry_case(case) if dry else case


def _task_masked(kind: str, D: int, dry: bool) -> TaskMaskedCase:
    case = TaskMaskedCase(kind=kind, T=8192, B=8, H=16, D=D, n_tasks=8, **ON_GPU)
    return dry_case(case) if dry else case


def _rate(case: Case, direction: str, call: Callable[[], object], dry: bool) -> float | None:
    """Useful FLOP/s of a call; None in a dry run."""
    return next(_rates(case, direction, {"": call}, dry))[1]


def _rates(case: Case, direction: str, calls: dict[str, Callable], dry: bool) -> Rates:
    """Useful FLOP/s of calls that are timed round by round."""
    flops = work_of(case.work(), direction).flops
    if dry:
        for name, call in calls.items():
            call()
            yield name, None
        return
    timings = interleave(calls, device=case.device, seconds=TIMING_BUDGET.seconds)
    for name, timing in timings.items():
        yield name, flops / timing.median


def _kernels(case: Any, label: str, pairs: int, dry: bool) -> Rates:
    """FLOP/s of each of our forward and backward kernels, from PyTorch's profiler."""
    call = call_of(case, case.subject("triton"), "forward+backward")
    call()
    products = {"fwd": 2, "bwd_dq": 3, "bwd_dkdv": 4}
    names = {f"{case.operator}_{part}": 2 * n * pairs * case.D for part, n in products.items()}
    if dry:
        yield from ((f"{name} {label}", None) for name in names)
        return
    from torch.profiler import ProfilerActivity, profile

    repeats = 5
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in trace.key_averages():
        seconds = max(event.device_time_total, event.self_device_time_total) * 1e-6
        spent[event.key] = spent.get(event.key, 0.0) + seconds
    is_of = lambda key, name: key.startswith((f"{name}_kernel", f"{name}_plain_kernel"))
    for name, flops in names.items():
        seconds = sum(time for key, time in spent.items() if is_of(key, name))
        yield f"{name} {label}", repeats * flops / seconds if seconds else None


@contextmanager
def _capped(kernel: str, width: int, registers: int | None) -> Iterator[None]:
    """Run a kernel with at most ``registers`` per thread, or without a limit."""
    from memattn_kernels import configs

    entry = configs.table(table_name())[kernel][str(width)]
    shipped = entry["half"]
    plain = {name: value for name, value in shipped.items() if name != "maxnreg"}
    entry["half"] = plain if registers is None else plain | {"maxnreg": registers}
    try:
        yield
    finally:
        entry["half"] = shipped
