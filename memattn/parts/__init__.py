"""Parts of a decoder layer: one file for each, all with the interface of ``PartConfig``."""

# each module registers its part
from memattn.parts import (
    attention_layer,
    causal,
    chapter_memory,
    future,
    segmented,
    specialists,
    titans,
)
from memattn.parts.base import (
    PARTS,
    PLACES,
    AddedPart,
    Cost,
    PartConfig,
    PartOutput,
    Role,
    Sizes,
    View,
    make_part,
    part_type,
    register_part,
)
from memattn.parts.context import PartContext
from memattn.parts.old_spellings import AttentionConfig
from memattn.parts.quantize import quantize_memory
from memattn.parts.sequences import SequenceStates
from memattn.parts.state import PartState, SequenceBounds

__all__ = [
    "PARTS",
    "PLACES",
    "AddedPart",
    "AttentionConfig",
    "Cost",
    "PartConfig",
    "PartContext",
    "PartOutput",
    "PartState",
    "Role",
    "SequenceBounds",
    "SequenceStates",
    "Sizes",
    "View",
    "attention_layer",
    "causal",
    "chapter_memory",
    "future",
    "make_part",
    "part_type",
    "quantize_memory",
    "register_part",
    "segmented",
    "specialists",
    "titans",
]
