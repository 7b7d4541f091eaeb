"""Decoding on the CPU: what a layer does to one more token, as few calls of an operator.

Everything here computes what the modules of a layer compute, with the same weights and the same
state. It is taken where these modules are plain: float32 weights in layers of the package and of
torch, without hooks, adapters or quantisation, and without gradients. Else None is returned, and
the modules run.
"""

from typing import Any

import torch
from torch import Tensor, nn

from memattn.models.cache_layer import MemAttnCacheLayer
from memattn.nn.mlp import SwiGLU
from memattn.ops._dispatch import has_cpp_kernel
from memattn.parts import PartConfig, PartContext
from memattn.parts.base import is_bare

MAX_ROWS = 8  # sequences; with more of them, products of whole matrices win
AVAILABLE = has_cpp_kernel("attention_step")


def attention_step(
    hidden_states: Tensor,
    norm: Any,
    attention: Any,
    part: PartConfig,
    context: PartContext,
    cache: MemAttnCacheLayer | None,
) -> Tensor | None:
    """Hidden states ``[B, 1, E]`` behind attention and its residual, or None."""
    if not _is_step(hidden_states, context) or cache is None:
        return None
    sources = part.step_sources(attention)
    state = cache.parts["attention"]
    if sources is None or "key" not in state.tokens or context.library is not None:
        return None
    weights = _weights(norm, attention, ("q_proj", "k_proj", "v_proj", "o_proj"))
    given = (
        sources.persistent_key,
        sources.persistent_value,
        sources.table_key,
        sources.table_value,
    )
    if weights is None or not all(t is None or _is_plain(t) for t in given):
        return None
    if state.tokens["key"].dtype != torch.float32 or state.restart is not None:
        return None
    cos = sin = None
    if context.rotary is not None and context.rotary_embedding is not None:
        rotary = context.rotary_embedding
        needed = context.offset + 2 + sources.future_dim
        cos, sin = context.once("table", lambda: rotary.table(needed))
    bounds = state.bounds
    return torch.ops.memattn_cpp.attention_step(
        hidden_states,
        *weights,
        state.extend("key", 1),
        state.extend("value", 1),
        *given,
        cos,
        sin,
        context.positions,
        bounds.seq_start,
        bounds.seq_end,
        sources.segment_len,
        sources.window_size,
        sources.future_dim,
        norm.eps,
    )


def mlp_step(hidden_states: Tensor, norm: Any, mlp: Any, context: PartContext) -> Tensor | None:
    """Hidden states ``[B, 1, E]`` behind the MLP and its residual, or None."""
    if not _is_step(hidden_states, context) or type(mlp) is not SwiGLU:
        return None
    weights = _weights(norm, mlp, ("gate_proj", "up_proj", "down_proj"))
    if weights is None:
        return None
    return torch.ops.memattn_cpp.swiglu_step(hidden_states, *weights, norm.eps)


def norm_step(layer: Any, hidden_states: Tensor) -> Tensor | None:
    """An RMS norm of ``[B, 1, E]``, or None."""
    if not _is_small(hidden_states) or type(layer) is not nn.RMSNorm or not _may_step():
        return None
    weight = None if layer.eps is None else _plain_weight(layer)
    if weight is None or not hidden_states.is_contiguous():
        return None
    return torch.ops.memattn_cpp.norm_step(hidden_states, weight, layer.eps)


def linear_step(layer: nn.Module, hidden_states: Tensor) -> Tensor | None:
    """A linear layer of ``[B, 1, E]``, or None."""
    if not _is_small(hidden_states) or type(layer) is not nn.Linear or not _may_step():
        return None
    weight = _plain_weight(layer)
    if weight is None:
        return None
    return torch.ops.memattn_cpp.linear_step(hidden_states.contiguous(), weight)


def _is_small(hidden_states: Tensor) -> bool:
    # first, since a program that is compiled or exported must not depend on the number of rows
    return (
        not torch.compiler.is_compiling()
        and hidden_states.shape[1] == 1
        and 1 <= hidden_states.shape[0] <= MAX_ROWS
        and hidden_states.dtype == torch.float32
        and hidden_states.is_cpu
    )


def _may_step() -> bool:
    """Whether nothing watches single operations: gradients, autocast, compilation, hooks."""
    return (
        AVAILABLE
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and not nn.modules.module._has_any_global_hook()
    )


def _is_step(hidden_states: Tensor, context: PartContext) -> bool:
    if not _is_small(hidden_states) or context.measure_losses or context.cu_seqlens is not None:
        return False
    return hidden_states.is_contiguous() and context.once("may step", _may_step)


def _weights(norm: nn.Module, module: nn.Module, names: tuple[str, ...]) -> list[Tensor] | None:
    """The weights of an RMS norm and of linear layers, or None where one is not plain."""
    if type(norm) is not nn.RMSNorm or norm.eps is None or not is_bare(module):
        return None
    found = []
    for kind, layer in ((nn.RMSNorm, norm), *((nn.Linear, module._modules[n]) for n in names)):
        weight = _plain_weight(layer) if type(layer) is kind else None
        if weight is None:
            return None
        found.append(weight)
    return found


def _plain_weight(layer: nn.Module) -> Tensor | None:
    """The weight of a layer of torch without hooks or a bias, where it is float32 on the CPU."""
    parameters = layer._parameters
    weight: Any = parameters.get("weight")
    if parameters.get("bias") is not None:
        return None
    return weight if _is_plain(weight) and is_bare(layer) else None


def _is_plain(tensor: Any) -> bool:
    """Whether it is a contiguous float32 tensor on the CPU, and of no class of its own."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return False
    return tensor.dtype == torch.float32 and tensor.is_cpu and tensor.is_contiguous()
