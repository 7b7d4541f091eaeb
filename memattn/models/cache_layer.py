"""The state of one layer of the decoder."""

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

OPEN = 1 << 62  # the end of a row that may still grow
SEQUENCES = ("key", "value", "latent")  # tensors with one entry per token, on axis 2


class MemAttnCacheLayer(CacheLayerMixin):
    """The state of one layer: tensors by name, with the batch on axis 0 of each.

    Args:
        segment_len: Segment length of the layer's attention, or None.
        window_size: Window of the layer's attention, or None.
    """

    is_sliding = False

    def __init__(self, segment_len: int | None = None, window_size: int | None = None) -> None:
        self.segment_len = segment_len
        self.window_size = window_size
        self.state: dict[str, Tensor] = {}
        self.position = 0  # columns seen so far, set by the cache
        self.keep = 0  # newest keys that later tokens can see, set by the cache
        self.record_past = False  # keep also what no later token can see, until cropped

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Kept keys ``[B, Hkv, S, D]``, or None before the first call."""
        return self.state.get("key")

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Kept values ``[B, Hkv, S, Dv]``, or None before the first call."""
        return self.state.get("value")

    @property
    def is_initialized(self) -> bool:
        """Whether the layer holds keys."""
        return "key" in self.state

    @property
    def kept(self) -> int:
        """Number of keys that the layer holds."""
        return self.state["key"].shape[2] if self.state else 0

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return them behind those kept."""
        return self.append("key", key_states), self.append("value", value_states)

    def append(self, name: str, states: Tensor) -> Tensor:
        """Append one of the ``SEQUENCES``, and return it behind what is kept of it.

        What no later token can see is then dropped, unless the past is recorded.
        """
        if name in self.state:
            states = torch.cat([self.state[name], states], dim=2)
        self.state[name] = states
        if not self.record_past:
            self._trim(name)
        return states

    def trim(self) -> None:
        """Drop what belongs to tokens that no later token can see, and the memory it takes."""
        for name in self.state:
            self._trim(name)

    def _trim(self, name: str) -> None:
        drop = self.state[name].shape[2] - self.keep
        if drop > 0:
            self.state[name] = self.state[name][:, :, drop:].clone()

    def crop(self, num_columns: int) -> None:
        """Remove the newest ``num_columns`` tokens, and then what no later token can see."""
        rest = self.kept - num_columns
        for name, states in self.state.items():
            self.state[name] = states[:, :, :rest]
        self.trim()

    def visible_from(self, position: int, start: Tensor, end: Tensor) -> int:
        """First column that a token at column ``position`` or later can see in any row."""
        length = position - start  # of the sequence of each row, in tokens
        first = start
        if self.segment_len is not None or self.window_size is not None:
            near = [torch.full_like(start, position)]
            if self.segment_len is not None:
                near.append(start + length // self.segment_len * self.segment_len)
            if self.window_size is not None:
                near.append(torch.full_like(start, position - self.window_size + 1))
            first = torch.stack(near).amin(0).maximum(start)
        return int(torch.where(end == OPEN, first, position).min())

    def get_seq_length(self) -> int:
        """Columns seen so far, kept or not."""
        return self.position

    def get_max_length(self) -> int:
        """-1: there is no longest sequence."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that the next call sees, and the column of the first of them."""
        return self.kept + query_length, self.position - self.kept

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start with keys of length 0, of the shape and dtype of those given."""
        self.state["key"], self.state["value"] = key_states[:, :, :0], value_states[:, :, :0]
