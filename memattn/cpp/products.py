"""Products of float32 matrices on the CPU, by whichever of PyTorch's libraries is faster for them.

PyTorch multiplies matrices with the BLAS that it was built with. For rows times a weight oneDNN,
which it has as well, took 4 to 30 % less time on an AMD processor with AVX-512, and 5 to 15 % more
on an Intel one (MKL 2024.2).
"""

import platform
from pathlib import Path

import torch
from torch import Tensor


def _is_intel() -> bool:
    """Whether Intel made the processor."""
    told = Path("/proc/cpuinfo")  # where there is one, platform knows less
    text = told.read_text() if told.exists() else platform.processor()
    return "GenuineIntel" in text


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)
_PREFERS_ONEDNN = _HAS_ONEDNN and not (torch.backends.mkl.is_available() and _is_intel())


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows [N, K] @ weight.T`` for ``weight [M, K]`` with any strides."""
    if _uses_onednn():
        return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    return rows @ weight.t()


def product_add(rows: Tensor, weight: Tensor, added: Tensor) -> Tensor:
    """``added [N, M] + rows [N, K] @ weight.T``, the sum without another pass."""
    if _uses_onednn():
        linear = torch.ops.mkldnn._linear_pointwise.binary
        return linear(rows, added, weight, None, "add")
    return torch.addmm(added, rows, weight.t())


def weight_gradient(d_out: Tensor, rows: Tensor) -> Tensor:
    """``d_out [N, M].T @ rows [N, K]``, contiguous."""
    if d_out.shape[1] < rows.shape[1]:  # the longer side first, which BLAS splits better
        return (rows.t() @ d_out).t().contiguous()
    return d_out.t() @ rows


def _uses_onednn() -> bool:
    return _PREFERS_ONEDNN and bool(torch.backends.mkldnn.enabled)
