"""Attention operators: one contract, three backends."""

from memattn.ops.segmented_attention import AttentionOutput, segmented_attention

__all__ = ["AttentionOutput", "segmented_attention"]
