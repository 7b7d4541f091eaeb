"""Attach parts to a pretrained model and detach them."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memattn.adapters.attachment import Adapter, Attachment
from memattn.adapters.base_attention import check_bases, copies_base
from memattn.adapters.call import AdapterLayer
from memattn.adapters.files import load_weights, model_facts
from memattn.adapters.layer import AttachedChild, AttachedLayer
from memattn.adapters.model import AttachedModel
from memattn.adapters.structure import Structure, look_at, text_config
from memattn.adapters.swap import is_swapped, swap, swap_back
from memattn.checks import check_bool, must
from memattn.parts import PartConfig, make_part
from memattn.parts.chapters import Chapters
from memattn.parts.together import (
    build_shared_parts,
    chapter_layout,
    check_together,
    name_parts,
    parts_of_layer,
)

ALWAYS_THERE = ("before_attention", "after_mlp")  # places that every layer has
Parts = PartConfig | Mapping[str, Any] | Sequence[PartConfig | Mapping[str, Any]]


def attach_parts(
    model: nn.Module,
    config: Parts,
    *,
    name: str = "default",
    freeze_base: bool = True,
    dtype: torch.dtype | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Put parts into the layers of a model, with new or saved weights; see ``attach_memory``."""
    base = base_of(model)
    check_bool("freeze_base", freeze_base)
    if not name.isidentifier():
        must("name", "be an identifier", repr(name))
    attachment = attachment_of(base)
    if attachment is not None and name in attachment.adapters:
        must("name", f"not be one of {', '.join(attachment.adapters)}", repr(name))
    given: Any = [config] if isinstance(config, PartConfig | Mapping) else config
    if not isinstance(given, Sequence) or isinstance(given, str):
        must(
            "config", "be a PartConfig, a dict or a list of them", type(config).__name__, TypeError
        )
    if not given:
        must("config", "hold at least one part", "none")
    parts = [make_part(part, "config", attention=False) for part in given]
    first = attachment is None
    _check_attachable(base)
    structure = look_at(base) if first else _structure_of(attachment)
    check_together(parts, structure.sizes)
    named = name_parts(parts)
    _check_places(base, named, structure)

    modules = {
        layer: AdapterLayer(own, structure.sizes, layer)
        for layer in range(structure.sizes.num_layers)
        if (own := parts_of_layer(named, layer, structure.sizes))
    }
    shared = build_shared_parts(named, structure.sizes)
    _place(base, structure, modules, shared, dtype)
    _begin(base, structure, modules)
    if weights is not None:
        load_weights(modules, shared, weights)
    if first:
        frozen = [p for p in base.parameters() if p.requires_grad] if freeze_base else []
        if hasattr(base, "peft_config"):
            frozen = []  # it has frozen what it wants frozen
        arguments = [n for n in inspect.signature(base.forward).parameters if n != "self"]
        attachment = Attachment(structure, arguments, frozen)
        for parameter in frozen:
            parameter.requires_grad_(False)
        _swap_model(base, attachment)
    assert attachment is not None
    _add_modules(base, attachment, name, modules, shared)
    trainable = [
        parameter
        for module in (*shared.values(), *modules.values())
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    chapters = Chapters(chapter_layout(named, structure.sizes), model_facts(base))
    attachment.adapters[name] = Adapter(named, modules, shared, trainable, chapters)
    attachment.activate([name])


def base_of(model: Any) -> Any:
    """The transformers model inside wrappers of PEFT, torch.compile and DistributedDataParallel.

    Raises:
        TypeError: If there is none.
    """
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            must("model", "be a transformers model", type(model).__name__, TypeError)
    return model


def attachment_of(base: Any) -> Attachment | None:
    """What is attached to a transformers model, or None."""
    return vars(base).get("_memattn")


def attached(model: Any) -> tuple[Any, Attachment]:
    """The transformers model and what is attached to it.

    Raises:
        ValueError: If nothing is.
    """
    base = base_of(model)
    attachment = attachment_of(base)
    if attachment is None:
        must("model", "have attached parts (see attach_memory)", type(base).__name__)
    return base, attachment


def detach_parts(model: Any, name: str | None = None) -> None:
    """Detach one adapter from a model, or all; see ``detach_memory``."""
    base, attachment = attached(model)
    names = list(attachment.adapters) if name is None else [name]
    for each in names:
        attachment.check_name(each)
    swapped = [base, *(layer for layer in attachment.layers if hasattr(layer, "_memattn"))]
    for module in swapped:
        if not is_swapped(module) or "forward" in vars(module):
            allowed = "not be sharded since attach_memory, nor have its forward replaced"
            must("model", allowed, type(module).__name__)
    for each in names:
        for index in attachment.adapters.pop(each).modules:
            layer: Any = attachment.layers[index]
            del layer.memory_adapters[each]
        if each in base.memory_adapters:
            del base.memory_adapters[each]
    if attachment.adapters:
        attachment.activate([each for each in attachment.active if each in attachment.adapters])
        return
    for module in swapped:
        del module._memattn, module.memory_adapters
        swap_back(module)
    for layer in swapped[1:]:
        index = vars(layer).pop("_memattn_index")
        for child in set(attachment.stations[index].values()):
            if is_swapped(getattr(layer, child)):
                vars(getattr(layer, child)).pop("_memattn_site", None)
                swap_back(getattr(layer, child))
    for parameter in attachment.frozen:
        parameter.requires_grad_(True)


def _check_attachable(base: Any) -> None:
    """Raise unless the modules of a model may get other classes."""
    for name, module in base.named_modules():
        if "forward" in vars(module):
            reason = "by accelerate's device map" if hasattr(module, "_hf_hook") else "already"
            must("model", "have modules with their own forward", f"{name}, replaced {reason}")
    for parameter in base.parameters():
        if type(parameter.data).__name__ == "DTensor":
            must("model", "get attached parts before it is sharded", "a sharded one")


def _check_places(base: Any, named: Mapping[str, PartConfig], structure: Structure) -> None:
    """Raise ValueError if a layer lacks the place of a part."""
    for layer, stations in enumerate(structure.stations):
        for part in parts_of_layer(named, layer, structure.sizes).values():
            if part.resolved_place not in ALWAYS_THERE and part.resolved_place not in stations:
                kind = type(structure.layers[layer]).__name__
                must(
                    f"{part.path}",
                    f"stand {' or '.join(ALWAYS_THERE)} in {kind} of {type(base).__name__}, which "
                    "does not add the output of attention as it is to the residual before the MLP "
                    "(they run side by side, or it is scaled)",
                    part.resolved_place,
                )


def _structure_of(attachment: Attachment) -> Structure:
    """The structure that ``look_at`` found at the first attachment."""
    return Structure(
        attachment.layers, attachment.stations, attachment.base_output_type, attachment.sizes
    )


@torch.no_grad()
def _place(
    base: Any,
    structure: Structure,
    modules: Mapping[int, nn.Module],
    shared: Mapping[str, nn.Module],
    dtype: torch.dtype | None,
) -> None:
    """Give new modules their weights, their device and their dtype."""
    std = getattr(text_config(base), "initializer_range", 0.02)
    for module in (*shared.values(), *modules.values()):
        parts = {part for own in modules.values() for part in vars(own)["configs"].values()}
        for inner in module.modules():
            _init_plain(inner, std)
            for init_weights in dict.fromkeys(type(part).init_weights for part in parts):
                init_weights(inner, std)
    for layer, module in modules.items():
        like = _floating(structure.layers[layer].parameters())
        module.to(device=like.device, dtype=dtype or like.dtype)
    for module in shared.values():
        like = _floating(structure.layers[min(modules)].parameters())
        module.to(device=like.device, dtype=dtype or like.dtype)


def _begin(base: Any, structure: Structure, modules: Mapping[int, AdapterLayer]) -> None:
    """Copy the weights of attention into parts beside it that begin as copies.

    Raises:
        ValueError: If a copy would not compute what attention computes.
    """
    copied = {
        layer: {name: part for name, part in own.configs.items() if copies_base(part)}
        for layer, own in modules.items()
    }
    copied = {layer: parts for layer, parts in copied.items() if parts}
    if not copied:
        return
    paths = {layer: next(iter(parts.values())).path for layer, parts in copied.items()}
    check_bases(base, structure, paths)
    for layer, parts in copied.items():
        attention = getattr(structure.layers[layer], structure.stations[layer]["beside_attention"])
        for name, part in parts.items():
            part.begin(modules[layer].parts[name], attention)


def _init_plain(module: nn.Module, std: float) -> None:
    """The rules of transformers for layers of torch."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]


def _floating(parameters: Iterable[nn.Parameter]) -> nn.Parameter:
    """The first parameter with a floating dtype; quantised weights have others."""
    return next(parameter for parameter in parameters if parameter.is_floating_point())


def _swap_model(base: Any, attachment: Attachment) -> None:
    """Give the model its methods and the container of shared modules."""
    base._memattn = attachment
    base.memory_adapters = nn.ModuleDict()
    swap(base, AttachedModel)


def _add_modules(
    base: Any,
    attachment: Attachment,
    name: str,
    modules: Mapping[int, nn.Module],
    shared: Mapping[str, nn.Module],
) -> None:
    """Put the modules of an adapter where the layers and the model find them."""
    if shared:
        base.memory_adapters[name] = nn.ModuleDict(shared)
    for index, module in modules.items():
        layer: Any = attachment.layers[index]
        if not isinstance(layer, AttachedLayer):
            layer._memattn, layer._memattn_index = attachment, index
            layer.memory_adapters = nn.ModuleDict()
            swap(layer, AttachedLayer)
        layer.memory_adapters[name] = module
        module.train(layer.training)
        for child in attachment.stations[index].values():
            swap(getattr(layer, child), AttachedChild)
