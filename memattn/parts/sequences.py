"""Cached state of a batch between calls: the states of all parts, and positions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memattn.checks import check_shape, check_tensor, must
from memattn.parts.exported_states import FlatStates, WalkedLayers, append_in_program
from memattn.parts.layer_states import LayerStates, same_parts
from memattn.parts.padding import check_longest, check_mask, read_mask
from memattn.parts.state import OPEN_END, PartState, SequenceBounds
from memattn.parts.token_order import TokenOrder

if TYPE_CHECKING:
    from typing_extensions import Self


class SequenceStates(WalkedLayers):
    """The states of all parts of all layers, and the first and last column of each row's sequence.

    A row may lack a token in any column, but its kept tokens are contiguous: a row that continues
    after columns without tokens is first moved to the newest column.

    Args:
        layers: For each layer, the empty states of its parts by name.

    Attributes:
        position: Columns seen so far, including padding; the column of the next token.
        seq_start: int64 ``[B]`` on the CPU, the column where each row's sequence begins, or None
            before the first call.
        seq_end: int64 ``[B]`` on the CPU, the column where it ended, if it has.
        columns: bool ``[B, position]`` on the CPU, the columns in which the caller gave tokens;
            None if these are the columns from ``seq_start`` to ``seq_end``. See ``present``.
        has_padding: Whether some row lacks a token in some column of the last call.
        ends_early: Whether some row's last token is before the last column of that call.
        order: The order in which the parts get the columns of the last call; None means unchanged.
    """

    # not in ``__dict__``, as in ``PartState``
    ASIDE = ("seq_start", "seq_end", "columns", "order", "flat", "untrimmed")
    __slots__ = ("__dict__", "__weakref__", *ASIDE)

    def __init__(self, layers: Sequence[Mapping[str, PartState]]) -> None:
        self._setup(layers)

    def _setup(self, layers: Sequence[Mapping[str, PartState]]) -> None:
        self._begin_walk()
        self.layers = [LayerStates(parts) for parts in layers]
        self._empty()

    def _empty(self) -> None:
        self.position = 0
        self.seq_start: Tensor | None = None
        self.seq_end: Tensor | None = None
        self.columns: Tensor | None = None
        self.has_padding = self.ends_early = False
        self.order: TokenOrder | None = None
        self.in_program = False
        self.flat: FlatStates | None = None

    def _like(self) -> "Self":
        """An empty cache with the same layers."""
        other = object.__new__(type(self))
        other._setup([{n: s.fresh() for n, s in layer.parts.items()} for layer in self.layers])
        return other

    def _states(self) -> Iterator[PartState]:
        """The states of all parts of all layers."""
        for layer in self.layers:
            yield from layer.parts.values()

    def begin_at(self, device: torch.device) -> Tensor | None:
        """Where rows begin, in columns since the first call; None where all do in the first."""
        start = self.seq_start
        if start is None or not (self.in_program or start.any()):
            return None
        return start.to(device)

    @property
    def batch_size(self) -> int:
        """Rows of the batch, or -1 before the first call."""
        return -1 if self.seq_start is None else self.seq_start.shape[0]

    def check_layers(self, wanted: Sequence[Mapping[str, PartState]]) -> None:
        """Raise ValueError unless the layers have exactly these parts."""
        if len(wanted) != len(self.layers):
            must("past_key_values", f"have {len(wanted)} layers", len(self.layers))
        for i, (layer, parts) in enumerate(zip(self.layers, wanted, strict=True)):
            if not same_parts(layer.parts, parts):
                expected = ", ".join(map(str, parts.values()))
                got = ", ".join(map(str, layer.parts.values()))
                must("past_key_values", f"be of {expected} in layer {i}", got)

    def append_columns(
        self,
        batch_size: int,
        num_columns: int,
        attention_mask: Tensor | None,
        device: torch.device,
        max_length: int | None = None,
    ) -> None:
        """Advance by ``num_columns`` tokens, and give the state of each part its bounds.

        Called once at the beginning of a forward pass; each part then appends to its state.

        Args:
            batch_size: Rows of the batch, the same at every call.
            num_columns: New tokens in each row.
            attention_mask: ``[B, num_columns]``, or ``[B, position + num_columns]`` for all columns
                so far; None means no padding.
            device: Where the bounds are needed.
            max_length: Maximum tokens of a sequence; None means no limit.

        Raises:
            ValueError: If the batch size changed, the mask contradicts what the cache has seen, or
                a sequence becomes too long.
        """
        B, T, p = batch_size, num_columns, self.position
        self.order = self.flat = None
        if torch.compiler.is_exporting():
            append_in_program(self, B, T, attention_mask, device)
            return
        if self._goes_on(B, T, attention_mask, max_length):
            self.position += T
            self.has_padding = self.ends_early = False
            self._begin_states(T, device)
            return
        if self.seq_start is not None and len(self.seq_start) != B:
            must("past_key_values", f"have the batch size of the input, {B}", self.batch_size)
        self._close_gaps()
        start = torch.zeros(B, dtype=torch.long) if self.seq_start is None else self.seq_start
        first, last = torch.zeros(B, dtype=torch.long), torch.full((B,), T)
        order = None
        if attention_mask is not None:
            check_mask(attention_mask, B, (T, p + T))
            new = attention_mask.shape[1] - T
            if new:
                self._follow_past(attention_mask[:, :new].cpu())
                start = start if self.seq_start is None else self.seq_start
            begun = (start < p).to(attention_mask.device) if p else None
            first, last, order = read_mask(attention_mask[:, new:], begun)
            first, last = first.cpu(), last.cpu()

        started, empty = start < p, first == last
        # a row without tokens starts or continues later; a row whose tokens stop before the last
        # column ends there until it continues
        start = torch.where(started, start, p + first)
        end = torch.where(started & empty, p, OPEN_END)
        end = torch.where(~empty & (last < T), p + last, end)
        if max_length is not None:
            check_longest(end.clamp(max=p + T) - start, max_length)
        if order is not None or self.columns is not None:
            present = torch.ones(B, T, dtype=torch.bool)
            if attention_mask is not None:
                present = attention_mask[:, attention_mask.shape[1] - T :].cpu() != 0
            self.columns = torch.cat([self.present, present], 1) if p else present
        self.seq_start, self.seq_end, self.position = start, end, p + T
        self.order = order
        self.ends_early = bool((last < T).any()) or order is not None
        self.has_padding = self.ends_early or bool((first > 0).any())
        self._begin_states(T, device)

    def _goes_on(self, B: int, T: int, mask: Tensor | None, max_length: int | None) -> bool:
        """Whether all rows started in the first column and continue without padding, as usual."""
        p, start, end = self.position, self.seq_start, self.seq_end
        if not p or start is None or end is None or len(start) != B or start.any():
            return False
        if self.columns is not None:
            return False
        if not (end == OPEN_END).all() or (max_length is not None and p + T > max_length):
            return False
        if mask is None:
            return True
        check_mask(mask, B, (T, p + T))
        return bool((mask == 1).all())

    def _close_gaps(self) -> None:
        """Move rows that have ended to the newest column, where their next tokens are added."""
        if self.seq_start is None or self.seq_end is None:
            return
        by = (self.position - self.seq_end).clamp(min=0)
        if by.any():
            self.columns = self.present
            self._move(by)
            self.seq_start = self.seq_start + by
            for state in self._states():
                state.realign(self.seq_start, self.position)
        self.seq_end = torch.full_like(by, OPEN_END)

    def _move(self, by: Tensor) -> None:
        """Move the kept tokens of each row to the right by ``by`` int64 ``[B]`` columns."""
        for state in self._states():
            floor = state.first_kept(self.position, len(by)) + by
            state.move(by)
            state.floor = floor

    @property
    def present(self) -> Tensor:
        """bool ``[B, position]``, the columns in which the caller gave tokens."""
        if self.columns is not None:
            return self.columns
        assert self.seq_start is not None and self.seq_end is not None
        column = torch.arange(self.position)
        return (column >= self.seq_start[:, None]) & (column < self.seq_end[:, None])

    def _follow_past(self, past_mask: Tensor) -> None:
        """Drop the newest tokens of rows that the mask of earlier columns no longer marks.

        Raises:
            ValueError: If the mask differs elsewhere, or tokens that are needed again were dropped.
        """
        given, kept = self.present, past_mask != 0
        if torch.equal(given, kept):
            return
        gone = given & ~kept
        wrong = ((kept & ~given) | (kept & gone.cumsum(1).bool())).any(1)
        if wrong.any():
            row = int(wrong.nonzero()[0, 0])
            requirement = "agree with the past_key_values on earlier columns"
            must("attention_mask", requirement, f"others in row {row}")
        try:
            self._forget(0, gone.sum(1))
        except ValueError as error:
            why = "have the tokens that past_key_values has seen, or its past be recorded before"
            must("attention_mask", f"{why} ({error})", "a row without its last ones")
        self.columns = kept

    def _begin_states(self, T: int, device: torch.device) -> None:
        """Give the state of each part the bounds of this call."""
        start = self.seq_start
        assert start is not None
        alike = int(start[0]) if len(start) and bool((start == start[0]).all()) else None
        known: dict[tuple[int | None, ...], SequenceBounds] = {}  # most layers have the same bounds
        for state in self._states():
            state.place(start, self.position - T)
            kind = (state.kept, state.segment_len, state.window_size, state.lead)
            if kind not in known:
                known[kind] = self._bounds(state, T, device)
            state.bounds, state.start = known[kind], alike
            state.begin()
        self._mark_visible()

    def _bounds(self, state: PartState, T: int, device: torch.device) -> SequenceBounds:
        """The rows' bounds in columns of the state's tokens, ``T`` new ones at the end included."""
        assert self.seq_start is not None and self.seq_end is not None
        S = state.lead + state.kept + T
        first_column = self.position - S
        start = (self.seq_start - first_column).to(torch.int32)
        end = (self.seq_end - first_column).clamp(max=S).to(torch.int32)
        whole = not start.any() if state.segment_len is not None else not (start > 0).any()
        return SequenceBounds(
            None if whole else start.to(device), None if (end == S).all() else end.to(device)
        )

    def _mark_visible(self) -> None:
        """Set in each state how many of its newest tokens later ones can see."""
        assert self.seq_start is not None and self.seq_end is not None
        first: dict[tuple[int | None, ...], int] = {}
        for state in self._states():
            kind = (state.segment_len, state.window_size)
            if kind not in first:
                visible = state.visible_from(self.position, self.seq_start, self.seq_end)
                first[kind] = int(visible.min()) if len(visible) else self.position
            state.keep = self.position - first[kind]
        for layer in self.layers:
            layer.position = self.position

    def reset(self, mask: Tensor | None = None) -> None:
        """Restart sequences.

        Args:
            mask: bool ``[B]``, True for rows that restart with the next token; the other rows
                continue. None empties the cache, which then takes any batch size.
        """
        if mask is None:
            self._become(self._like())
            return
        check_tensor("mask", mask)
        if self.seq_start is None or self.seq_end is None:
            must("mask", "be None for an empty cache", "a tensor")
        if mask.dtype != torch.bool:
            must("mask", "have dtype torch.bool", mask.dtype)
        check_shape("mask", mask, B=self.batch_size)
        mask = mask.cpu()
        self.seq_start = self.seq_start.masked_fill(mask, self.position)
        self.seq_end = self.seq_end.masked_fill(mask, OPEN_END)
        if self.columns is not None:
            self.columns = self.columns & ~mask[:, None]
        for state in self._states():
            state.reset(mask)
        self._trim()

    def _trim(self) -> None:
        """Drop tokens that no later token can see, after rows changed."""
        if self.seq_start is not None:
            self._mark_visible()
            for state in self._states():
                state.trim()

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Self":
        """A cache of the same kind with ``function`` applied to every tensor of every layer."""
        other = self._like()
        other.position, other.seq_start, other.seq_end = self.position, self.seq_start, self.seq_end
        other.columns = self.columns
        for new, layer in zip(other.layers, self.layers, strict=True):
            new.parts = {name: state.apply(function) for name, state in layer.parts.items()}
            new.position = layer.position
        return other

    def _select(self, rows: Tensor) -> "Self":
        """A cache with the given rows of this one, in the given order."""
        other = self._map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
        if self.seq_start is not None and self.seq_end is not None:
            other.seq_start = self.seq_start[rows.cpu()]
            other.seq_end = self.seq_end[rows.cpu()]
            other.columns = None if self.columns is None else self.columns[rows.cpu()]
        other._trim()
        return other

    def _become(self, other: "SequenceStates") -> None:
        """Take the state of another cache with the same layers."""
        for name in (*vars(other), *self.ASIDE):
            setattr(self, name, getattr(other, name))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by rows ``beam_idx [B]``, in place."""
        self._become(self._select(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows ``indices``, in place."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, in place."""
        self.reorder_cache(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    @property
    def records_past(self) -> bool:
        """Whether all tokens are kept until ``crop``."""
        return any(state.record_past for state in self._states())

    def activate_past_recording(self) -> None:
        """Keep all tokens from now on until ``crop``: for speculative decoding."""
        for state in self._states():
            state.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest columns, then drop tokens that no later token can see.

        Args:
            tokens_to_remove: The number of columns in transformers' convention: 0 or negative.

        Raises:
            ValueError: If it is positive, exceeds the number of columns, or a part has dropped
                tokens that are needed again; call ``activate_past_recording`` before adding the
                columns.
        """
        position = self.position + tokens_to_remove
        if not 0 <= position <= self.position:
            must("tokens_to_remove", f"be between {-self.position} and 0", tokens_to_remove)
        if self.seq_start is None or self.seq_end is None:
            return
        self._close_gaps()
        removed = self.position - position
        self._forget(removed, None if self.columns is None else self.columns[:, position:].sum(1))

    def _forget(self, removed: int, counts: Tensor | None) -> None:
        """Remove the newest columns, or the newest ``counts`` int64 ``[B]`` tokens of each row.

        Rows whose tokens then do not end at the newest column are moved there.
        """
        start, position = self.seq_start, self.position - removed
        assert start is not None
        end, by = torch.full_like(start, OPEN_END), torch.zeros_like(start)
        if counts is None:
            start = start.clamp(max=position)
        else:
            by = counts - removed
            start = start + by
        for state in self._states():
            needed = state.visible_from(position, start, end) - by
            # a row without remaining tokens needs none
            needed = torch.where(start < position, needed, self.position)
            lacks = bool((needed < state.first_kept(self.position, len(by))).any())
            state.check_crop(removed, self.position, lacks, counts)
        if counts is not None:
            self.columns = self.present[:, :position]
            if by.any():
                self._move(by)
        self.seq_start, self.seq_end, self.position = start, end, position
        self._mark_visible()
        for state in self._states():
            state.crop(removed, counts)
            if by.any():
                state.realign(start, position)
