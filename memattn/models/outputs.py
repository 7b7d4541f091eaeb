"""Outputs of the models, with more fields than transformers' outputs."""

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
        losses: Means of the losses of parts by name, without coefficients, float32 scalars, if they
            were measured. Each is also an attribute.
        loss_counts: Number of terms in each mean; with 0 terms the mean is 0.
        order: Order of the tokens in rows with padding inside or several documents; not a field.
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
