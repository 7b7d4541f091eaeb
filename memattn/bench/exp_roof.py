"""A kernel that computes exponentials only: it measures the rate of exponentials on CUDA."""

import torch
import triton
import triton.language as tl

_BLOCK, _STEPS = tl.constexpr(1024), tl.constexpr(512)


@triton.jit
def _exp_kernel(out_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: any. Each program takes BLOCK values through STEPS exponentials."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = (offs % 7).to(tl.float32)
    for _ in range(STEPS):
        x = tl.exp2(-x)
    tl.store(out_ptr + offs, x)


def _programs(device: str) -> int:
    if torch.device(device).type != "cuda":
        return 1  # the interpreter
    return 16 * torch.cuda.get_device_properties(device).multi_processor_count


def count_exps(device: str) -> int:
    """Exponentials in one call of ``run_exps``."""
    return _programs(device) * _BLOCK.value * _STEPS.value


def run_exps(device: str) -> torch.Tensor:
    """Run the kernel; returns its last values, one for each lane."""
    out = torch.empty(_programs(device) * _BLOCK.value, device=device)
    _exp_kernel[(_programs(device),)](out, STEPS=_STEPS, BLOCK=_BLOCK)
    return out
