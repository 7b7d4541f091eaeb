"""Attention operators: one contract, three backends."""

from memattn.ops.future_attention import (
    FutureAttentionLossOutput,
    FutureAttentionOutput,
    future_attention,
    future_attention_loss,
)
from memattn.ops.segmented_attention import AttentionOutput, segmented_attention

__all__ = [
    "AttentionOutput",
    "FutureAttentionLossOutput",
    "FutureAttentionOutput",
    "future_attention",
    "future_attention_loss",
    "segmented_attention",
]
