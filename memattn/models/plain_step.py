"""Inference on the CPU: the sublayers of a decoder layer, each in one or two calls.

These functions compute the same as the modules of a layer, with the same weights and state. They
apply if the modules are plain: float32 weights in layers of the package and of torch, without
hooks, adapters, quantisation or gradients. Otherwise they return None, and the modules run.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from memattn.models.cache_layer import MemAttnCacheLayer
from memattn.nn.mlp import SwiGLU
from memattn.ops._dispatch import has_cpp_kernel, untaken_transform
from memattn.parts import PartConfig, PartContext
from memattn.parts.base import StepSources, is_bare
from memattn.parts.state import PartState

MAX_ROWS = 8  # sequences; for more, products of whole matrices are faster
AVAILABLE = has_cpp_kernel("project_rows")
ATTENTION_WEIGHTS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_WEIGHTS = ("gate_proj", "up_proj", "down_proj")


def attention_step(
    hidden_states: Tensor,
    norm: Any,
    attention: Any,
    part: PartConfig,
    context: PartContext,
    cache: MemAttnCacheLayer | None,
) -> Tensor | None:
    """Hidden states of ``[B, T, E]`` after attention and its residual, or None.

    If ``context.newest`` is set, only those of the newest tokens.
    """
    found = None
    if may_step(hidden_states, context):
        found = attention_operands(norm, attention, part, context)
    if found is None:
        return None
    weights, sources, given = found
    B, T, _ = hidden_states.shape
    steps = T == 1 and B <= MAX_ROWS and cache is not None
    if not (steps or context.newest_only):
        return None  # logits of all tokens must equal those of the modules bit for bit
    state = None if cache is None else cache.parts["attention"]
    empty = hidden_states.new_empty(B, attention.num_kv_heads, 0, attention.head_dim)
    if state is not None and not fits(state, empty):
        return None
    cos = sin = None
    if context.rotary_embedding is not None:
        cos, sin = context.rotary_embedding.table(context.offset + T + 1 + sources.future_dim)
    if state is None:
        key, value = (empty.new_empty(B, empty.shape[1], T, empty.shape[3]) for _ in range(2))
    else:
        key, value = (state.extend(name, T, empty) for name in ("key", "value"))
        context = replace(context, bounds=state.bounds)
    if steps:
        return torch.ops.memattn_cpp.attention_step(
            hidden_states,
            *weights,
            key,
            value,
            *given,
            cos,
            sin,
            context.positions,
            context.bounds.seq_start,
            context.bounds.seq_end,
            sources.segment_len,
            sources.window_size,
            sources.future_dim,
            norm.eps,
        )
    new = (x[:, :, x.shape[2] - T :] for x in (key, value))
    newest = T if context.newest is None else min(context.newest, T)
    query = torch.ops.memattn_cpp.project_rows(
        hidden_states, *weights[:-1], *new, cos, sin, context.positions, newest, norm.eps
    )
    attended = part.attend_rows(attention, query, key, value, context)
    if state is not None:
        for name in ("key", "value"):
            state.compact(name)
    return torch.ops.memattn_cpp.output_rows(hidden_states, attended, weights[-1])


def attention_operands(
    norm: Any, attention: Any, part: PartConfig, context: PartContext
) -> tuple[list[Tensor], StepSources, tuple[Tensor | None, ...]] | None:
    """Weights of the norm and the attention; what queries see beside tokens; tensors of that."""
    sources = part.step_sources(attention)
    if sources is None or context.library is not None:
        return None
    if context.rotary_embedding is not None and not is_bare(context.rotary_embedding):
        return None
    if context.measure_losses and part.losses:
        return None
    weights = plain_weights(norm, attention, ATTENTION_WEIGHTS)
    if weights is None:
        return None
    given = (
        sources.persistent_key,
        sources.persistent_value,
        sources.table_key,
        sources.table_value,
    )
    for tensor in given:
        if tensor is not None and not _is_plain(tensor):
            return None
    return weights, sources, given


def mlp_step(hidden_states: Tensor, norm: Any, mlp: Any, context: PartContext) -> Tensor | None:
    """Hidden states of ``[B, T, E]`` after the MLP and its residual, or None.

    If ``context.newest`` is set, only those of the newest tokens.
    """
    weights = mlp_operands(norm, mlp) if may_step(hidden_states, context) else None
    if weights is None:
        return None
    B, T, _ = hidden_states.shape
    if T == 1 and B <= MAX_ROWS:
        return torch.ops.memattn_cpp.swiglu_step(hidden_states, *weights, norm.eps)
    if not context.newest_only:
        return None  # as attention_step
    newest = T if context.newest is None else min(context.newest, T)
    return torch.ops.memattn_cpp.swiglu_rows(hidden_states, *weights, newest, norm.eps)


def mlp_operands(norm: Any, mlp: Any) -> list[Tensor] | None:
    """The norm and the weights of an MLP, where they are plain."""
    return plain_weights(norm, mlp, MLP_WEIGHTS) if type(mlp) is SwiGLU else None


def norm_step(layer: Any, hidden_states: Tensor) -> Tensor | None:
    """An RMS norm of ``[B, 1, E]``, or None."""
    if not _is_small(hidden_states) or type(layer) is not nn.RMSNorm or not nothing_watches():
        return None
    weight = None if layer.eps is None else _plain_weight(layer)
    if weight is None or not hidden_states.is_contiguous():
        return None
    return torch.ops.memattn_cpp.norm_step(hidden_states, weight, layer.eps)


def linear_step(layer: nn.Module, hidden_states: Tensor) -> Tensor | None:
    """A linear layer of ``[B, 1, E]``, or None."""
    if not _is_small(hidden_states) or type(layer) is not nn.Linear or not nothing_watches():
        return None
    weight = _plain_weight(layer)
    if weight is None:
        return None
    return torch.ops.memattn_cpp.linear_step(hidden_states.contiguous(), weight)


def _is_small(hidden_states: Tensor) -> bool:
    # before the rows: a compiled or exported program must not depend on their number
    return (
        not torch.compiler.is_compiling()
        and hidden_states.shape[1] == 1
        and 1 <= hidden_states.shape[0] <= MAX_ROWS
        and hidden_states.dtype == torch.float32
        and hidden_states.is_cpu
    )


def nothing_watches() -> bool:
    """Whether nothing needs single operations: gradients, autocast, compilation, hooks."""
    return (
        AVAILABLE
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and untaken_transform() is None
        and not nn.modules.module._has_any_global_hook()
    )


def may_step(hidden_states: Tensor, context: PartContext) -> bool:
    """Whether hidden states ``[B, T, E]`` are those of inference in float32 on the CPU."""
    return (
        not torch.compiler.is_compiling()
        # checkpointing computes a layer again with gradients, in the same context
        and not torch.is_grad_enabled()
        and hidden_states.dtype == torch.float32
        and hidden_states.is_cpu
        and hidden_states.is_contiguous()
        and hidden_states.numel() > 0
        and context.once("may step", nothing_watches)
    )


def fits(state: PartState, empty: Tensor) -> bool:
    """Whether keys and values can be written after those in the state."""
    if state.restart is not None:
        return False
    B, Hkv, _, D = empty.shape
    for name in ("key", "value"):
        kept = state.tokens.get(name, empty)
        if kept.dtype != empty.dtype or not kept.is_cpu:
            return False
        b, heads, _, size = kept.shape
        if (b, heads, size) != (B, Hkv, D):
            return False
    return True


def plain_weights(
    norm: nn.Module, module: nn.Module, names: tuple[str, ...]
) -> list[Tensor] | None:
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
    """Whether it is a contiguous float32 tensor on the CPU, and not of a subclass."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return False
    return tensor.dtype == torch.float32 and tensor.is_cpu and tensor.is_contiguous()
