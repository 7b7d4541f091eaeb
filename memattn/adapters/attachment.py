"""The adapters of a model, and which of them are active."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from memattn.adapters.outputs import output_with_losses
from memattn.adapters.structure import Structure
from memattn.checks import must
from memattn.parts import PartConfig, PartState
from memattn.parts.chapters import Chapters
from memattn.parts.together import check_inputs, losses_of, parts_of_layer


@dataclass
class Adapter:
    """One adapter.

    Attributes:
        parts: Its parts by name.
        modules: The module with its parts for each layer that has some, by number of the layer.
        shared: The modules that layers of a part share, by name of the part.
        trainable: Its parameters that learn while it runs.
        chapters: The chapters of texts that its parts keep.
    """

    parts: Mapping[str, PartConfig]
    modules: Mapping[int, nn.Module]
    shared: Mapping[str, nn.Module]
    trainable: Sequence[nn.Parameter]
    chapters: Chapters

    def parameters(self) -> list[nn.Parameter]:
        """All parameters, those of shared modules first."""
        return [p for m in (*self.shared.values(), *self.modules.values()) for p in m.parameters()]


class Attachment:
    """The adapters of one model; the model and its attached layers all hold this object.

    Args:
        structure: Where the layers and the end of their attention are.
        arguments: Names of the positional arguments of the model's forward.
        frozen: Parameters of the model that attaching has frozen.
    """

    def __init__(
        self,
        structure: Structure,
        arguments: Sequence[str],
        frozen: Sequence[nn.Parameter],
    ) -> None:
        self.layers, self.sizes = structure.layers, structure.sizes
        self.stations = structure.stations
        self.arguments = arguments
        self.frozen = list(frozen)
        self.base_output_type = structure.output_type
        self.adapters: dict[str, Adapter] = {}
        self.active: tuple[str, ...] = ()
        self.is_enabled = True
        self._set_passing()

    def _set_passing(self) -> None:
        """Set the attributes that a copy does not inherit."""
        self.call: Any = None  # the Call that is open, or None
        self._calls = WeakTensorKeyDictionary()  # by the hidden states that layers got in them
        self.output_type = output_with_losses(self.base_output_type)

    def __getstate__(self) -> dict[str, Any]:
        passing = ("call", "_calls", "output_type")
        return {name: value for name, value in vars(self).items() if name not in passing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._set_passing()

    def call_of(self, layer: nn.Module, hidden_states: Tensor) -> Any:
        """The call that a layer belongs to: the open one, or in a backward pass the one of its
        forward pass.

        When activation checkpointing repeats a layer, the layer gets the same hidden states.
        """
        if torch.compiler.is_compiling() or not (layer.training and torch.is_grad_enabled()):
            return self.call
        if self.call is not None:
            self._calls[hidden_states] = self.call
            return self.call
        return self._calls.get(hidden_states)

    @property
    def is_running(self) -> bool:
        """Whether any part is active."""
        return self.is_enabled and bool(self.active)

    def take_inputs(self, kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Remove the inputs of parts from the keyword arguments of a call, and return them.

        Raises:
            TypeError: If no active part takes one.
        """
        parts = [part for adapter in self.adapters.values() for part in adapter.parts.values()]
        names = [name for part in parts for name in part.inputs]
        given = {name: kwargs.pop(name) for name in dict.fromkeys(names) if name in kwargs}
        return check_inputs(self.running if self.is_running else {}, given)

    def check_name(self, name: str) -> None:
        """Raise ValueError unless there is an adapter of this name."""
        if name not in self.adapters:
            must("name", f"be one of {', '.join(self.adapters)}", repr(name))

    def activate(self, names: Sequence[str]) -> None:
        """Make these adapters active and trainable, in this order; the others become inactive and
        frozen.

        Raises:
            ValueError: If one is unknown or given twice, or two give a loss different coefficients.
        """
        coefficients: dict[str, float] = {}
        for name in names:
            self.check_name(name)
            for loss, coefficient in losses_of(self.adapters[name].parts).items():
                if coefficients.setdefault(loss, coefficient) != coefficient:
                    must(f"{name}.{loss}", f"count {coefficients[loss]}", coefficient)
        if len(set(names)) < len(names):
            must("name", "name each adapter once", list(names))
        self.active = tuple(names)
        self.losses = coefficients
        for name, adapter in self.adapters.items():
            for parameter in adapter.trainable:
                parameter.requires_grad_(name in names)
        running = {f"{name}.{n}": p for name in names for n, p in self.adapters[name].parts.items()}
        self.running = running
        self.needs_state = any(part.needs_state for part in running.values())
        limited = any(part.limits_length for part in running.values())
        self.position_limit = self.sizes.max_positions if limited else None
        self.empty_states: list[dict[str, PartState]] = [
            {
                name: part.new_state()
                for name, part in parts_of_layer(running, layer, self.sizes).items()
            }
            for layer in range(self.sizes.num_layers)
        ]

    def shared_module(self, adapter: str, part: str) -> Any:
        """The module that the layers of a part share, or None."""
        return self.adapters[adapter].shared.get(part)
