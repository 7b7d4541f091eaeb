"""The cache: the state of sequences between calls, with keys, values and positions."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import SequenceKey, register_pytree_node
from transformers.cache_utils import Cache

from memattn.checks import must
from memattn.models.cache_file import SavedCache, read_cache, write_cache
from memattn.models.cache_layer import MemAttnCacheLayer
from memattn.models.config import MemAttnConfig
from memattn.parts import PartState, SequenceBounds, SequenceStates
from memattn.parts.exported_states import axes_of, flatten_states, layers_of, unflatten_states
from memattn.parts.state import OPEN_END

if TYPE_CHECKING:
    from memattn.models.plain_operands import DecoderOperands


class MemAttnCache(SequenceStates, Cache):
    """The state of a batch of sequences between calls.

    Each layer has the states of its parts. For attention these are the keys that later tokens can
    see: all keys, or at most ``max(segment_len, window_size)``. A row may lack a token in any
    column and continue after it. The cache works with ``generate()``, including beam search.

    Args:
        config: Configuration of the model that fills it.

    Attributes:
        position: Columns seen so far, including padding; the column of the next token.
        seq_start: int64 ``[B]`` on the CPU, the column where each row's sequence begins, or None
            before the first call.
        seq_end: int64 ``[B]`` on the CPU, the column where it ended, if it has.
        columns: bool ``[B, position]`` on the CPU, the columns that held tokens when they were
            added; None if these are the columns from ``seq_start`` to ``seq_end``.

    Example:
        >>> cache = MemAttnCache(model.config)
        >>> for chunk in input_ids.split(128, dim=1):
        ...     logits = model(chunk, past_key_values=cache).logits
    """

    __slots__ = ("_config", "operands")

    def __init__(self, config: MemAttnConfig) -> None:
        self._setup(_empty_states(config))
        self._config = config

    def _setup(self, layers: Sequence[Mapping[str, PartState]]) -> None:
        self._begin_walk()
        Cache.__init__(self, layers=[MemAttnCacheLayer(parts) for parts in layers])
        self._empty()
        self._config: MemAttnConfig | None = None  # of a model that this cache is known to fit
        self.operands: DecoderOperands | None = None  # of the model that uses this cache

    def _like(self) -> "MemAttnCache":
        other = super()._like()
        other._config = self._config
        return other

    def check_fits(self, config: MemAttnConfig) -> None:
        """Raise ValueError unless the layers have the model's parts."""
        if self._config is not config:
            self.check_layers(_empty_states(config))
            self._config = config

    @property
    def config(self) -> MemAttnConfig | None:
        """The configuration of a model that this cache is known to fit."""
        return self._config

    @property
    def nbytes(self) -> int:
        """Bytes of the state of all layers, including free buffer space for new tokens."""
        return sum(state.nbytes for state in self._states())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, the same for all layers."""
        return self.position

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values to a layer, after ``append_columns``."""
        return self.layers[layer_idx].update(key_states, value_states)

    def dynamic_shapes(self, rows: Any, columns: Any) -> list[dict[int, Any]]:
        """What ``torch.export`` is told of this cache, an argument of a program for any sizes.

        Args:
            rows: The ``torch.export.Dim`` of the batch.
            columns: That of the columns that a cache has seen before a call, at least 2.

        Example:
            >>> rows, seen = torch.export.Dim("rows", min=2), torch.export.Dim("seen", min=2)
            >>> cache = MemAttnCache(model.config)
            >>> shapes = ({0: rows}, cache.dynamic_shapes(rows, seen))  # of input_ids and cache
        """
        return axes_of(self, rows, columns)

    def detach(self) -> "MemAttnCache":
        """The state detached from the autograd graph; it shares memory with this cache."""
        return self._map(Tensor.detach)

    def split(self, sizes: int | Sequence[int]) -> list["MemAttnCache"]:
        """Split the batch into caches of ``sizes`` rows each, as ``torch.split`` does."""
        if self.seq_start is None:
            must("cache", "hold sequences to be split", "an empty cache")
        rows = torch.arange(self.batch_size)
        parts = rows.split(sizes if isinstance(sizes, int) else list(sizes))
        return [self._select(part) for part in parts]

    @classmethod
    def merge(cls, caches: Sequence["MemAttnCache"]) -> "MemAttnCache":
        """Join the rows of caches of the same model, of any lengths, into one batch.

        Raises:
            ValueError: If no cache is given, one is empty, or the layers differ.
        """
        if not caches:
            must("caches", "hold at least one cache", "none")
        position = max(cache.position for cache in caches)
        merged = caches[0]._like()
        layers = [layer.describe() for layer in merged.layers]
        starts, ends, columns = [], [], []
        for cache in caches:
            if cache.seq_start is None or cache.seq_end is None:
                must("caches", "hold sequences", "an empty cache")
            if [layer.describe() for layer in cache.layers] != layers:
                must("caches", "have the same layers", "others")
            # the newest columns are aligned, so that shorter rows are padded on the left
            shift = position - cache.position
            starts.append(cache.seq_start + shift)
            ends.append(torch.where(cache.seq_end == OPEN_END, OPEN_END, cache.seq_end + shift))
            columns.append(F.pad(cache.present, (shift, 0)))
        merged.position = position
        merged.seq_start, merged.seq_end = torch.cat(starts), torch.cat(ends)
        if any(cache.columns is not None for cache in caches):
            merged.columns = torch.cat(columns)
        for i, layer in enumerate(merged.layers):
            for name, state in layer.parts.items():
                parts = [cache.layers[i].parts[name] for cache in caches]
                layer.parts[name] = joined = state.merge(parts)
                floors = (
                    part.first_kept(cache.position, cache.batch_size) + position - cache.position
                    for part, cache in zip(parts, caches, strict=True)
                )
                joined.floor = torch.cat(list(floors))
                joined.realign(merged.seq_start, position)
        merged._trim()
        return merged

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to one safetensors file, atomically.

        Args:
            path: File to write; an earlier one is replaced at the end.

        Raises:
            ValueError: If the cache is empty.
        """
        write_cache(path, self.to_file())

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: str | torch.device = "cpu"
    ) -> "MemAttnCache":
        """Read a cache that ``save`` wrote.

        Args:
            path: The file.
            device: Where to put the state of the layers.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged or not a saved cache.
        """
        return cls.of_file(read_cache(path, device))

    @classmethod
    def of_file(cls, saved: SavedCache) -> "MemAttnCache":
        """The cache from the result of ``read_cache``."""
        cache = object.__new__(cls)
        cache._setup(saved.layers)
        cache.position, cache.seq_start, cache.seq_end = saved[1:4]
        cache.columns = saved.columns
        cache._mark_visible()
        return cache

    def to_file(self) -> SavedCache:
        """The content of a file, for ``write_cache``.

        Raises:
            ValueError: If the cache is empty.
        """
        if self.seq_start is None or self.seq_end is None:
            must("cache", "hold sequences to be saved", "an empty cache")
        layers = [layer.parts for layer in self.layers]
        saved = SavedCache(layers, self.position, self.seq_start, self.seq_end)
        return saved._replace(columns=self.columns)


def _flatten(cache: MemAttnCache) -> tuple[list[Any], str]:
    found = flatten_states(cache)
    return found.tensors, found.facts


def _unflatten(tensors: Iterable[Any], facts: str) -> MemAttnCache:
    cache = object.__new__(MemAttnCache)
    cache._setup(layers_of(facts))
    unflatten_states(cache, list(tensors), facts)
    return cache


def _flatten_with_keys(cache: MemAttnCache) -> tuple[list[tuple[Any, Any]], str]:
    tensors, facts = _flatten(cache)
    return [(SequenceKey(i), tensor) for i, tensor in enumerate(tensors)], facts


# programs of torch.export take and return it; transformers leaves out what is known
register_pytree_node(
    MemAttnCache,
    _flatten,
    _unflatten,
    serialized_type_name="memattn.MemAttnCache",
    flatten_with_keys_fn=_flatten_with_keys,
)


def _empty_states(config: MemAttnConfig) -> list[dict[str, PartState]]:
    """The empty state of each part of each layer of a model."""
    return [
        {name: part.new_state() for name, part in config.layer_parts(i).items()}
        for i in range(config.num_hidden_layers)
    ]


def choose_cache(
    cache: Any,
    use_cache: bool | None,
    config: MemAttnConfig,
    without: Mapping[str, bool],
    training: bool,
) -> MemAttnCache | None:
    """The given cache, a new one if ``use_cache``, or None.

    ``without`` has the arguments that exclude a cache, and whether the call uses them.
    """
    for what, is_on in without.items():
        if is_on and cache is not None:
            must("past_key_values", f"be None with {what}", type(cache).__name__)
        if is_on and use_cache:
            must("use_cache", f"not be True with {what}", use_cache)
    if cache is not None and not isinstance(cache, MemAttnCache):
        wanted = "be a MemAttnCache (PEFT's prefix tuning has another, its prompt tuning none)"
        must("past_key_values", wanted, type(cache).__name__, TypeError)
    if cache is not None:
        cache.check_fits(config)
    if use_cache is None:
        use_cache = config.use_cache and not (training or any(without.values()))
    return MemAttnCache(config) if cache is None and use_cache else cache


def has_padding(cache: MemAttnCache | None, bounds: SequenceBounds) -> bool:
    """Whether a row lacks a token in some column of a call, as far as known without waiting."""
    if cache is not None:
        return cache.has_padding
    return bounds.seq_start is not None or bounds.seq_end is not None
