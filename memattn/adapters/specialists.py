"""Specialists beside the attention of a pretrained model."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from memattn.adapters.adapter import MemoryAdapter
from memattn.adapters.attach import attach_parts, attached
from memattn.adapters.files import model_facts
from memattn.checks import must
from memattn.nn.causal_specialists import CausalSpecialists
from memattn.parts.specialist_set import LayerSpecialists, SpecialistSet
from memattn.parts.specialists import SpecialistsConfig, with_names

NAME = "specialists"  # of an adapter, where no other is given


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
        if not any(isinstance(part, SpecialistsConfig) for part in self.parts):
            kinds = ", ".join(part.kind for part in self.parts)
            must("name", "be that of an adapter with specialists", f"{name!r} with {kinds}")

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, folder: str | os.PathLike[str], *, name: str = NAME, **options: Any
    ) -> "SpecialistsAdapter":
        """As ``MemoryAdapter.from_pretrained``, with the name of ``attach_specialists``."""
        adapter = super().from_pretrained(model, folder, name=name, **options)
        assert isinstance(adapter, cls)
        return adapter

    @property
    def specialists(self) -> SpecialistSet:
        """Its specialists, to open, add, remove, train, export and load them.

        Those that ``train_only`` chose are trainable whenever the adapter is active.
        """
        base, attachment = attached(self.model)
        found = {}
        for layer, own in self._adapter.modules.items():
            for module in own.get_submodule("parts").children():
                if isinstance(module, CausalSpecialists):
                    child = attachment.stations[layer]["beside_attention"]
                    attention = attachment.layers[layer].get_submodule(child)
                    found[layer] = LayerSpecialists(module, attention)
        return SpecialistSet(found, model_facts(base), self._rename, self._let_learn)

    def _rename(self, names: tuple[str, ...]) -> None:
        """Update configurations and trainable parameters after specialists have changed."""

        adapter, learns = self._adapter, self.name in attached(self.model)[1].active
        before = {
            name
            for part in adapter.parts.values()
            if isinstance(part, SpecialistsConfig)
            for name in part.names or ()
        }
        adapter.parts = {n: with_names(part, names) for n, part in adapter.parts.items()}
        for own in adapter.modules.values():
            parts = vars(own)["configs"]
            own.configs = {n: with_names(part, names) for n, part in parts.items()}  # pyright: ignore
        specialists = self.specialists
        for module in specialists.modules:
            for specialist in module.specialists.values():
                specialist.to(module.gate.place)  # a copy of a base of another dtype
        new = [name for name in names if name not in before]
        added = [p for name in new for p in specialists.parameters(name)]
        for parameter in added:
            parameter.requires_grad_(learns)
        learning = {*adapter.trainable, *added}
        adapter.trainable = [p for p in adapter.parameters() if p in learning]

    def _let_learn(self, chosen: list[nn.Parameter]) -> None:
        """Update which parameters of the specialists are trainable."""
        adapter = self._adapter
        own = {p for module in self.specialists.modules for p in module.parameters()}
        learning = {*adapter.trainable} - own | {*chosen}
        adapter.trainable = [p for p in adapter.parameters() if p in learning]


def attach_specialists(
    model: nn.Module,
    config: SpecialistsConfig | Mapping[str, Any] | None = None,
    *,
    name: str = NAME,
    freeze_base: bool = True,
    dtype: torch.dtype | None = None,
) -> SpecialistsAdapter:
    """Put gated specialists beside the attention of a pretrained model, in place.

    ``Y = g_0 Base(x) + sum_e g_e Specialist_e(x)`` replaces attention's output. The base is the
    model's own, unchanged module, with LoRA of PEFT in it if there is one. A specialist begins as a
    copy of the weights of its projections and is closed: the logits do not change in any bit until
    it is opened. The statements of ``attach_memory`` hold here too, and both may be attached
    together. ``model(...)`` and ``generate(...)`` also take ``domain_prior``, ``domain_mask`` and
    ``domain_weights``, and ``model(..., return_gates=True)`` returns the logits and, of each layer,
    the gates of base and specialists ``[B, 1 + N]``; ``"token"`` gives ``[B, T, 1 + N]``. In
    training ``domain_labels`` give the domain of each text, for the loss ``gate_domain``.

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
        ValueError: If the part does not fit, or copies of an attention would not compute what it
            computes: its projections are unknown or quantised, it sees only a window of tokens, or
            it changes its scores. The model is then unchanged.
    """
    if config is None or isinstance(config, Mapping):
        config = {"kind": SpecialistsConfig.kind, **(config or {})}
        if config["kind"] != SpecialistsConfig.kind:
            must("config.kind", f"be {SpecialistsConfig.kind}", repr(config["kind"]))
    elif not isinstance(config, SpecialistsConfig):
        must("config", "be a SpecialistsConfig or a dict", type(config).__name__, TypeError)
    attach_parts(model, config, name=name, freeze_base=freeze_base, dtype=dtype)
    return SpecialistsAdapter(model, name)
