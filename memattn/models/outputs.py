"""What the models return, beyond what transformers has fields for."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from memattn.parts import PARTS


class _NamedLosses:
    """Each loss of a part is an attribute too, None where it was not measured."""

    losses: dict[str, Tensor] | None

    def __getattr__(self, name: str) -> Any:
        losses = self.__dict__.get("losses") or {}
        if name in losses or any(name in part.reports for part in PARTS.values()):
            return losses.get(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@dataclass
class MemAttnModelOutput(_NamedLosses, BaseModelOutputWithPast):
    """Output of ``MemAttnModel``.

    Attributes:
        losses: Means of the losses that parts return, by name, without their coefficients, scalars
            of float32, where they were wanted. Each is an attribute as well.
        loss_counts: What each of them is the mean of; 0 where there was nothing, and the mean is 0.
    """

    losses: dict[str, Tensor] | None = None
    loss_counts: dict[str, Tensor] | None = None


@dataclass
class MemAttnCausalLMOutput(_NamedLosses, CausalLMOutputWithPast):
    """Output of ``MemAttnForCausalLM``.

    Attributes:
        lm_loss: The cross-entropy alone, if labels are given.
        losses: As in ``MemAttnModelOutput``.
        loss_counts: As in ``MemAttnModelOutput``.
    """

    lm_loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    loss_counts: dict[str, Tensor] | None = None
