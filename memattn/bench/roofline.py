"""Roofline model: useful work of an operator, and the machine's peak rates (roofs).

    T_min = max(flops / matmul rate, exps / exp rate, bytes / copy rate)

Only allowed (query, key) pairs count as work; masked pairs that a kernel computes do not. The
roofs are measured in the same run with PyTorch, not taken from data sheets; see ``roof_samples``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from memattn.bench.timing import interleave
from memattn.ops._dispatch import multiplies_bfloat16


@dataclass(frozen=True)
class Work:
    """Least floating-point operations, exponentials and bytes of a computation."""

    flops: int
    exps: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.exps + other.exps, self.bytes + other.bytes)


@dataclass(frozen=True)
class Roofs:
    """Measured rates of the machine, per second."""

    matmul_flops: float
    exps: float
    copy_bytes: float  # read and written

    def seconds(self, work: Work) -> float:
        """The shortest time for ``work`` if products, exponentials and copies overlap fully."""
        return max(
            work.flops / self.matmul_flops, work.exps / self.exps, work.bytes / self.copy_bytes
        )

    def limiting_rate(self, work: Work) -> str:
        """The name of the rate that ``seconds`` comes from."""
        shares = {
            "matmul_flops": work.flops / self.matmul_flops,
            "exps": work.exps / self.exps,
            "copy_bytes": work.bytes / self.copy_bytes,
        }
        return max(shares, key=shares.__getitem__)

    def seconds_without_overlap(self, work: Work) -> float:
        """The same if exponentials and products do not overlap."""
        compute = work.flops / self.matmul_flops + work.exps / self.exps
        return max(compute, work.bytes / self.copy_bytes)


def work_of(work: dict[str, Work], direction: str) -> Work:
    """The work of ``"forward"``, ``"backward"`` or ``"forward+backward"``."""
    first, *rest = (work[part] for part in direction.split("+"))
    return sum(rest, first)


def attention_work(
    *,
    pairs: int,
    rows: int,
    keys: int,
    head_dim: int,
    value_dim: int,
    element_size: int,
) -> dict[str, Work]:
    """Useful work of softmax attention, by ``"forward"`` and ``"backward"``.

    Args:
        pairs: Allowed (query, key) pairs, summed over batch and query heads.
        rows: Queries, summed over batch and query heads.
        keys: Keys of all sources, summed over batch (where they differ) and key heads.
        head_dim: D.
        value_dim: Dv.
        element_size: Bytes of one element of the inputs.

    Returns:
        Forward: 2 products a pair; reads q, k, v, writes out and lse. Backward: 5 products a
        pair, as in a single pass; reads q, k, v, out, d_out, lse and delta, writes d_q, d_k, d_v.
    """
    D, Dv, e = head_dim, value_dim, element_size
    return {
        "forward": Work(
            flops=2 * pairs * (D + Dv),
            exps=pairs,
            bytes=e * (rows + keys) * (D + Dv) + 4 * rows,
        ),
        "backward": Work(
            flops=2 * pairs * (3 * D + 2 * Dv),
            exps=pairs,
            bytes=2 * e * (rows + keys) * (D + Dv) + 8 * rows,
        ),
    }


def measure_roofs(device: str, dtype: torch.dtype, *, seconds: float = 1.0) -> Roofs:
    """Measure the roofs that hold for inputs of ``dtype`` on ``device``.

    - Product: PyTorch's product of square matrices. In ``dtype`` on CUDA, and on the CPU for
      bfloat16 if the processor has bfloat16 products (the faster of two sizes); else in float32, in
      which our kernels compute the other dtypes.
    - Copy: a buffer far larger than the caches.
    - Exponential: ``torch.exp`` of a block that stays in the cache; on CUDA a kernel that computes
      exponentials only.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: Dtype of the inputs.
        seconds: Approximate time for each roof.
    """
    on_cuda = torch.device(device).type == "cuda"
    generator = torch.Generator(device).manual_seed(0)
    has_products = on_cuda or (dtype == torch.bfloat16 and multiplies_bfloat16())
    matmul_dtype = dtype if has_products else torch.float32
    sizes = (8192,) if on_cuda else (1024, 2048) if has_products else (1024,)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    def product(n: int) -> float:
        a, b = draw(n, n).to(matmul_dtype), draw(n, n).to(matmul_dtype)
        return 2 * n**3 / _seconds(lambda: a @ b, device, seconds / len(sizes))

    def copy(n: int) -> float:
        source = draw(n)
        target = torch.empty_like(source)
        return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device, seconds)

    return Roofs(
        matmul_flops=max(product(n) for n in sizes),
        exps=_exp_rate(device, draw(1 << 20), seconds),
        copy_bytes=copy((1 << 28) if on_cuda else (1 << 25)),
    )


def _exp_rate(device: str, block: Tensor, seconds: float) -> float:
    """Exponentials per second."""
    if torch.device(device).type == "cuda":
        from memattn.bench.exp_roof import count_exps, run_exps

        return count_exps(device) / _seconds(lambda: run_exps(device), device, seconds)
    out = torch.empty_like(block)
    return block.numel() / _seconds(lambda: torch.exp(block, out=out), device, seconds)


def _seconds(function: Callable[[], object], device: str, seconds: float) -> float:
    """Seconds of a call, the 20 % quantile: a disturbed roof would raise all shares of it."""
    return interleave({"": function}, device=device, seconds=seconds)[""].q20
