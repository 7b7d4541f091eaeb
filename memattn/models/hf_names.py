"""Add this package's classes to transformers' tables of class names.

Registering with the auto classes does not change these tables. transformers uses them for several
decisions: Trainer, whether label smoothing shifts the labels (otherwise the model learns to copy
its input); pipelines and the server, which models they accept; model cards, the task of a model.
"""

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto


def register_class_name(cls: type[PreTrainedModel], table: str = "FOR_CAUSAL_LM_") -> None:
    """Register the task of a model class by its name, such as next-token prediction.

    Args:
        cls: The class.
        table: The part of the table's name between ``MODEL_`` and ``MAPPING_NAMES``.
    """
    # the keys are model types; only the names are used
    names = getattr(modeling_auto, f"MODEL_{table}MAPPING_NAMES")
    names[f"memattn {cls.__name__}"] = cls.__name__
