"""Shiftable attention as a language model: a frozen decoder with gated specialists."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memattn.checks import must
from memattn.models.block import MemAttnBlock
from memattn.models.config import MemAttnConfig
from memattn.models.decoder import MemAttnForCausalLM
from memattn.models.outputs import MemAttnCausalLMOutput
from memattn.models.signatures import add_arguments
from memattn.nn.base_attention import base_attention
from memattn.nn.causal_specialists import CausalSpecialists
from memattn.parts.specialist_set import LayerSpecialists, SpecialistSet, call_with_gates
from memattn.parts.specialists import SpecialistsConfig, with_names


def specialists_of(model: MemAttnForCausalLM) -> SpecialistSet:
    """The specialists of a decoder, to add, remove, train, export and load them.

    Raises:
        ValueError: If its configuration has no specialists.
    """
    found = {}
    for block in model.model.layers:
        assert isinstance(block, MemAttnBlock)
        for module in block.parts.values():
            if isinstance(module, CausalSpecialists):
                found[block.layer_idx] = LayerSpecialists(module, block.attention)
    config, sizes = model.config, model.config.sizes
    names = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "num_layers")
    facts = {"model_type": config.model_type, **{name: getattr(sizes, name) for name in names}}

    rename = lambda names: model.replace_parts(lambda part: with_names(part, names))
    return SpecialistSet(found, facts, rename)


class ShiftableLanguageModel(MemAttnForCausalLM):
    """A frozen, trained decoder and specialists that shift its attention.

    The base's own parameters are used, not copies, and frozen. As long as all specialists are
    closed, as new ones are, the output is exactly that of the base. ``specialists`` adds, opens,
    trains, exports and loads them.

    Args:
        base_model: The decoder, with any parts; or the configuration of a shiftable one, which
            ``from_pretrained`` passes.
        num_specialists: Initial number of (closed) specialists; None means 1.
        options: More fields of ``SpecialistsConfig``, such as ``names``, ``rank`` or ``scope``.

    Raises:
        TypeError: If ``base_model`` is neither, or an option is unknown.
        ValueError: If it has specialists already, or an option does not fit.

    Example:
        >>> base = MemAttnForCausalLM(MemAttnConfig.vanilla(vocab_size=100, hidden_size=64))
        >>> model = ShiftableLanguageModel(base, num_specialists=2)
        >>> logits, gates = model(torch.randint(100, (4, 10)), return_gates=True)
        >>> gates[0].shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        base_model: MemAttnForCausalLM | MemAttnConfig,
        num_specialists: int | None = None,
        **options: Any,
    ) -> None:
        if isinstance(base_model, MemAttnConfig):
            if num_specialists is not None or options:
                given = "a configuration"
                must("base_model", "be a model with num_specialists or options", given, TypeError)
            super().__init__(base_model)
            self.freeze_base()
            return
        if not isinstance(base_model, MemAttnForCausalLM):
            got = type(base_model).__name__
            must("base_model", "be a MemAttnForCausalLM or a MemAttnConfig", got, TypeError)
        parts = list(base_model.config.parts)
        if any(isinstance(part, SpecialistsConfig) for part in parts):
            must("base_model", "have no specialists yet (see specialists_of)", repr(parts))
        part = SpecialistsConfig(num_specialists=num_specialists, **options)
        values = {**base_model.config.to_dict(), "parts": [*parts, part]}
        super().__init__(MemAttnConfig.from_dict(values))
        _adopt(self, base_model)
        self.generation_config = base_model.generation_config
        for layer in specialists_of(self).layers.values():
            like = base_model.model.embed_tokens.weight
            layer.module.to(device=like.device, dtype=like.dtype)
            layer.module.copy_base(layer.base)
        self.freeze_base()
        self.train(base_model.training)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the base is frozen."""
        loaded: Any = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze_base()
        return loaded

    def freeze_base(self) -> None:
        """Freeze the base, so that only the specialists are trained."""
        self.requires_grad_(False)
        for module in self.specialists.modules:
            module.requires_grad_(True)

    @property
    def specialists(self) -> SpecialistSet:
        """The specialists of all layers."""
        return specialists_of(self)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *args: Any, return_gates: bool | str | None = None, **kwargs: Any
    ) -> MemAttnCausalLMOutput | tuple:
        """As ``MemAttnForCausalLM.forward``, with gates.

        Args:
            args: Its positional arguments, ``input_ids`` first.
            return_gates: True to return means of the gates over each row's tokens, ``"token"`` for
                the gates of all tokens.
            kwargs: Its keyword arguments, and: ``domain_prior`` ``[1 + N]`` or ``[B, 1 + N]``
                replaces the stored priors; ``domain_mask`` ``[N]`` or ``[B, N]`` closes a
                specialist where False; ``domain_weights`` ``[B, 1 + N]`` or ``[B, T, 1 + N]`` are
                gates to use directly; ``domain_labels`` ``[B, 1]`` or ``[B, T]`` are domain labels
                for the loss ``gate_domain``.

        Returns:
            The model's output; with ``return_gates`` the logits and, for each layer, the gates of
            base and specialists, ``[B, 1 + N]`` or ``[B, T, 1 + N]``.
        """
        return call_with_gates(self, super().forward, return_gates, *args, **kwargs)

    add_arguments(forward, MemAttnForCausalLM.forward, "return_gates")


def _adopt(model: nn.Module, base: nn.Module) -> None:
    """Use the parameters, buffers and chapters of a base in a model."""
    for kind in ("_parameters", "_buffers"):
        for name, module in base.named_modules():
            getattr(model.get_submodule(name), kind).update(getattr(module, kind))
    model.get_submodule("model").chapters = base.get_submodule("model").chapters


def fold_gates(
    model: MemAttnForCausalLM, weights: Tensor | Mapping[str, float]
) -> MemAttnForCausalLM:
    """A decoder without specialists that computes the same with constant gates.

    If every layer uses one branch with gate 1, the model keeps its sizes, and that branch replaces
    its attention. Otherwise it gets the heads of all branches, since several softmaxes cannot be
    merged into one, with output projections multiplied by the gates. Both compute the same function
    up to rounding.

    Args:
        model: A decoder with specialists. Layers in which a specialist has a gate above 0 must have
            plain causal attention without persistent tokens; with several branches there must be no
            other parts.
        weights: The gates of base and specialists, ``[1 + N]``, or ``[layers, 1 + N]`` for each
            layer with specialists; or a dict of specialists' gates by name, where the base gets the
            rest.

    Returns:
        A new model, which shares no tensors with ``model``.

    Raises:
        ValueError: If the gates do not sum to 1, or the model cannot be folded.
    """
    own = specialists_of(model)
    gates = _constant_gates(weights, own)
    used = {i: [e for e, g in enumerate(row) if g != 0.0] for i, row in gates.items()}
    config = model.config
    plain = lambda part: part.kind == "causal" and not part.num_persistent_tokens
    if any(branches != [0] for branches in used.values()) and not plain(config.attention):
        allowed = "have plain causal attention where specialists count"
        must("model", allowed, config.attention.kind)
    rest = [part for part in config.parts if not isinstance(part, SpecialistsConfig)]
    values = {**config.to_dict(), "parts": rest}
    n = max(map(len, used.values()))
    if n > 1:
        if rest:
            must("model", "have no other parts where several branches count", rest[0].kind)
        assert config.num_key_value_heads is not None
        for name in ("num_attention_heads", "num_key_value_heads"):
            values[name] = n * getattr(config, name)
    folded = MemAttnForCausalLM(MemAttnConfig.from_dict(values))
    like = model.model.embed_tokens.weight
    nn.Module.to(folded, device=like.device, dtype=like.dtype)
    state = model.state_dict()
    tensors = {name: state[name] for name in folded.state_dict()}
    for i in range(config.num_hidden_layers):
        branches = _branches(model, own, i, used.get(i, [0]), gates.get(i, [1.0]), n)
        for name, tensor in branches.items():
            tensors[f"model.layers.{i}.attention.{name}_proj.weight"] = tensor
    folded.load_state_dict(tensors)
    return folded.train(model.training)


def _constant_gates(
    weights: Tensor | Mapping[str, float], own: SpecialistSet
) -> dict[int, list[float]]:
    """Gates of base and specialists by layer."""
    names, layers = own.names, list(own.layers)
    if isinstance(weights, Mapping):
        for name in weights:
            own.priors(name)  # raises for an unknown name
        rest = [float(weights.get(name, 0.0)) for name in names]
        weights = torch.tensor([1.0 - sum(rest), *rest], dtype=torch.float64)
    n, m = 1 + len(names), len(layers)
    if list(weights.shape) not in ([n], [m, n]):
        must("weights", f"have shape [{n}] or [{m}, {n}]", list(weights.shape))
    rows = weights.double().expand(m, n)
    if bool((rows < 0).any()) or bool(((rows.sum(-1) - 1).abs() > 1e-5).any()):
        must("weights", "be at least 0 and sum to 1", rows.tolist())
    return dict(zip(layers, rows.tolist(), strict=True))


@torch.no_grad()
def _branches(
    model: MemAttnForCausalLM,
    own: SpecialistSet,
    layer: int,
    used: list[int],
    gates: list[float],
    n: int,
) -> dict[str, Tensor]:
    """Stacked projections of one layer's ``n`` branches, gated."""
    if used == [0] and n == 1:
        return {}
    block: Any = model.model.layers[layer]
    base = base_attention(block.attention)
    assert base is not None
    found = []
    for e in used:
        weights = base.weights
        if e:
            module = own.layers[layer].module
            weights = module.specialist(own.names[e - 1]).weights(base.weights)
        found.append((weights, gates[e]))
    found += [(base.weights, 0.0)] * (n - len(used))
    joined = {name: torch.cat([getattr(w, name) for w, _ in found]) for name in ("q", "k", "v")}
    return {**joined, "o": torch.cat([gate * w.out for w, gate in found], 1)}
