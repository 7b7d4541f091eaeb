"""Thin modules around the operators: projections, one operator call, output projection."""

from memattn.nn.mlp import SwiGLU
from memattn.nn.rotary import RotaryEmbedding, apply_rotary, sequence_positions
from memattn.nn.segmented_attention import KeyValueCache, SegmentedAttention

__all__ = [
    "KeyValueCache",
    "RotaryEmbedding",
    "SegmentedAttention",
    "SwiGLU",
    "apply_rotary",
    "sequence_positions",
]
