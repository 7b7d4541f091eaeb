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

__all__ = [
    "MemoryAdapter",
    "adapters_of",
    "attach_memory",
    "detach_memory",
    "disable_adapters",
    "enable_adapters",
    "set_adapter",
]
