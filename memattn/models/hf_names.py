"""What transformers decides by a table of class names, for the classes of this package.

Registering with the auto classes leaves these tables alone. By the name of a model's class the
Trainer decides whether label smoothing shifts the labels (else the model learns to copy its
input), pipelines and the server which models they take, and model cards what a model is for.
"""

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto


def register_class_name(cls: type[PreTrainedModel], table: str = "FOR_CAUSAL_LM_") -> None:
    """Say what models of a class, known by its name, are for: predict the next token, or another.

    Args:
        cls: The class.
        table: What transformers calls that between ``MODEL_`` and ``MAPPING_NAMES``.
    """
    # the keys are types of configurations; the names are what counts
    names = getattr(modeling_auto, f"MODEL_{table}MAPPING_NAMES")
    names[f"memattn {cls.__name__}"] = cls.__name__
