"""Projections and rotary angles of the attention of a transformers layer, for specialists."""

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from memattn.adapters.structure import Structure, in_evaluation_mode, text_config
from memattn.checks import must
from memattn.nn.attention_specialist import AttentionWeights
from memattn.nn.base_attention import BASES, BaseAttention, base_attention
from memattn.nn.rotary import apply_rotary
from memattn.parts import PartConfig

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj")
PACKED = ("c_attn", "c_proj")  # of GPT-2, with transposed weights
LENGTH = 8  # tokens of the call that shows how attention is called


def half_angles(kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines ``[B, 1, T, D/2]`` among the keyword arguments of an attention, or None."""
    angles = kwargs.get("position_embeddings")
    if angles is None:
        return None
    cos, sin = (x[:, None, :, : x.shape[-1] // 2] for x in angles)
    return cos, sin


def _of_transformers(module: Any) -> BaseAttention | None:
    """Projections of an attention of transformers; None where their names are unknown.

    Under LoRA of PEFT they are those of the base: a linear layer of PEFT shows its weight.
    """
    if all(hasattr(module, name) for name in LINEAR):
        linears = [getattr(module, name) for name in LINEAR]
        matrices = [linear.weight for linear in linears]
        biases = [linear.bias for linear in linears]
    elif _is_packed(module):
        (qkv, qkv_bias), (out, out_bias) = (
            (getattr(module, name).weight, getattr(module, name).bias) for name in PACKED
        )
        matrices = [*qkv.t().chunk(3), out.t()]
        biases = [*qkv_bias.chunk(3), out_bias]
    else:
        return None
    return BaseAttention(
        AttentionWeights(*matrices, *biases),
        matrices[0].shape[0] // module.head_dim,
        matrices[1].shape[0] // module.head_dim,
        getattr(module, "q_norm", None),
        getattr(module, "k_norm", None),
        getattr(module, "scaling", None),
    )


BASES[nn.Module] = _of_transformers


def _is_packed(module: Any) -> bool:
    found = (getattr(module, name, None) for name in PACKED)
    return all(isinstance(getattr(x, "base_layer", x), Conv1D) for x in found)


def copies_base(part: PartConfig) -> bool:
    """Whether a part has weights that begin as a copy of attention's."""
    return part.resolved_place == "beside_attention" and type(part).begin is not PartConfig.begin


def check_bases(base: Any, structure: Structure, copied: Mapping[int, str]) -> None:
    """Raise ValueError unless copies of the attention of some layers would compute what it
    computes. Both are compared on random hidden states in float64.

    Args:
        base: The model.
        structure: Where its layers and their attentions are.
        copied: The part that copies the attention, by number of the layer.
    """
    attentions: dict[int, Any] = {}
    for layer, path in copied.items():
        module: Any = getattr(
            structure.layers[layer], structure.stations[layer]["beside_attention"]
        )
        found = base_attention(module)
        kind = type(module).__name__
        if found is None:
            names = f"{', '.join(LINEAR)}, or {' and '.join(PACKED)} as in GPT-2"
            must(path, f"stand beside an attention with {names}", kind)
        if not all(weight.is_floating_point() for weight in found.weights[:4]):
            must(path, "stand beside an attention whose weights are not quantised", kind)
        window = getattr(module, "sliding_window", _window(module))
        if window is not None and window < structure.sizes.max_positions:
            what = f"leave out layer {layer}, whose attention sees a window of {window} tokens only"
            must(f"{path}.layers", what, sorted(copied))
        if getattr(module, "attn_logit_softcapping", None) is not None:
            must(path, "stand beside an attention whose scores are not capped", kind)
        attentions[layer] = module
    called = _calls(base, attentions)
    for layer, module in attentions.items():
        if not _is_copied(module, called[layer], structure.sizes.hidden_size):
            does = "that does no more than projections, norms of heads, angles and a softmax"
            kind = f"{type(module).__name__} in layer {layer}"
            must(copied[layer], f"stand beside an attention {does}", kind)


def _window(module: Any) -> int | None:
    """The window of the model's configuration, for an attention module without one of its own."""
    return getattr(getattr(module, "config", None), "sliding_window", None)


def _calls(base: Any, attentions: Mapping[int, nn.Module]) -> dict[int, dict[str, Any]]:
    """Keyword arguments that the model gives to each attention, recorded in one short call."""
    called: dict[int, dict[str, Any]] = {}

    def watch(layer: int, module: nn.Module) -> Any:
        note = lambda _, args, kwargs: called.__setitem__(layer, kwargs)
        return module.register_forward_pre_hook(note, with_kwargs=True)

    device = base.get_input_embeddings().weight.device
    tokens = torch.arange(1, 1 + LENGTH, device=device)[None] % text_config(base).vocab_size
    with contextlib.ExitStack() as stack, in_evaluation_mode(base), torch.no_grad():
        for layer, module in attentions.items():
            stack.callback(watch(layer, module).remove)
        base(input_ids=tokens, use_cache=False, return_dict=True)
    return called


@torch.no_grad()
def _is_copied(module: Any, called: Mapping[str, Any], hidden_size: int) -> bool:
    """Whether an attention's output on random states follows from its projections alone."""
    twin = copy.deepcopy(module).double().eval()
    twin.config = copy.deepcopy(module.config)
    twin.config._attn_implementation = "eager"  # which does all that there is
    device = next(twin.parameters()).device
    drawn = torch.randn(1, LENGTH, hidden_size, generator=torch.Generator().manual_seed(0))
    x = drawn.to(device, torch.float64)
    others, angles = {}, half_angles(called)
    if angles is not None:
        others["position_embeddings"] = tuple(x.double() for x in called["position_embeddings"])
        angles = half_angles(others)
    if angles is not None and 2 * angles[0].shape[-1] != module.head_dim:
        return False
    scores, _ = _attend(twin, x, angles)
    x = x * scores.std().clamp(min=1e-12).rsqrt()  # so that what is done to scores shows
    _, expected = _attend(twin, x, angles)
    mask = x.new_full((1, 1, LENGTH, LENGTH), torch.finfo(x.dtype).min).triu(1)
    out = twin.forward(x, attention_mask=mask, past_key_values=None, **others)
    off = (out[0] - expected).abs().max() / expected.abs().max()
    # norms and softmax may compute in float32
    return bool(off < torch.finfo(torch.float32).eps ** 0.5)


def _attend(module: Any, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Scores ``[1, H, T, T]`` and output ``[1, T, E]``, with what PEFT adds to projections."""
    base = base_attention(module)
    assert base is not None
    if hasattr(module, LINEAR[0]):
        *projected, out = (getattr(module, name) for name in LINEAR)
        states = [linear(x) for linear in projected]
    else:
        states, out = module.c_attn(x).chunk(3, -1), module.c_proj
    query, key, value = (s.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for s in states)
    query = query if base.q_norm is None else base.q_norm(query)
    key = key if base.k_norm is None else base.k_norm(key)
    if angles is not None:
        query, key = apply_rotary(query, *angles), apply_rotary(key, *angles)
    groups = base.num_heads // base.num_kv_heads
    key, value = (s.repeat_interleave(groups, 1) for s in (key, value))
    scale = module.head_dim**-0.5 if base.scale is None else base.scale
    scores = scale * query @ key.mT
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=x.device).triu(1)
    found = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value
    return scores, out(found.transpose(1, 2).flatten(2))
