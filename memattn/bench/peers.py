"""PyTorch's attention functions, which our operators are compared with.

Each takes query, key, value and a mask in PyTorch's form. A backend that cannot run a case raises
when it is first called, and the engine reports the reason.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[..., Tensor]

_SDPA_ON_CPU = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
_SDPA_ON_CUDA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def sdpa_backends(device: str) -> dict[str, SDPBackend]:
    """The backends of PyTorch's scaled_dot_product_attention on this device, by short name."""
    return _SDPA_ON_CUDA if torch.device(device).type == "cuda" else _SDPA_ON_CPU


def sdpa(backend: SDPBackend, *, mask: Tensor | None = None, is_causal: bool = False) -> Attention:
    """PyTorch's scaled_dot_product_attention with one backend.

    Args:
        backend: The only backend allowed; the call raises where it cannot run.
        mask: Boolean ``[T, S]``, True where attention is allowed.
        is_causal: Use the backend's own causal mask instead of ``mask``.
    """

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped
            )

    return attention


def flex(
    mask_mod: MaskMod | None,
    T: int,
    S: int,
    device: str,
    batch: int | None = None,
    score_mod: ScoreMod | None = None,
) -> Callable[..., Tensor]:
    """Compiled FlexAttention under a block mask made from ``mask_mod(b, h, q_idx, kv_idx)``.

    ``batch`` is None if the mask is the same for every sequence. Tensors after query, key and value
    are passed on to ``score_mod(score, b, h, q_idx, kv_idx, *tensors)``.
    """
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # without a reset the third shape would get a slower kernel with dynamic shapes
    torch.compiler.reset()
    block_mask = None
    if mask_mod is not None:
        # compiled on CUDA, where masks are long: uncompiled, it stores T x S integers
        create = torch.compile(create_block_mask) if "cuda" in device else create_block_mask
        block_mask = create(mask_mod, batch, None, T, S, device=device)

    change: Any = score_mod

    def attend(query: Tensor, key: Tensor, value: Tensor, *tensors: Tensor) -> Tensor:
        return flex_attention(
            query,
            key,
            value,
            score_mod=change and (lambda *scores: change(*scores, *tensors)),
            block_mask=block_mask,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    compiled = torch.compile(attend, dynamic=False)

    def attention(*tensors: Tensor) -> Tensor:
        # the backward runs many times on one graph, so its buffers must not be donated
        with config.patch(donated_buffer=False):
            return compiled(*tensors)

    return attention
