"""segmented_attention under pytest-benchmark: every competitor is checked, then timed."""

from functools import cache

import pytest
import torch

from memattn.bench.engine import OURS
from memattn.bench.gate import Oracle, check_peer, check_subject
from memattn.bench.memory import call_of
from memattn.bench.peers import sdpa_backends
from memattn.bench.report import machine
from memattn.bench.segmented_attention import SegmentedCase

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SIZES = SegmentedCase.cuda_sizes if DEVICE == "cuda" else {}
T = 8192 if DEVICE == "cuda" else 1024


@cache
def oracle_of(case: SegmentedCase) -> Oracle:
    return Oracle(case, gradients=True)


@pytest.mark.benchmark(max_time=0.5, min_rounds=3, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("competitor", [OURS, *(f"sdpa {name}" for name in sdpa_backends(DEVICE))])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["causal", "window", "segment", "mac"])
def test_segmented_attention(benchmark, kind, direction, competitor):
    case = SegmentedCase(kind=kind, T=T, device=DEVICE, dtype=DTYPE, **SIZES)
    gradients = direction == "backward"
    if competitor == OURS:
        forward = case.subject("auto")
        check_subject(case, "auto", gradients=gradients)
    else:
        forward = case.peers()[competitor].build()
        try:
            check_peer(oracle_of(case), forward, gradients=gradients)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            pytest.skip(f"{competitor} cannot run this case: {error}")
    benchmark.group = f"{kind}, {direction}"
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
