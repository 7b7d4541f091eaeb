"""Models for Hugging Face transformers: the composable decoder, its configuration and its state."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from memattn.models.cache import MemAttnCache
from memattn.models.config import (
    PRESETS,
    AttentionConfig,
    FutureConfig,
    MemAttnConfig,
    register_preset,
)
from memattn.models.decoder import MemAttnForCausalLM, MemAttnModel, MemAttnPreTrainedModel
from memattn.models.hf_attention import register_hf_attention
from memattn.models.hf_names import register_class_name
from memattn.models.outputs import MemAttnCausalLMOutput, MemAttnModelOutput

AutoConfig.register(MemAttnConfig.model_type, MemAttnConfig)
AutoModel.register(MemAttnConfig, MemAttnModel)
AutoModelForCausalLM.register(MemAttnConfig, MemAttnForCausalLM)
register_class_name(MemAttnForCausalLM)
register_hf_attention()

__all__ = [
    "PRESETS",
    "AttentionConfig",
    "FutureConfig",
    "MemAttnCache",
    "MemAttnCausalLMOutput",
    "MemAttnConfig",
    "MemAttnForCausalLM",
    "MemAttnModel",
    "MemAttnModelOutput",
    "MemAttnPreTrainedModel",
    "register_hf_attention",
    "register_preset",
]
