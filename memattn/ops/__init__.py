"""Attention operators: one contract, three backends."""

from memattn.ops._dispatch import load_operators
from memattn.ops._trees import register_trees
from memattn.ops.branch_attention import branch_attention
from memattn.ops.chapter_attention import chapter_attention
from memattn.ops.chapter_router import RouterOutput, chapter_router
from memattn.ops.future_attention import (
    FutureAttentionLossOutput,
    FutureAttentionOutput,
    future_attention,
    future_attention_loss,
)
from memattn.ops.neural_memory import NeuralMemoryOutput, neural_memory
from memattn.ops.neural_memory_state import NeuralMemoryState
from memattn.ops.segmented_attention import AttentionOutput, segmented_attention
from memattn.ops.task_mask import TaskMask
from memattn.ops.task_masked_attention import task_masked_attention

register_trees()

__all__ = [
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
]
