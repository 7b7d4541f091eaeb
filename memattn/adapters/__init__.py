"""Parts inside pretrained Hugging Face models: attach, switch, save, detach."""

from memattn.adapters.adapter import (
    MemoryAdapter,
    adapters_of,
    attach_memory,
    detach_memory,
    disable_adapters,
    enable_adapters,
    set_adapter,
)
from memattn.adapters.specialists import SpecialistsAdapter, attach_specialists

__all__ = [
    "MemoryAdapter",
    "SpecialistsAdapter",
    "adapters_of",
    "attach_memory",
    "attach_specialists",
    "detach_memory",
    "disable_adapters",
    "enable_adapters",
    "set_adapter",
]
