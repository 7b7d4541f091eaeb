"""A minimal attention forward kernel without mask: the rate that Triton reaches at best.

The kernels of ``memattn_kernels`` cannot be much faster. There is a published rate for this kernel,
so comparing the predicted with the measured rate shows whether the performance model is right.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _bare_fwd_kernel(q_desc, k_desc, v_desc, out_desc, T, scale, D: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Grid: (T // BLOCK_M, B * H). Rows of all heads lie below each other; T is whole tiles."""
    first = tl.program_id(1) * T
    row = first + tl.program_id(0) * BLOCK_M
    q = q_desc.load([row, 0])
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.full([BLOCK_M], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    factor = scale * 1.4426950408889634  # log2(e): powers of two are cheaper
    for n in tl.range(0, T, BLOCK_N):
        k = k_desc.load([first + n, 0])
        scores = tl.dot(q, k.T)
        m_new = tl.maximum(m_i, tl.max(scores, 1) * factor)
        p = tl.exp2(scores * factor - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = v_desc.load([first + n, 0])
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        m_i = m_new
    out_desc.store([row, 0], (acc / l_i[:, None]).to(q.dtype))


def bare_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(Q K^T / sqrt(D)) V`` for contiguous ``[B, H, T, D]`` with T in whole tiles."""
    B, H, T, D = query.shape
    block_m, block_n, warps = (128, 128, 8) if D == 128 else (128, 64, 4)
    if block_m > T:  # the interpreter's sizes
        block_m = block_n = T
    out = torch.empty_like(query)

    def rows(tensor: Tensor, block: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(tensor.view(B * H * T, D), [block, D])

    launch_options: dict[str, Any] = {
        "D": D,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": warps,
        "num_stages": 3 if D == 64 else 2,
    }
    _bare_fwd_kernel[(T // block_m, B * H)](
        rows(query, block_m),
        rows(key, block_n),
        rows(value, block_n),
        rows(out, block_m),
        T,
        D**-0.5,
        **launch_options,
    )
    return out
