"""Thin modules around the operators: projections, one operator call, output projection."""

from memattn.nn._heads import (
    KeyValueCache,
    MultiHeadAttention,
    PersistentAttention,
    TokenCache,
)
from memattn.nn.axial_positions import AxialPositions, ContinuousAxialPositions
from memattn.nn.causal_convolution import CausalConvolution
from memattn.nn.chapter_memory import (
    ChapterMemory,
    ChapterRouter,
    MemoryBanks,
    MemoryCrossAttention,
    ProjectedChapters,
)
from memattn.nn.domain_gate import DomainGate, GateOutput, GateState
from memattn.nn.future_attention import FutureAttention, FutureLayerOutput
from memattn.nn.future_keys import FutureComputed, FutureRelative, FutureRows, FutureTable
from memattn.nn.linear import LowRankLinear, ZeroLinear
from memattn.nn.memory_bank import (
    FactorizedMemoryBank,
    MemoryBank,
    QuantizedMemoryBank,
    ReducedDimMemoryBank,
    StandardMemoryBank,
)
from memattn.nn.mlp import GELUMLP, SwiGLU, make_mlp
from memattn.nn.neural_memory import NeuralMemory, NeuralMemoryLayerOutput
from memattn.nn.neural_memory_state import NeuralMemoryLayerState
from memattn.nn.norm import make_norm
from memattn.nn.rotary import RotaryEmbedding, apply_rotary, sequence_positions
from memattn.nn.segmented_attention import SegmentedAttention
from memattn.nn.shiftable_attention import ShiftableMultiheadAttention
from memattn.nn.shiftable_block import ShiftableTransformerBlock
from memattn.nn.task_attention import ColumnLayout, TaskGraphAttention
from memattn.nn.task_linear import TaskGroups, TaskLinear, group_by_task
from memattn.nn.task_tokens import TokenProjection

__all__ = [
    "GELUMLP",
    "AxialPositions",
    "CausalConvolution",
    "ChapterMemory",
    "ChapterRouter",
    "ColumnLayout",
    "ContinuousAxialPositions",
    "DomainGate",
    "FactorizedMemoryBank",
    "FutureAttention",
    "FutureComputed",
    "FutureLayerOutput",
    "FutureRelative",
    "FutureRows",
    "FutureTable",
    "GateOutput",
    "GateState",
    "KeyValueCache",
    "LowRankLinear",
    "MemoryBank",
    "MemoryBanks",
    "MemoryCrossAttention",
    "MultiHeadAttention",
    "NeuralMemory",
    "NeuralMemoryLayerOutput",
    "NeuralMemoryLayerState",
    "PersistentAttention",
    "ProjectedChapters",
    "QuantizedMemoryBank",
    "ReducedDimMemoryBank",
    "RotaryEmbedding",
    "SegmentedAttention",
    "ShiftableMultiheadAttention",
    "ShiftableTransformerBlock",
    "StandardMemoryBank",
    "SwiGLU",
    "TaskGraphAttention",
    "TaskGroups",
    "TaskLinear",
    "TokenCache",
    "TokenProjection",
    "ZeroLinear",
    "apply_rotary",
    "group_by_task",
    "make_mlp",
    "make_norm",
    "sequence_positions",
]
