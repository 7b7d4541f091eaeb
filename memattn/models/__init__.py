"""Models for Hugging Face transformers: the composable decoder, its configuration and its cache."""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from memattn.models.cache import MemAttnCache
from memattn.models.config import PRESETS, MemAttnConfig, register_preset
from memattn.models.decoder import MemAttnForCausalLM, MemAttnModel
from memattn.models.factory import vanilla_of_equal_parameters
from memattn.models.heads import (
    MemAttnForSequenceClassification,
    MemAttnForTokenClassification,
)
from memattn.models.hf_attention import register_hf_attention
from memattn.models.hf_names import register_class_name
from memattn.models.kept_memory import KeptMemory
from memattn.models.outputs import MemAttnCausalLMOutput, MemAttnModelOutput
from memattn.models.peft_targets import register_peft_targets
from memattn.models.pretrained import MemAttnPreTrainedModel
from memattn.models.shiftable import ShiftableLanguageModel, fold_gates, specialists_of
from memattn.models.transformer import TitansOutput, TitansTransformer, TransformerState
from memattn.parts import PARTS, AttentionConfig

AutoConfig.register(MemAttnConfig.model_type, MemAttnConfig)
AutoModel.register(MemAttnConfig, MemAttnModel)
AutoModelForCausalLM.register(MemAttnConfig, MemAttnForCausalLM)
AutoModelForSequenceClassification.register(MemAttnConfig, MemAttnForSequenceClassification)
AutoModelForTokenClassification.register(MemAttnConfig, MemAttnForTokenClassification)
register_class_name(MemAttnModel, "")
register_class_name(MemAttnForCausalLM)
register_class_name(MemAttnForSequenceClassification, "FOR_SEQUENCE_CLASSIFICATION_")
register_class_name(MemAttnForTokenClassification, "FOR_TOKEN_CLASSIFICATION_")
register_hf_attention()
register_peft_targets()

__all__ = [
    "PRESETS",
    "AttentionConfig",
    "KeptMemory",
    "MemAttnCache",
    "MemAttnCausalLMOutput",
    "MemAttnConfig",
    "MemAttnForCausalLM",
    "MemAttnForSequenceClassification",
    "MemAttnForTokenClassification",
    "MemAttnModel",
    "MemAttnModelOutput",
    "MemAttnPreTrainedModel",
    "ShiftableLanguageModel",
    "TitansOutput",
    "TitansTransformer",
    "TransformerState",
    "fold_gates",
    "register_hf_attention",
    "register_preset",
    "specialists_of",
    "vanilla_of_equal_parameters",
]


def __getattr__(name: str) -> Any:
    """The configuration of a part, whose home is ``memattn.parts``."""
    for part in PARTS.values():
        if part.__name__ == name:
            return part
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
