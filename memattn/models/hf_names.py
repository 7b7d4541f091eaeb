"""What transformers decides by a table of class names, for the classes of this package.

Registering with the auto classes leaves these tables alone. By the name of a model's class the
Trainer decides whether label smoothing shifts the labels (else the model learns to copy its
input), pipelines and the server which models they take, and model cards what a model is for.
"""

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto


def register_class_name(cls: type[PreTrainedModel]) -> None:
    """Say that models of a class, known by its name, predict the next token."""
    # the keys are types of configurations; the names are what counts
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"memattn {cls.__name__}"] = cls.__name__
