"""Training on the CPU: sublayers as few operators, which save little for the backward.

These functions compute the same as the modules of a layer, with the same weights. They apply if the
modules are plain: float32 weights in layers of the package and of torch, without hooks, adapters or
quantisation. Otherwise they return None, and the modules run.
"""

from typing import Any

import torch
from torch import Tensor, nn

from memattn.models.cache_layer import MemAttnCacheLayer
from memattn.models.plain_step import ATTENTION_WEIGHTS, MLP_WEIGHTS, plain_weights
from memattn.nn import SegmentedAttention
from memattn.nn.mlp import SwiGLU
from memattn.ops._dispatch import has_cpp_kernel, untaken_transform
from memattn.parts import PartConfig, PartContext
from memattn.parts.base import is_bare
from memattn.parts.causal import STEP_BACKENDS

AVAILABLE = has_cpp_kernel("norm_rows")


def attention_sublayer(
    hidden_states: Tensor,
    norm: Any,
    attention: Any,
    part: PartConfig,
    context: PartContext,
    cache: MemAttnCacheLayer | None,
) -> Tensor | None:
    """Hidden states ``[B, T, E]`` after attention and its residual, or None."""
    if not may_fuse(hidden_states, context) or cache is not None or context.library is not None:
        return None
    if type(attention) is not SegmentedAttention or part.step_sources(attention) is None:
        return None
    weights = plain_weights(norm, attention, ATTENTION_WEIGHTS)
    if weights is None:
        return None
    from memattn.cpp.training_layers import attention_inputs, attention_output

    cos, sin = context.rotary or (None, None)
    query, key, value, _ = attention_inputs(
        hidden_states, *weights[:-1], cos, sin, norm.eps, attention.head_dim
    )
    bounds = context.bounds
    out = attention.attend(
        query,
        key,
        value,
        cu_seqlens=context.cu_seqlens,
        seq_start=bounds.seq_start,
        seq_end=bounds.seq_end,
    )
    return attention_output(out, weights[-1], hidden_states)


def mlp_sublayer(
    hidden_states: Tensor, norm: Any, mlp: Any, attention: Any, context: PartContext
) -> Tensor | None:
    """Hidden states ``[B, T, E]`` after the MLP and its residual, or None.

    ``attention`` is the layer's attention. If its backend supports second derivatives, the MLP's
    modules run, which support them too.
    """
    if not may_fuse(hidden_states, context) or type(mlp) is not SwiGLU:
        return None
    if getattr(attention, "backend", "auto") not in STEP_BACKENDS:
        return None
    weights = plain_weights(norm, mlp, MLP_WEIGHTS)
    if weights is None:
        return None
    from memattn.cpp.training_layers import swiglu_layer

    return swiglu_layer(hidden_states, *weights, norm.eps)[0]


def may_fuse(hidden_states: Tensor, context: PartContext) -> bool:
    """Whether hidden states are plain float32 on the CPU, and nothing needs single operations."""
    if torch.compiler.is_compiling():
        return False
    if not hidden_states.is_cpu or hidden_states.dtype != torch.float32:
        return False
    if not hidden_states.is_contiguous() or not hidden_states.numel():
        return False
    return context.once("may fuse", _nothing_watches)


def output_weight(head: nn.Module) -> Tensor | None:
    """The weight of an output layer that is a plain product, on any device, or None."""
    if type(head) is not nn.Linear or head.bias is not None or not is_bare(head):
        return None
    return head.weight if type(head.weight) in (Tensor, nn.Parameter) else None


def _nothing_watches() -> bool:
    """Whether there is no autocast, no dispatch mode and no hook of all modules."""
    return (
        AVAILABLE
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and untaken_transform() is None
        and not nn.modules.module._has_any_global_hook()
    )
