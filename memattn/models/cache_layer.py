"""The state of one layer of the decoder: the states of its parts."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from memattn.parts import PartState


class MemAttnCacheLayer(CacheLayerMixin):
    """The states of the parts of one layer, by name.

    Args:
        parts: State of each part; ``"attention"`` is one of them.
    """

    is_sliding = False

    def __init__(self, parts: Mapping[str, PartState]) -> None:
        self.parts = dict(parts)
        self.position = 0  # columns seen so far, set by the cache

    @property
    def state(self) -> dict[str, Tensor]:
        """Every tensor of the layer, as ``<part>.<tensor>``."""
        return {
            f"{name}.{key}": tensor
            for name, state in self.parts.items()
            for key, tensor in {**state.tokens, **state.rows}.items()
        }

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Kept keys ``[B, Hkv, S, D]``, or None before the first call."""
        return self.parts["attention"].tokens.get("key")

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Kept values ``[B, Hkv, S, Dv]``, or None before the first call."""
        return self.parts["attention"].tokens.get("value")

    @property
    def is_initialized(self) -> bool:
        """Whether the layer has keys."""
        return self.keys is not None

    @property
    def kept(self) -> int:
        """Number of kept keys."""
        return self.parts["attention"].kept

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return all kept ones."""
        return self.parts["attention"].update(key_states, value_states)

    def describe(self) -> dict[str, Any]:
        """Arguments that create an empty layer, as plain values."""
        return {name: state.describe() for name, state in self.parts.items()}

    def get_seq_length(self) -> int:
        """Columns seen so far, kept or not."""
        return self.position

    def get_max_length(self) -> int:
        """-1, as the length is not limited."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that the next call sees, and the column of the first one."""
        return self.kept + query_length, self.position - self.kept

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start with keys of length 0, of the shape and dtype of those given."""
        self.update(key_states[:, :, :0], value_states[:, :, :0])
