"""Stage "host": host time of small calls, with plain and with recorded launches.

For calls of this size the GPU needs less time than the host, so the wall time is the host's. For
comparison, the time of the GPU alone is measured with the same calls in a CUDA graph.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from memattn.bench.gpu import correctness
from memattn.bench.gpu.pool import Job, Result
from memattn.bench.timing import quantile

# goal: microseconds of a call above the time of the GPU alone
AIM = 25
T, D = 128, 64
N_CALLS, N_ROUNDS = 50, 12
PARTS = ("forward", "forward with gradients", "backward")
# the plainest case of each operator
CASES = {
    "segmented_attention": "causal",
    "future_attention": "no loss",
    "task_masked_attention": "full",
    "chapter_attention": "token",
    "branch_attention": "all",
}


def jobs(operators: tuple[str, ...], *, dry: bool) -> list[Job]:
    """One job for each operator that has a case here."""
    common = {"task": "host", "direction": "forward", "seed": 0, "device": "cpu" if dry else "cuda"}
    common |= {"dtype": "float32" if dry else "bfloat16"}  # the interpreter's bfloat16 is wrong
    sizes = {"T": correctness.DRY_LENGTH, "D": correctness.DRY_HEAD_DIMS[0]} if dry else {}
    return [
        common | {"T": T, "D": D} | sizes | {"operator": name, "case": case, "label": name}
        for name, case in CASES.items()
        if name in operators
    ]


def run_job(job: Job) -> Result:
    """Microseconds of each part of a call: plain, recorded, and on the GPU alone."""
    from memattn_kernels import recording

    rows: list[dict[str, Any]] = [{"part": part} for part in PARTS]
    is_timed = job["device"] == "cuda"
    for name in ("plain", "recorded"):
        recording.switch(name == "recorded")
        try:
            if recording.obstacle() is not None and name == "recorded" and is_timed:
                return {"status": "ok", "host": rows, "reason": recording.obstacle()}
            for row, call in zip(rows, calls(job), strict=True):
                row[name] = _microseconds(call) if is_timed else call() and None
                if is_timed and name == "plain":
                    row["card"] = _microseconds_of_card(call)
        finally:
            recording.switch(False)
    return {"status": "ok", "host": rows}


def calls(job: Job) -> list[Callable[[], Any]]:
    """The parts of a call, as functions."""
    function, tensors, options = correctness.build(job)
    dtype = correctness.DTYPES[job["dtype"]]
    options = options | {"backend": "triton"}
    given = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    out = function(**leaves, **options).out
    d_out = torch.randn_like(out)
    return [
        lambda: function(**given, **options),
        lambda: function(**leaves, **options),
        lambda: torch.autograd.grad(
            out, list(leaves.values()), d_out, retain_graph=True, allow_unused=True
        ),
    ]


def _microseconds(call: Callable[[], Any]) -> float:
    """Wall time of a call in a loop of calls, the median of several rounds."""
    samples = []
    for _ in range(N_ROUNDS + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(N_CALLS):
            call()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) / N_CALLS * 1e6)
    # the first two rounds compile and record
    return round(quantile(tuple(samples[2:]), 0.5), 1)


def _microseconds_of_card(call: Callable[[], Any]) -> float | None:
    """Time of a call on the GPU alone; None if the call cannot be captured in a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(N_CALLS):
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    samples = []
    for _ in range(N_ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) / N_CALLS * 1e6)
    return round(quantile(tuple(samples), 0.5), 1)


def lines(results: Sequence[tuple[Job, Mapping[str, Any]]]) -> list[str]:
    """A line for each part of a call that was measured."""
    return [
        f"{operator}, {part}: "
        + ", ".join(f"{name} {x}" for name, x in zip(COLUMNS[2:], numbers, strict=True))
        for operator, part, *numbers in table(results)
    ]


COLUMNS = ("operator", "part", "plain", "recorded", "GPU alone", "recorded minus GPU")


def table(results: Sequence[tuple[Job, Mapping[str, Any]]]) -> list[list[str]]:
    """The cells of COLUMNS, microseconds, for each part of a call that was measured."""
    return [
        [job["operator"], row["part"], *map(_cell, _numbers(row))]
        for job, result in results
        for row in result.get("host", ())
        if row.get("plain") is not None
    ]


def _numbers(row: Mapping[str, Any]) -> list[float | None]:
    plain, recorded, card = (row.get(name) for name in ("plain", "recorded", "card"))
    over = None if recorded is None or card is None else round(recorded - card, 1)
    return [plain, recorded, card, over]


def _cell(number: float | None) -> str:
    return "not measured" if number is None else f"{number:g} us"
