"""Specialists beside the attention of a pretrained model: attach, open, add, remove, freeze."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from memattn.adapters.adapter import MemoryAdapter
from memattn.adapters.attach import attach_parts, attached
from memattn.checks import must
from memattn.nn.base_attention import base_attention
from memattn.nn.causal_specialists import CausalSpecialists
from memattn.parts.specialists import SpecialistsConfig


class SpecialistsAdapter(MemoryAdapter):
    """One adapter with specialists; ``attach_specialists`` makes it.

    Args:
        model: A model with attached parts.
        name: The adapter's name.

    Raises:
        ValueError: If there is no such adapter, or it has no specialists.
    """

    def __init__(self, model: Any, name: str) -> None:
        super().__init__(model, name)
        self._part_name()

    def _part_name(self) -> str:
        """The name of the part."""
        for name, part in self._adapter.parts.items():
            if isinstance(part, SpecialistsConfig):
                return name
        kinds = ", ".join(part.kind for part in self.parts)
        must("name", "be that of an adapter with specialists", f"{self.name!r} with {kinds}")

    @property
    def modules(self) -> dict[int, CausalSpecialists]:
        """The modules with the specialists, by number of the layer."""
        name = self._part_name()
        found = {}
        for layer, own in self._adapter.modules.items():
            module = own.get_submodule("parts")._modules.get(name)
            if isinstance(module, CausalSpecialists):
                found[layer] = module
        return found

    @property
    def specialists(self) -> tuple[str, ...]:
        """The names of the specialists, in the order of their gates."""
        part = self._adapter.parts[self._part_name()]
        assert isinstance(part, SpecialistsConfig) and part.names is not None
        return part.names

    def set_prior(self, name: str, prior: float) -> None:
        """Open a specialist in all its layers with a prior above 0, or close it with 0.

        Raises:
            ValueError: If there is no such specialist, or ``prior`` is negative or not finite.
        """
        for module in self.modules.values():
            module.gate.set_prior(name, prior)

    def add_specialist(self, name: str | None = None, *, prior: float = 0.0) -> str:
        """Add a copy of the model's attention, closed unless it has a ``prior``; return its name.

        Raises:
            ValueError: If ``name`` is taken or no name, or ``prior`` is negative or not finite.
        """
        _, attachment = attached(self.model)
        for layer, module in self.modules.items():
            child = attachment.stations[layer]["beside_attention"]
            attention = attachment.layers[layer].get_submodule(child)
            name = module.add_specialist(name, prior=prior, base=base_attention(attention))
            module.specialist(name).to(module.gate.place)
        assert name is not None
        self._set_names((*self.specialists, name))
        self._adapter.trainable = [*self._adapter.trainable, *self.specialist_parameters(name)]
        learns = self.name in attachment.active
        for parameter in self.specialist_parameters(name):
            parameter.requires_grad_(learns)
        return name

    def remove_specialist(self, name: str) -> None:
        """Drop a specialist and its part of the gate.

        Raises:
            ValueError: If there is no such specialist.
        """
        for module in self.modules.values():
            module.remove_specialist(name)
        self._set_names(tuple(other for other in self.specialists if other != name))
        left = set(self._adapter.parameters())
        self._adapter.trainable = [p for p in self._adapter.trainable if p in left]

    def specialist_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """What one specialist owns in all layers, its part of the gate included.

        Raises:
            ValueError: If there is no such specialist.
        """
        for module in self.modules.values():
            yield from module.specialist_parameters(name)

    def train_specialists(self, *names: str) -> None:
        """Let these specialists learn while the adapter runs, and the others not.

        Raises:
            ValueError: If there is no such specialist.
        """
        owned = {p: own for own in self.specialists for p in self.specialist_parameters(own)}
        for name in names:
            if name not in self.specialists:
                must(
                    "names",
                    f"be specialists: {', '.join(self.specialists) or 'there is none'}",
                    name,
                )
        kept = set(self._adapter.trainable) - owned.keys()
        learning = kept | {p for p, own in owned.items() if own in names}
        self._adapter.trainable = [p for p in self._adapter.parameters() if p in learning]
        for parameter in owned:
            parameter.requires_grad_(False)
        attachment = attached(self.model)[1]
        attachment.activate(attachment.active)

    def _set_names(self, names: tuple[str, ...]) -> None:
        """Say in the part's configuration which specialists there are."""
        own = self._part_name()
        change = lambda part: replace(part, names=names, num_specialists=len(names))
        adapter = self._adapter
        adapter.parts = {n: change(p) if n == own else p for n, p in adapter.parts.items()}
        for module in adapter.modules.values():
            configs = vars(module)["configs"]
            module.configs = {n: change(p) if n == own else p for n, p in configs.items()}
        attached(self.model)[1].activate(attached(self.model)[1].active)


def attach_specialists(
    model: nn.Module,
    config: SpecialistsConfig | Mapping[str, Any] | None = None,
    *,
    name: str = "specialists",
    freeze_base: bool = True,
    dtype: torch.dtype | None = None,
) -> SpecialistsAdapter:
    """Put gated specialists beside the attention of a pretrained model, in place.

    ``Y = g_0 Base(x) + sum_e g_e Specialist_e(x)`` stands where attention's output was. The base
    is the model's own module, which runs as ever, with LoRA of PEFT in it if there is one. A
    specialist begins as a copy of the weights of its projections, closed: the logits keep their
    bits until ``set_prior`` opens it. All that ``attach_memory`` says holds, and both may be
    attached together.

    Args:
        model: A causal language model of transformers, or one inside PEFT's: Qwen 2 and 3, Llama,
            GPT-2, and others whose attention does no more than theirs.
        config: The part, or its fields; None means one specialist in every layer.
        name: As in ``attach_memory``.
        freeze_base: Likewise.
        dtype: Likewise.

    Returns:
        The adapter.

    Raises:
        TypeError: If ``model`` is no transformers model, or ``config`` no part.
        ValueError: If the part does not fit, or copies of an attention would not do what it does:
            its projections are not known or quantised, it sees a window of tokens only, or changes
            its scores. The model is then as before.
    """
    if config is None or isinstance(config, Mapping):
        config = {"kind": SpecialistsConfig.kind, **(config or {})}
        if config["kind"] != SpecialistsConfig.kind:
            must("config.kind", f"be {SpecialistsConfig.kind}", repr(config["kind"]))
    elif not isinstance(config, SpecialistsConfig):
        must("config", "be a SpecialistsConfig or a dict", type(config).__name__, TypeError)
    attach_parts(model, config, name=name, freeze_base=freeze_base, dtype=dtype)
    return SpecialistsAdapter(model, name)
