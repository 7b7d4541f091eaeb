"""The state of sequences between calls: keys and values that later tokens see, and positions."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from memattn.checks import check_shape, check_tensor, must
from memattn.models.cache_file import SavedCache, read_cache, write_cache
from memattn.models.cache_layer import MemAttnCacheLayer
from memattn.models.config import MemAttnConfig
from memattn.models.padding import BLOCK, block_bounds, check_longest, check_mask
from memattn.parts import PartState, SequenceBounds
from memattn.parts.state import OPEN


class MemAttnCache(Cache):
    """Everything that a batch of sequences carries from one call to the next.

    Each layer holds what each of its parts keeps: of attention, the keys that later tokens can see,
    all or at most ``max(segment_len, window_size)``. Rows may be padded on either side;
    a row that was padded on the right has ended, and only ``reset`` lets it begin anew. It works
    with ``generate()``, beam search included.

    Args:
        config: Configuration of the model that fills it.

    Attributes:
        position: Columns seen so far, padding included; the column of the next token.
        seq_start: int64 ``[B]`` on the CPU, the column where each row's sequence begins, or None
            before the first call.
        seq_end: int64 ``[B]`` on the CPU, the column where it ended, if it has.

    Example:
        >>> cache = MemAttnCache(model.config)
        >>> for chunk in input_ids.split(128, dim=1):
        ...     logits = model(chunk, past_key_values=cache).logits
    """

    layers: list[MemAttnCacheLayer]

    def __init__(self, config: MemAttnConfig) -> None:
        self._setup(_empty_states(config))
        self._config = config

    def _setup(self, layers: Sequence[Mapping[str, PartState]]) -> None:
        super().__init__(layers=[MemAttnCacheLayer(parts) for parts in layers])
        self.position = 0
        self.seq_start: Tensor | None = None
        self.seq_end: Tensor | None = None
        self._config: MemAttnConfig | None = None  # of a model that it is known to fit

    def _like(self) -> "MemAttnCache":
        """An empty cache with the same layers."""
        other = object.__new__(MemAttnCache)
        other._setup([{n: s.fresh() for n, s in layer.parts.items()} for layer in self.layers])
        other._config = self._config
        return other

    def _states(self) -> Iterator[PartState]:
        """The states of all parts of all layers."""
        for layer in self.layers:
            yield from layer.parts.values()

    def check_fits(self, config: MemAttnConfig) -> None:
        """Raise ValueError unless the layers have the parts that the model has there."""
        if self._config is config:
            return
        wanted = _empty_states(config)
        if len(wanted) != len(self.layers):
            must("past_key_values", f"have {len(wanted)} layers", len(self.layers))
        for i, (layer, parts) in enumerate(zip(self.layers, wanted, strict=True)):
            own = layer.parts
            if own.keys() != parts.keys() or not all(own[n].fits(parts[n]) for n in own):
                expected = ", ".join(map(_describe, parts.values()))
                got = ", ".join(map(_describe, own.values()))
                must("past_key_values", f"be of {expected} in layer {i}", got)
        self._config = config

    @property
    def batch_size(self) -> int:
        """Rows of the batch, or -1 before the first call."""
        return -1 if self.seq_start is None else self.seq_start.shape[0]

    @property
    def nbytes(self) -> int:
        """Size of the state of all layers in bytes."""
        return sum(
            t.numel() * t.element_size() for state in self._states() for t in state.tensors()
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, the same for all layers."""
        return self.position

    def append_columns(
        self,
        batch_size: int,
        num_columns: int,
        attention_mask: Tensor | None,
        device: torch.device,
        max_length: int | None = None,
    ) -> None:
        """Move on by ``num_columns`` tokens, and give the state of each part its bounds.

        Called once at the beginning of a forward pass; each part then appends to its state.

        Args:
            batch_size: Rows of the batch, the same at every call.
            num_columns: New tokens in each row.
            attention_mask: ``[B, num_columns]``, or ``[B, position + num_columns]`` with all
                columns so far; None means no padding.
            device: Where the bounds are needed.
            max_length: Tokens that a sequence may have; None means any number.

        Raises:
            ValueError: If the batch size changed, a row's ones are not one contiguous block, the
                mask contradicts what the cache has seen, or a sequence becomes too long.
        """
        B, T, p = batch_size, num_columns, self.position
        start = torch.zeros(B, dtype=torch.long) if self.seq_start is None else self.seq_start
        end = torch.full((B,), OPEN) if self.seq_end is None else self.seq_end
        if start.shape[0] != B:
            must("past_key_values", f"have the batch size of the input, {B}", self.batch_size)
        first, last = torch.zeros(B, dtype=torch.long), torch.full((B,), T)
        if attention_mask is not None:
            check_mask(attention_mask, B, (T, p + T))
            if attention_mask.shape[1] != T:
                _check_past(attention_mask[:, :p].cpu(), start, end)
            first, last = (bound.cpu() for bound in block_bounds(attention_mask[:, -T:]))

        started, empty = start < p, first == last
        broken = started & ~empty & ((end != OPEN) | (first != 0))
        if broken.any():
            row = int(broken.nonzero()[0, 0])
            must("attention_mask", BLOCK, f"tokens behind padding in row {row}")
        # a row without tokens ends if it had begun, and else begins later; one whose tokens stop
        # before the last column ends there
        start = torch.where(started, start, p + first)
        end = torch.where(started & empty, end.clamp(max=p), end)
        end = torch.where(~empty & (last < T), p + last, end)
        if max_length is not None:
            check_longest(end.clamp(max=p + T) - start, max_length)
        self.seq_start, self.seq_end, self.position = start, end, p + T

        known: dict[tuple, SequenceBounds] = {}  # most layers are alike
        for state in self._states():
            kind = (state.kept, state.segment_len, state.window_size)
            if kind not in known:
                known[kind] = self._bounds(state, T, device)
            state.bounds = known[kind]
            state.begin()
        self._mark_visible()

    def _bounds(self, state: PartState, T: int, device: torch.device) -> SequenceBounds:
        """The rows' bounds in columns of the state's tokens, with the ``T`` new ones at the end."""
        assert self.seq_start is not None and self.seq_end is not None
        S = state.kept + T
        first_column = self.position - S
        start = (self.seq_start - first_column).to(torch.int32)
        end = (self.seq_end - first_column).clamp(max=S).to(torch.int32)
        whole = not start.any() if state.segment_len is not None else not (start > 0).any()
        return SequenceBounds(
            None if whole else start.to(device), None if (end == S).all() else end.to(device)
        )

    def _mark_visible(self) -> None:
        """Tell each state how many of the newest tokens later ones can see."""
        assert self.seq_start is not None and self.seq_end is not None
        first: dict[tuple, int] = {}
        for state in self._states():
            kind = (state.segment_len, state.window_size)
            if kind not in first:
                first[kind] = state.visible_from(self.position, self.seq_start, self.seq_end)
            state.keep = self.position - first[kind]
        for layer in self.layers:
            layer.position = self.position

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values to a layer, after ``append_columns``."""
        return self.layers[layer_idx].update(key_states, value_states)

    def reset(self, mask: Tensor | None = None) -> None:
        """Let sequences begin anew.

        Args:
            mask: bool ``[B]``, True for the rows that restart with the next token; the other rows
                go on. None empties the cache, which then takes any batch size.
        """
        if mask is None:
            self.__dict__.update(self._like().__dict__)
            return
        check_tensor("mask", mask)
        if self.seq_start is None or self.seq_end is None:
            must("mask", "be None for an empty cache", "a tensor")
        if mask.dtype != torch.bool:
            must("mask", "have dtype torch.bool", mask.dtype)
        check_shape("mask", mask, B=self.batch_size)
        mask = mask.cpu()
        self.seq_start = self.seq_start.masked_fill(mask, self.position)
        self.seq_end = self.seq_end.masked_fill(mask, OPEN)
        for state in self._states():
            state.reset(mask)
        self._trim()

    def _trim(self) -> None:
        """Drop what no later token can see, after rows changed."""
        if self.seq_start is not None:
            self._mark_visible()
            for state in self._states():
                state.trim()

    def _map(self, function: Any) -> "MemAttnCache":
        """A cache of the same kind with ``function`` applied to every tensor of every layer."""
        other = self._like()
        other.position, other.seq_start, other.seq_end = self.position, self.seq_start, self.seq_end
        for new, layer in zip(other.layers, self.layers, strict=True):
            new.parts = {name: state.apply(function) for name, state in layer.parts.items()}
            new.position = layer.position
        return other

    def detach(self) -> "MemAttnCache":
        """The same state without its autograd graph; it shares memory with this cache."""
        return self._map(Tensor.detach)

    def _select(self, rows: Tensor) -> "MemAttnCache":
        """A cache with the given rows of this one, in the given order."""
        other = self._map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
        if self.seq_start is not None and self.seq_end is not None:
            other.seq_start = self.seq_start[rows.cpu()]
            other.seq_end = self.seq_end[rows.cpu()]
        other._trim()
        return other

    def split(self, sizes: int | Sequence[int]) -> list["MemAttnCache"]:
        """Split the batch into caches of ``sizes`` rows each, as ``torch.split`` does."""
        if self.seq_start is None:
            must("cache", "hold sequences to be split", "an empty cache")
        rows = torch.arange(self.batch_size)
        parts = rows.split(sizes if isinstance(sizes, int) else list(sizes))
        return [self._select(part) for part in parts]

    @classmethod
    def merge(cls, caches: Sequence["MemAttnCache"]) -> "MemAttnCache":
        """Join the rows of caches of the same model into one batch, whatever their lengths.

        Raises:
            ValueError: If there is none, one is empty, or the layers differ.
        """
        if not caches:
            must("caches", "hold at least one cache", "none")
        position = max(cache.position for cache in caches)
        merged = caches[0]._like()
        layers = [layer.describe() for layer in merged.layers]
        starts, ends = [], []
        for cache in caches:
            if cache.seq_start is None or cache.seq_end is None:
                must("caches", "hold sequences", "an empty cache")
            if [layer.describe() for layer in cache.layers] != layers:
                must("caches", "have the same layers", "others")
            # the newest columns are aligned, so that shorter rows are padded on the left
            shift = position - cache.position
            starts.append(cache.seq_start + shift)
            ends.append(torch.where(cache.seq_end == OPEN, OPEN, cache.seq_end + shift))
        merged.position = position
        merged.seq_start, merged.seq_end = torch.cat(starts), torch.cat(ends)
        for i, layer in enumerate(merged.layers):
            for name, state in layer.parts.items():
                layer.parts[name] = state.merge([cache.layers[i].parts[name] for cache in caches])
        merged._trim()
        return merged

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by those that ``beam_idx [B]`` names, in place."""
        self.__dict__.update(self._select(beam_idx).__dict__)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows that ``indices`` names, in place."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, in place."""
        self.reorder_cache(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """Keep the whole past from now on, until ``crop``: for decoding that guesses ahead."""
        for state in self._states():
            state.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest columns, and then what no later token can see.

        Args:
            tokens_to_remove: The number of columns, as transformers counts: 0 or negative.

        Raises:
            ValueError: If it is positive, more than there are, or a part has dropped what is needed
                again; call ``activate_past_recording`` before the columns are added.
        """
        position = self.position + tokens_to_remove
        if not 0 <= position <= self.position:
            must("tokens_to_remove", f"be between {-self.position} and 0", tokens_to_remove)
        if self.seq_start is None or self.seq_end is None:
            return
        start = self.seq_start.clamp(max=position)
        end = torch.where(self.seq_end < position, self.seq_end, OPEN)
        removed = self.position - position
        for state in self._states():
            oldest = self.position - state.kept
            state.check_crop(removed, oldest, state.visible_from(position, start, end))
        self.seq_start, self.seq_end, self.position = start, end, position
        self._mark_visible()
        for state in self._states():
            state.crop(removed)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to one safetensors file, whole or not at all.

        Args:
            path: File to write; an earlier one is replaced at the end.

        Raises:
            ValueError: If the cache is empty.
        """
        if self.seq_start is None or self.seq_end is None:
            must("cache", "hold sequences to be saved", "an empty cache")
        layers = [layer.parts for layer in self.layers]
        write_cache(path, SavedCache(layers, self.position, self.seq_start, self.seq_end))

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
            ValueError: If it is damaged or no saved cache.
        """
        saved, cache = read_cache(path, device), object.__new__(cls)
        cache._setup(saved.layers)
        cache.position, cache.seq_start, cache.seq_end = saved[1:]
        cache._mark_visible()
        return cache


def _empty_states(config: MemAttnConfig) -> list[dict[str, PartState]]:
    """The empty state of each part of each layer of a model."""
    return [
        {name: part.new_state() for name, part in config.layer_parts(i).items()}
        for i in range(config.num_hidden_layers)
    ]


def _describe(state: PartState) -> str:
    """A state in words, with what is not None."""
    facts = {name: value for name, value in state.describe().items() if value is not None}
    kind = facts.pop("kind")
    inside = ", ".join(f"{name}={value}" for name, value in facts.items())
    return f"{kind or 'attention'}({inside})" if inside else kind or "attention"


def _check_past(past_mask: Tensor, start: Tensor, end: Tensor) -> None:
    """Raise unless the mask of earlier columns is the one that was seen."""
    columns = torch.arange(past_mask.shape[1])
    seen = (columns >= start[:, None]) & (columns < end[:, None])
    wrong = (past_mask != seen).any(1)
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        requirement = "agree with the past_key_values on earlier columns"
        must("attention_mask", requirement, f"others in row {row}")
