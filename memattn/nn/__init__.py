"""Thin modules around the operators: projections, one operator call, output projection."""

from memattn.nn._heads import KeyValueCache, MultiHeadAttention, TokenCache
from memattn.nn.future_attention import FutureAttention, FutureLayerOutput
from memattn.nn.future_keys import FutureComputed, FutureRelative, FutureRows, FutureTable
from memattn.nn.mlp import GELUMLP, SwiGLU
from memattn.nn.rotary import RotaryEmbedding, apply_rotary, sequence_positions
from memattn.nn.segmented_attention import SegmentedAttention
from memattn.nn.task_attention import ColumnLayout, TaskGraphAttention
from memattn.nn.task_linear import TaskGroups, TaskLinear, group_by_task
from memattn.nn.task_tokens import TokenProjection

__all__ = [
    "GELUMLP",
    "ColumnLayout",
    "FutureAttention",
    "FutureComputed",
    "FutureLayerOutput",
    "FutureRelative",
    "FutureRows",
    "FutureTable",
    "KeyValueCache",
    "MultiHeadAttention",
    "RotaryEmbedding",
    "SegmentedAttention",
    "SwiGLU",
    "TaskGraphAttention",
    "TaskGroups",
    "TaskLinear",
    "TokenCache",
    "TokenProjection",
    "apply_rotary",
    "group_by_task",
    "sequence_positions",
]
