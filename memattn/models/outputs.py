"""What the models return, beyond what transformers has fields for."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class MemAttnModelOutput(BaseModelOutputWithPast):
    """Output of ``MemAttnModel``.

    Attributes:
        future_loss: Mean of the losses of the layers with future keys, a float32 scalar, where it
            was wanted.
    """

    future_loss: Tensor | None = None


@dataclass
class MemAttnCausalLMOutput(CausalLMOutputWithPast):
    """Output of ``MemAttnForCausalLM``.

    Attributes:
        lm_loss: The cross-entropy alone, if labels are given.
        future_loss: Mean of the losses of the layers with future keys, without the coefficient, a
            float32 scalar, where it was wanted.
    """

    lm_loss: Tensor | None = None
    future_loss: Tensor | None = None
