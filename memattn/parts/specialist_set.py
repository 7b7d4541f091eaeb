"""The specialists of all layers of a model: add, train, save or remove one by name."""

import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memattn.checks import must
from memattn.nn.attention_specialist import PROJECTIONS
from memattn.nn.base_attention import BaseAttention, base_attention
from memattn.nn.causal_specialists import CausalSpecialists, SpecialistOutput
from memattn.parts.specialist_files import SavedSpecialist, fingerprint, read_saved, write_saved

Renamed = Callable[[tuple[str, ...]], None]
RETURNS = (None, False, True, "token")  # allowed values of return_gates


class LayerSpecialists(NamedTuple):
    """Specialists of one layer, and the attention that they are added to."""

    module: CausalSpecialists
    attention: nn.Module

    @property
    def base(self) -> BaseAttention | None:
        """Description of the attention."""
        return base_attention(self.attention)


class SpecialistSet:
    """The specialists of a model; a specialist has the same name in all layers.

    Args:
        layers: Specialists by layer index.
        model: Type and sizes of the model; a specialist's file must match them.
        renamed: Called with the names when they change, to store them in the configuration.
        learning: Called with the parameters that ``train_only`` makes trainable, to store them.

    Raises:
        ValueError: If no layer has specialists.
    """

    def __init__(
        self,
        layers: Mapping[int, LayerSpecialists],
        model: Mapping[str, Any],
        renamed: Renamed,
        learning: Callable[[list[nn.Parameter]], None] | None = None,
    ) -> None:
        if not layers:
            must("model", "have specialists (see SpecialistsConfig)", "none in any layer")
        self.layers = dict(layers)
        self._model = dict(model)
        self._renamed = renamed
        self._learning = learning

    def __repr__(self) -> str:
        return f"SpecialistSet({', '.join(self.names)} in {len(self.layers)} layers)"

    @property
    def modules(self) -> tuple[CausalSpecialists, ...]:
        """The modules of the specialists, layer by layer."""
        return tuple(layer.module for layer in self.layers.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order of the gates, of which the base has the first."""
        return self.modules[0].gate.specialists

    def priors(self, name: str) -> list[float]:
        """The priors of one specialist, layer by layer; prior 0 means closed.

        Raises:
            ValueError: If there is no such specialist.
        """
        return [float(module.gate.row(name).prior) for module in self.modules]

    def set_prior(self, name: str, prior: float) -> None:
        """Open a specialist in all layers with a prior above 0, or close it with 0.

        Raises:
            ValueError: If there is no such specialist, or ``prior`` is negative or not finite.
        """
        for module in self.modules:
            module.gate.set_prior(name, prior)

    def add(self, name: str | None = None, *, prior: float = 0.0) -> str:
        """Add a copy of the base, closed unless it has a ``prior``, and return its name.

        Raises:
            ValueError: If ``name`` is taken or no name, or ``prior`` is negative or not finite.
        """
        for layer in self.layers.values():
            name = layer.module.add_specialist(name, prior=prior, base=layer.base)
        assert name is not None
        self._renamed(self.names)
        return name

    def remove(self, name: str) -> None:
        """Remove a specialist from all layers.

        Raises:
            ValueError: If there is no such specialist.
        """
        for module in self.modules:
            module.remove_specialist(name)
        self._renamed(self.names)

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of one specialist in all layers, including its part of the gates.

        Raises:
            ValueError: If there is no such specialist.
        """
        for module in self.modules:
            yield from module.specialist_parameters(name)

    def train_only(self, *names: str) -> list[nn.Parameter]:
        """Make only these specialists trainable, and return their parameters.

        Parameters of the other specialists are frozen. The model's other parameters keep their
        setting; a frozen base stays frozen.

        Raises:
            ValueError: If there is no such specialist.
        """
        chosen = [parameter for name in names for parameter in self.parameters(name)]
        for module in self.modules:
            module.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        if self._learning is not None:
            self._learning(chosen)
        return chosen

    def export(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Write one specialist to a folder: ``specialist.safetensors`` and ``specialist.json``.

        Args:
            name: Its name.
            folder: A new or empty folder; or a folder with a saved specialist, which is replaced.

        Raises:
            ValueError: If there is no such specialist, or the folder holds something else.
        """
        tensors = {
            f"layers.{i}.{key}": tensor
            for i, layer in self.layers.items()
            for key, tensor in layer.module.export_specialist_state(name).items()
        }
        write_saved(folder, SavedSpecialist(name, self._facts(), self._fingerprint(), tensors))

    def load(
        self,
        folder: str | os.PathLike[str],
        *,
        name: str | None = None,
        any_base: bool = False,
    ) -> str:
        """Add a specialist that ``export`` wrote, with its prior, and return its name.

        Args:
            folder: The folder that ``export`` wrote.
            name: Its new name; None keeps its name.
            any_base: Whether to accept a specialist of a base with other weights and equal sizes.

        Raises:
            FileNotFoundError: If the folder holds no specialist.
            ValueError: If the file is damaged or of another model, or the name is taken; then
                nothing is added.
        """
        saved = read_saved(folder)
        for fact, value in self._facts().items():
            if saved.model.get(fact) != value:
                of = f"be of a model with {fact} {value!r}"
                must("folder", of, f"{folder} with {saved.model.get(fact)!r}")
        if not any_base and saved.base != self._fingerprint():
            must(
                "folder",
                "hold a specialist of a base with the weights of this one (see any_base)",
                f"{folder} of another",
            )
        states: dict[int, dict[str, Tensor]] = {i: {} for i in self.layers}
        for key, tensor in saved.tensors.items():
            _, i, rest = key.split(".", 2)
            states[int(i)][rest] = tensor
        name = self.add(name or saved.name)
        try:
            for i, layer in self.layers.items():
                layer.module.check_specialist_state(name, states[i])
        except ValueError:
            self.remove(name)
            raise
        for i, layer in self.layers.items():
            layer.module.load_specialist_state(name, states[i])
        return name

    def _facts(self) -> dict[str, Any]:
        """Type and sizes of the model that a specialist fits."""
        module = self.modules[0]
        gate = module.gate
        own = dict(layers=list(self.layers), rank=module.rank, gate_size=gate.gate_size)
        rule = dict(scope=gate.scope, activation=gate.activation, temperature=gate.temperature)
        return {**self._model, **own, **rule}

    def _fingerprint(self) -> str:
        """A checksum of the weights of the base attention."""
        bases = [layer.base for layer in self.layers.values()]
        known = [base.weights for base in bases if base is not None]
        return fingerprint(getattr(weights, name) for weights in known for name in PROJECTIONS)


def mean_gates(gates: Tensor) -> Tensor:
    """Means ``[B, 1 + N]`` of gates ``[B, T, 1 + N]`` over each row's present tokens."""
    count = (gates.sum(-1) > 0.5).sum(1)  # the gates of a present token sum to 1
    return gates.sum(1) / count.clamp(min=1)[:, None]


class GateRecord:
    """The gates of one call of a model, layer by layer."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []  # [B, T, 1 + N]; 0 for absent tokens
        self.means: list[Tensor] = []  # [B, 1 + N], over each row's tokens

    def add(self, gates: Tensor) -> None:
        """Record the gates ``[B, T, 1 + N]`` of the next layer."""
        self.tokens.append(gates)
        self.means.append(mean_gates(gates))


@contextmanager
def recording_gates(model: nn.Module) -> Generator[GateRecord, None, None]:
    """Context that records the gates of all layers of a model (a decoder, or with attached parts).

    Each call of the model in the context adds its layers. Recomputation by checkpointing is not
    recorded, because the backward runs after the context.
    """
    record = GateRecord()

    def note(module: Any, args: Any, options: dict[str, Any], output: SpecialistOutput) -> None:
        if output.gates is not None:
            record.add(output.gates.gates)
            return
        hidden_states, present = output.hidden_states, options.get("present")
        alone = hidden_states.new_zeros(len(module.specialists) + 1, dtype=torch.float32)
        alone[0] = 1.0  # the base
        gates = alone.expand(*hidden_states.shape[:2], -1)
        record.add(gates if present is None else gates * present[..., None])

    modules = [module for module in model.modules() if isinstance(module, CausalSpecialists)]
    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


def call_with_gates(
    model: nn.Module, forward: Callable[..., Any], return_gates: Any, *args: Any, **kwargs: Any
) -> Any:
    """The result of a model's forward; with ``return_gates``, the logits and the gates by layer.

    Args:
        model: The model.
        forward: Its forward without the argument ``return_gates``.
        return_gates: True for means over each row's tokens, ``"token"`` for the gates of all
            tokens.
        args: Arguments of ``forward``.
        kwargs: Keyword arguments of ``forward``.

    Raises:
        ValueError: If ``return_gates`` has another value, or no specialists are active.
    """
    if return_gates not in RETURNS:
        must("return_gates", 'be True, False or "token"', repr(return_gates))
    if not return_gates:
        return forward(*args, **kwargs)
    with recording_gates(model) as record:
        output = forward(*args, **{**kwargs, "return_dict": True})
    if not record.means:
        must("return_gates", "be None or False where no specialists run", return_gates)
    if record.means[0].shape[0] != output.logits.shape[0]:
        must("return_gates", "be None or False with packed documents in several rows", return_gates)
    return output.logits, record.tokens if return_gates == "token" else record.means
