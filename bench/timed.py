"""Check one competitor on one case, then time it with pytest-benchmark."""

from functools import cache

import pytest
import torch

from memattn.bench.case import Case
from memattn.bench.engine import OURS
from memattn.bench.memory import call_of
from memattn.bench.peers import sdpa_backends
from memattn.bench.report import machine
from memattn.bench.result_check import ExpectedResults, check_peer, check_subject

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SDPA = tuple(f"sdpa {name}" for name in sdpa_backends(DEVICE))
CANNOT_RUN = ("No available kernel", "FlexAttention does not support backward on CPU")

# time that pytest-benchmark spends on each test
quick = pytest.mark.benchmark(max_time=0.5, min_rounds=3, warmup=True, warmup_iterations=1)


def make_case(cls: type[Case], kind: str) -> Case:
    """A case of this device's default sizes."""
    sizes = cls.cuda_sizes if DEVICE == "cuda" else {}
    T = 8192 if DEVICE == "cuda" else 1024
    return cls(kind=kind, T=T, device=DEVICE, dtype=DTYPE, **sizes)


@cache
def _expected_of(case: Case) -> ExpectedResults:
    return ExpectedResults(case, gradients=case.rows_are_independent())


def time_competitor(benchmark, case: Case, competitor: str, direction: str) -> None:
    """Check a competitor's results and time it; skip one that cannot run the case."""
    gradients = direction == "backward"
    if competitor == OURS:
        forward = case.subject("auto")
        check_subject(case, "auto", gradients=gradients)
    else:
        peer = case.peers()[competitor]
        forward = peer.build()
        try:
            if peer.yardstick is None:
                check_peer(_expected_of(case), forward, gradients=gradients)
            else:
                call_of(case, forward, "forward+backward")()
        except RuntimeError as error:
            if not any(text in str(error) for text in CANNOT_RUN):
                raise
            pytest.skip(f"{competitor} cannot run this case: {error}")
    benchmark.group = f"{case.kind}, {direction}"
    benchmark.extra_info |= machine(case.seed) | {
        "device": DEVICE,
        "dtype": str(DTYPE),
        "label": case.label(),
        "useful_flops": case.work()[direction].flops,
    }
    call = call_of(case, forward, direction)

    def timed() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(timed)
