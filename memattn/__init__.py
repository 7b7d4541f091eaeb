"""Attention with segments, memory, future keys and tasks.

Importing ``memattn`` loads no other package. torch is loaded when an operator or a module is first
used; Triton and transformers when first needed. transformers' auto classes find the models in any
order of imports.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memattn._auto_classes import register_when_asked

if TYPE_CHECKING:
    from memattn.adapters import (
        MemoryAdapter,
        SpecialistsAdapter,
        attach_memory,
        attach_specialists,
        detach_memory,
    )
    from memattn.chapters import chapter_from_text, chapters_of
    from memattn.dtgma import DTGMAModel, train_continual
    from memattn.models import (
        AttentionConfig,
        MemAttnCache,
        MemAttnConfig,
        MemAttnForCausalLM,
        MemAttnForSequenceClassification,
        MemAttnForTokenClassification,
        MemAttnModel,
        ShiftableLanguageModel,
        TitansTransformer,
        TransformerState,
    )
    from memattn.nn import (
        DomainGate,
        FutureAttention,
        RotaryEmbedding,
        SegmentedAttention,
        ShiftableMultiheadAttention,
        ShiftableTransformerBlock,
        TaskLinear,
    )
    from memattn.ops import (
        AttentionOutput,
        FutureAttentionLossOutput,
        FutureAttentionOutput,
        NeuralMemoryOutput,
        NeuralMemoryState,
        RouterOutput,
        TaskMask,
        branch_attention,
        chapter_attention,
        chapter_router,
        future_attention,
        future_attention_loss,
        load_operators,
        neural_memory,
        segmented_attention,
        task_masked_attention,
    )
    from memattn.parts import quantize_memory
    from memattn.parts.chapter_memory import ChapterMemoryConfig
    from memattn.parts.future import FutureConfig

__version__ = "0.2.0"

__all__ = [
    "AttentionConfig",
    "AttentionOutput",
    "ChapterMemoryConfig",
    "DTGMAModel",
    "DomainGate",
    "FutureAttention",
    "FutureAttentionLossOutput",
    "FutureAttentionOutput",
    "FutureConfig",
    "MemAttnCache",
    "MemAttnConfig",
    "MemAttnForCausalLM",
    "MemAttnForSequenceClassification",
    "MemAttnForTokenClassification",
    "MemAttnModel",
    "MemoryAdapter",
    "NeuralMemoryOutput",
    "NeuralMemoryState",
    "RotaryEmbedding",
    "RouterOutput",
    "SegmentedAttention",
    "ShiftableLanguageModel",
    "ShiftableMultiheadAttention",
    "ShiftableTransformerBlock",
    "SpecialistsAdapter",
    "TaskLinear",
    "TaskMask",
    "TitansTransformer",
    "TransformerState",
    "__version__",
    "attach_memory",
    "attach_specialists",
    "branch_attention",
    "chapter_attention",
    "chapter_from_text",
    "chapter_router",
    "chapters_of",
    "detach_memory",
    "future_attention",
    "future_attention_loss",
    "load_operators",
    "neural_memory",
    "quantize_memory",
    "segmented_attention",
    "task_masked_attention",
    "train_continual",
]

_HOMES = {
    "memattn.ops": (
        "AttentionOutput",
        "FutureAttentionLossOutput",
        "FutureAttentionOutput",
        "NeuralMemoryOutput",
        "NeuralMemoryState",
        "RouterOutput",
        "TaskMask",
        "branch_attention",
        "chapter_attention",
        "chapter_router",
        "future_attention",
        "future_attention_loss",
        "load_operators",
        "neural_memory",
        "segmented_attention",
        "task_masked_attention",
    ),
    "memattn.nn": (
        "DomainGate",
        "FutureAttention",
        "RotaryEmbedding",
        "SegmentedAttention",
        "ShiftableMultiheadAttention",
        "ShiftableTransformerBlock",
        "TaskLinear",
    ),
    "memattn.models": (
        "AttentionConfig",
        "ChapterMemoryConfig",
        "FutureConfig",
        "MemAttnCache",
        "MemAttnConfig",
        "MemAttnForCausalLM",
        "MemAttnForSequenceClassification",
        "MemAttnForTokenClassification",
        "MemAttnModel",
        "ShiftableLanguageModel",
        "TitansTransformer",
        "TransformerState",
    ),
    "memattn.parts": ("quantize_memory",),
    "memattn.adapters": (
        "MemoryAdapter",
        "SpecialistsAdapter",
        "attach_memory",
        "attach_specialists",
        "detach_memory",
    ),
    "memattn.chapters": ("chapter_from_text", "chapters_of"),
    "memattn.dtgma": ("DTGMAModel", "train_continual"),
}


register_when_asked()


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that ``memattn --help`` is fast."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'memattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted(__all__)
