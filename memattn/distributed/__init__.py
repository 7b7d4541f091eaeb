"""Operators over sequences that several processes share, on ``torch.distributed``."""

from memattn.distributed.segmented_attention import sequence_parallel_segmented_attention
from memattn.distributed.shards import EdgeBytes, SequenceShards, edge_bytes

__all__ = [
    "EdgeBytes",
    "SequenceShards",
    "edge_bytes",
    "sequence_parallel_segmented_attention",
]
