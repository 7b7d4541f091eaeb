"""Parameters and operations of a pretrained model with something attached to it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from memattn.adapters.attach import base_of
from memattn.adapters.base_attention import copies_base
from memattn.adapters.call import AdapterLayer
from memattn.adapters.structure import find_layers, model_sizes
from memattn.checks import check_int, must
from memattn.evaluate.estimate import Estimate, EstimateLine
from memattn.nn.base_attention import base_attention
from memattn.parts import make_part
from memattn.parts.together import build_shared_parts, check_together, name_parts, parts_of_layer


def estimate_attached(
    model: Any, length: int, memory_adapter: Mapping[str, Any] | None = None
) -> Estimate:
    """Parameters of a Hugging Face model with a memory or LoRA, and operations of a forward pass.

    Counted as ``memattn.evaluate.estimate`` does; attention of the model itself as causal over the
    whole sequence, even where some of its layers have a window.

    Args:
        model: The model, with LoRA or without; its tensors may be on the ``meta`` device.
        length: Tokens of the sequence, at least 1.
        memory_adapter: Kind and fields of a part that is to be attached; None means none.

    Returns:
        A line for the base model, for its attention between tokens, for LoRA, and for each part.

    Raises:
        ValueError: If ``length`` is below 1, or the part does not fit the model.
    """
    check_int("length", length, 1)
    base = base_of(model)
    sizes = model_sizes(base)
    own: dict[str, list[int]] = {"base model": [], "lora": []}
    for name, parameter in base.named_parameters():
        own[_owner(name)].append(parameter.numel())
    products = {"base model": 0, "lora": 0}
    for name, module in base.named_modules():
        # Conv1D is transformers' linear layer of GPT-2
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            products[_owner(name)] += module.weight.numel()  # pyright: ignore
    pairs = length * (length + 1) // 2
    attention = 4 * sizes.num_heads * sizes.head_dim * pairs * sizes.num_layers
    lines = [
        EstimateLine(
            "base model", None, sum(own["base model"]), 2 * length * products["base model"]
        ),
        EstimateLine("its attention", sizes.num_layers, 0, attention),
    ]
    if own["lora"]:
        lines.append(EstimateLine("lora", None, sum(own["lora"]), 2 * length * products["lora"]))
    if memory_adapter is not None:
        lines.append(_memory_line(memory_adapter, base, length))
    return Estimate(lines=tuple(lines), length=length)


def _owner(name: str) -> str:
    """The line of a parameter or a module."""
    return "lora" if any(word.startswith("lora_") for word in name.split(".")) else "base model"


def _attention(layer: nn.Module) -> nn.Module:
    """The child of a layer that has projections as of attention."""
    found = [child for child in layer.children() if base_attention(child) is not None]
    if not found:
        must("model", "have layers with an attention that specialists know", type(layer).__name__)
    return found[0]


def _memory_line(memory_adapter: Mapping[str, Any], base: Any, length: int) -> EstimateLine:
    """The part in all its layers, with the norms before it."""
    sizes = model_sizes(base)
    part = make_part(memory_adapter, "memory_adapter", attention=False)
    check_together([part], sizes)
    named = name_parts([part])
    with torch.device("meta"):
        modules = {
            layer: AdapterLayer(own, sizes, layer)
            for layer in range(sizes.num_layers)
            if (own := parts_of_layer(named, layer, sizes))
        }
        shared = build_shared_parts(named, sizes).values()
        for layer, module in modules.items():
            for name, own in module.configs.items():
                if copies_base(own):  # with biases where attention has such
                    own.begin(
                        module.parts[name], _attention(find_layers(base, sizes.num_layers)[layer])
                    )
    parameters = sum(p.numel() for m in (*shared, *modules.values()) for p in m.parameters())
    flops = part.shared_cost(sizes, length).flops
    flops += sum(
        own.cost(sizes, length, layer).flops
        for layer in modules
        for own in parts_of_layer(named, layer, sizes).values()
    )
    return EstimateLine(part.kind, len(modules), parameters, flops)
