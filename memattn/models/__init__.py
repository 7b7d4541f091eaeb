"""Models for Hugging Face transformers: the composable decoder, its configuration and its state."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from memattn.models.cache import MemAttnCache
from memattn.models.config import PRESETS, AttentionConfig, MemAttnConfig, register_preset
from memattn.models.decoder import MemAttnForCausalLM, MemAttnModel, MemAttnPreTrainedModel
from memattn.models.hf_attention import register_hf_attention

AutoConfig.register(MemAttnConfig.model_type, MemAttnConfig)
AutoModel.register(MemAttnConfig, MemAttnModel)
AutoModelForCausalLM.register(MemAttnConfig, MemAttnForCausalLM)
register_hf_attention()

__all__ = [
    "PRESETS",
    "AttentionConfig",
    "MemAttnCache",
    "MemAttnConfig",
    "MemAttnForCausalLM",
    "MemAttnModel",
    "MemAttnPreTrainedModel",
    "register_hf_attention",
    "register_preset",
]
