"""The decoder with an output layer for classes instead of tokens."""

from typing import Any

from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from memattn.models.pretrained import MemAttnPreTrainedModel
from memattn.models.signatures import add_arguments


class MemAttnForSequenceClassification(GenericForSequenceClassification, MemAttnPreTrainedModel):
    """The decoder, and a linear layer that says the class of a whole sequence.

    The last token that is not padding is read: with ``input_ids``, the last that is not
    ``config.pad_token_id``, which batches need. ``config.num_labels`` counts the classes, and
    ``config.problem_type`` chooses the loss, as in transformers, whose class computes all this.
    Losses of parts are not among it. A row of several documents is refused.

    Args:
        config: Sizes and parts of the model.

    Example:
        >>> config = MemAttnConfig.segmented(num_labels=3, pad_token_id=0, vocab_size=99)
        >>> model = MemAttnForSequenceClassification(config)
        >>> model(torch.randint(1, 99, (2, 40)), labels=torch.tensor([2, 0])).logits.shape
        torch.Size([2, 3])
    """

    base_model_prefix = "model"
    accepts_loss_kwargs = False  # their loss is a mean, which the trainer of transformers divides

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of transformers, of rows that are one document each."""
        return super().forward(*args, may_pack=False, **kwargs)

    add_arguments(forward, GenericForSequenceClassification.forward)


class MemAttnForTokenClassification(GenericForTokenClassification, MemAttnPreTrainedModel):
    """The decoder, and a linear layer that says the class of each token.

    A token knows only those before it. ``config.num_labels`` counts the classes; labels of -100
    have no loss. ``config.classifier_dropout`` is 0.1 unless given, as in transformers, whose class
    computes all this. Losses of parts are not among it.

    Args:
        config: Sizes and parts of the model.

    Example:
        >>> model = MemAttnForTokenClassification(MemAttnConfig(num_labels=3, vocab_size=99))
        >>> model(torch.randint(99, (2, 40))).logits.shape
        torch.Size([2, 40, 3])
    """

    base_model_prefix = "model"
    accepts_loss_kwargs = False  # as that of sequences
