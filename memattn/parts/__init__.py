"""What a decoder layer can be made of: one file a part, behind one protocol."""

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
    "Sizes",
    "View",
    "make_part",
    "part_type",
    "register_part",
]
