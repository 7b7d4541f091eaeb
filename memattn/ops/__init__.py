"""Attention operators: one contract, three backends."""

from memattn.ops.future_attention import (
    FutureAttentionLossOutput,
    FutureAttentionOutput,
    future_attention,
    future_attention_loss,
)
from memattn.ops.segmented_attention import AttentionOutput, segmented_attention
from memattn.ops.task_mask import TaskMask
from memattn.ops.task_masked_attention import task_masked_attention

__all__ = [
    "AttentionOutput",
    "FutureAttentionLossOutput",
    "FutureAttentionOutput",
    "TaskMask",
    "future_attention",
    "future_attention_loss",
    "segmented_attention",
    "task_masked_attention",
]
