"""A worker process that times one build of the operators.

It is started by path with the measured checkout first on the module path. It imports only the
operators from ``memattn``, since older builds may lack everything else.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

SAMPLES = 15
# name: operator, kind, sizes
CASES: dict[str, dict[str, Any]] = {
    **{
        f"{kind} D={D}": {"operator": "segmented_attention", "kind": kind, "D": D, "B": 4, "H": 32}
        for D in (64, 128)
        for kind in ("causal", "dense", "window 512")
    },
    **{
        f"future F=64 D={D}": {"operator": "future_attention", "D": D, "B": 4, "H": 32}
        for D in (64, 128)
    },
    **{
        f"{kind} D={D}": {
            "operator": "task_masked_attention",
            "kind": kind,
            "D": D,
            "B": 8,
            "H": 16,
        }
        for D in (64, 128)
        for kind in ("blocks 25 %", "random pairs 50 %")
    },
}


def call_of(case: dict[str, Any], direction: str, *, T: int, device: str) -> Callable[[], object]:
    """A function without arguments that runs one direction on random inputs."""
    from memattn import ops

    B, H, D = case["B"], case["H"], case["D"]
    if device == "cpu":
        B, H, D = 1, 1, 16
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, device=device)
        return values.to(dtype).requires_grad_(direction == "backward")

    q, k, v = (draw(B, H, T, D) for _ in range(3))
    leaves, options = [q, k, v], {"backend": "triton"}
    operator = getattr(ops, case["operator"])
    if case["operator"] == "future_attention":
        leaves += [draw(H, T - 1, D), draw(H, T - 1, D)]
        options |= {"future_dim": min(64, T - 1)}
    elif case["operator"] == "segmented_attention":
        options |= {"is_causal": case["kind"] != "dense"}
        options |= {"window_size": 512} if case["kind"].startswith("window") else {}
    else:
        cpu = torch.Generator().manual_seed(0)
        if case["kind"].startswith("blocks"):
            G = -(-T // 128)
            edges = torch.rand(1, G, G, generator=cpu) < 0.25
            node = torch.arange(T) // 128
            mask = ops.TaskMask.from_graph(edges, node, node)
        else:
            mask = ops.TaskMask.from_dense(torch.rand(1, T, T, generator=cpu) < 0.5)
        options |= {"task_mask": mask.to(device), "task_id": 0}
    out = operator(*leaves, **options).out
    if direction == "forward":
        return lambda: operator(*leaves, **options)
    d_out = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Median milliseconds of a case; a dry or compile-only job runs once without timing."""
    dry = job["dry"]
    call = call_of(
        CASES[job["case"]],
        job["direction"],
        T=24 if dry else 8192,
        device="cpu" if dry else "cuda",
    )
    call()
    if dry or job["compile_only"]:
        return {"status": "ok"}
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    samples = []
    for _ in range(SAMPLES + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    samples = sorted(samples[2:])
    del call, flush
    torch.cuda.empty_cache()
    return {"status": "ok", "samples": samples, "milliseconds": samples[SAMPLES // 2]}


def main() -> None:
    """Answer jobs until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        start = time.monotonic()
        result: dict[str, Any]
        try:
            result = measure(json.loads(line))
        except Exception as error:  # a build may fail in any way; the result gives the reason
            result = {"status": "error", "reason": f"{type(error).__name__}: {error}"[:300]}
        result["took"] = round(time.monotonic() - start, 2)
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
