"""The decoder with an output layer for classification."""

from typing import Any

from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from memattn.models.pretrained import MemAttnPreTrainedModel
from memattn.models.signatures import add_arguments


class MemAttnForSequenceClassification(GenericForSequenceClassification, MemAttnPreTrainedModel):
    """The decoder with a linear layer that classifies a whole sequence.

    It reads the last token that is not padding: with ``input_ids``, the last that is not
    ``config.pad_token_id``, which is required for batches. ``config.num_labels`` is the number of
    classes, and ``config.problem_type`` selects the loss, as in transformers, whose class is used.
    Losses of parts are not added. Rows with several documents are refused.

    Args:
        config: Sizes and parts of the model.

    Example:
        >>> config = MemAttnConfig.segmented(num_labels=3, pad_token_id=0, vocab_size=99)
        >>> model = MemAttnForSequenceClassification(config)
        >>> model(torch.randint(1, 99, (2, 40)), labels=torch.tensor([2, 0])).logits.shape
        torch.Size([2, 3])
    """

    base_model_prefix = "model"
    accepts_loss_kwargs = False  # the loss is a mean, which the trainer of transformers divides

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; each row must be one document."""
        return super().forward(*args, may_pack=False, **kwargs)

    add_arguments(forward, GenericForSequenceClassification.forward)


class MemAttnForTokenClassification(GenericForTokenClassification, MemAttnPreTrainedModel):
    """The decoder with a linear layer that classifies each token.

    A token sees only earlier tokens. ``config.num_labels`` is the number of classes; labels of -100
    have no loss. ``config.classifier_dropout`` defaults to 0.1, as in transformers, whose class is
    used. Losses of parts are not added.

    Args:
        config: Sizes and parts of the model.

    Example:
        >>> model = MemAttnForTokenClassification(MemAttnConfig(num_labels=3, vocab_size=99))
        >>> model(torch.randint(99, (2, 40))).logits.shape
        torch.Size([2, 40, 3])
    """

    base_model_prefix = "model"
    accepts_loss_kwargs = False  # as for sequence classification
