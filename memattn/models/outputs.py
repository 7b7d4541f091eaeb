"""What the models return, beyond what transformers has fields for."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from memattn.parts.losses import NamedLosses
from memattn.parts.packing import PackedRows
from memattn.parts.token_order import TokenOrder


@dataclass
class MemAttnModelOutput(NamedLosses, BaseModelOutputWithPast):
    """Output of ``MemAttnModel``.

    Attributes:
        losses: Means of the losses that parts return, by name, without their coefficients, scalars
            of float32, where they were wanted. Each is an attribute as well.
        loss_counts: What each of them is the mean of; 0 where there was nothing, and the mean is 0.
        order: Of the tokens of rows with holes or of several documents; no field.
    """

    losses: dict[str, Tensor] | None = None
    loss_counts: dict[str, Tensor] | None = None
    order: ClassVar[TokenOrder | PackedRows | None] = None


@dataclass
class MemAttnCausalLMOutput(NamedLosses, CausalLMOutputWithPast):
    """Output of ``MemAttnForCausalLM``.

    Attributes:
        lm_loss: The cross-entropy alone, if labels are given.
        losses: As in ``MemAttnModelOutput``.
        loss_counts: As in ``MemAttnModelOutput``.
    """

    lm_loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    loss_counts: dict[str, Tensor] | None = None
