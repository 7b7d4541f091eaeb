"""Cached state of one part in one layer, kept between calls of the model."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn.checks import must

OPEN_END = 1 << 62  # the end of a row that may still grow
ROOM = 64  # least number of entries by which a token tensor's buffer grows


class SequenceBounds(NamedTuple):
    """First and last column of sequences among the keys of a layer; None means all columns."""

    seq_start: Tensor | None  # int32 [B]
    seq_end: Tensor | None  # int32 [B]


class Room(NamedTuple):
    """The buffer of a token tensor, with free space after it."""

    buffer: Tensor
    view: Tensor
    end: int  # used entries of the buffer


class PartState:
    """Named tensors of two kinds, with the batch on axis 0.

    A *token* tensor has one entry per token on its second-to-last axis (keys ``[B, H, S, D]``,
    inputs ``[B, S, E]``). ``append`` extends it. Entries that no later token can see, given the
    segment and the window, are dropped. A *row* tensor has one entry per sequence (a recurrent
    memory). ``read`` returns it, with the initial value in rows that restart, and ``write``
    replaces it. A crop cuts token tensors. It restores a row tensor from the history that ``write``
    recorded; without a history a crop is refused. A part that needs more defines a subclass.

    Args:
        kind: The part that it belongs to.
        segment_len: Segment length of the attention, or None.
        window_size: Window of the attention, or None.
    """

    # exporters of transformers cast and rebuild all that ``__dict__`` leads to; what belongs to a
    # call, to the CPU or to the modules is elsewhere
    _CALL = ("_room", "_before", "_restarting", "restart", "floor", "bounds", "start")
    __slots__ = ("__dict__", "__weakref__", *_CALL)

    def __init__(
        self, kind: str, segment_len: int | None = None, window_size: int | None = None
    ) -> None:
        self.kind = kind
        self.segment_len = segment_len
        self.window_size = window_size
        self.record_past = False  # also keep entries that no later token can see, until a crop
        self._clear()

    def _clear(self) -> None:
        self.tokens: dict[str, Tensor] = {}
        self._room: dict[str, Room] = {}
        self.rows: dict[str, Tensor] = {}
        # [B, 1 + T, ...], value of a row tensor at each column
        self.history: dict[str, Tensor] = {}
        self.restart: Tensor | None = None  # bool [B], rows that start with the next call
        self._restarting: Tensor | None = None  # rows that start with this call
        self._before: dict[str, Tensor] = {}
        self.keep = 0  # number of newest tokens that later ones can see, set by the cache
        # int64 [B], first column of each row's kept tokens, once rows have moved; earlier columns
        # are padding. Set by the cache.
        self.floor: Tensor | None = None
        self.bounds = SequenceBounds(None, None)  # of this call, set by the cache
        # column in which all rows start, if they share one; set by the cache
        self.start: int | None = None
        self.lead = 0  # entries that this call puts before the kept ones

    def fresh(self) -> "PartState":
        """An empty state of the same part."""
        other = copy.copy(self)
        other._clear()
        return other

    def describe(self) -> dict[str, Any]:
        """Arguments that create an empty state, as plain values."""
        return dict(kind=self.kind, segment_len=self.segment_len, window_size=self.window_size)

    def __str__(self) -> str:
        facts = {name: value for name, value in self.describe().items() if value is not None}
        kind = facts.pop("kind") or "attention"
        inside = ", ".join(f"{name}={value}" for name, value in facts.items())
        return f"{kind}({inside})" if inside else kind

    def fits(self, other: "PartState") -> bool:
        """Whether this is a state of the same part; files of format 1 do not name the part."""
        own, theirs = self.describe(), other.describe()
        if not own["kind"]:
            own["kind"] = theirs["kind"]
        return own == theirs

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the state."""
        yield from self.tokens.values()
        yield from self.rows.values()
        yield from self.history.values()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, including free buffer space."""
        rooms = (self._room.get(name) for name in self.tokens)
        held = [
            tensor if room is None or room.view is not tensor else room.buffer
            for room, tensor in zip(rooms, self.tokens.values(), strict=True)
        ]
        held += [*self.rows.values(), *self.history.values()]
        return sum(t.numel() * t.element_size() for t in held)

    @property
    def kept(self) -> int:
        """Number of kept tokens."""
        return next((t.shape[-2] for t in self.tokens.values()), 0)

    @property
    def most_kept(self) -> int | None:
        """The most tokens of a sequence that goes on which later ones can see; None means all."""
        if self.segment_len is None and self.window_size is None:
            return None
        return max(self.segment_len or 1, self.window_size or 1) - 1

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[B, Hkv, T, D]``; return all kept ones, including the new."""
        return self.append("key", key_states), self.append("value", value_states)

    def append(self, name: str, states: Tensor) -> Tensor:
        """Append ``[B, ..., T, F]`` to a token tensor; return all kept entries and the new ones."""
        if name in self.tokens:
            past = self.tokens[name]
            self._check(name, past[..., :0, :], states[..., :0, :])
            if _may_write(past, states):
                n = states.shape[-2]
                found = self.extend(name, n)
                found[..., found.shape[-2] - n :, :].copy_(states)
                self.compact(name)
                return found
            states = torch.cat([past, states], dim=-2)
        self.tokens[name] = states
        self._drop_unseen(name)
        return states

    def extend(self, name: str, n: int, empty: Tensor | None = None) -> Tensor:
        """Extend a token tensor by ``n`` entries at its end, which the caller then writes.

        Its buffer has free space, so most calls copy nothing. Tensors returned earlier do not
        change. Only without gradients. Call ``compact`` after writing the entries.

        Args:
            name: Its name.
            n: Number of entries.
            empty: ``[B, ..., 0, F]``, used if the state has no such tensor yet.
        """
        past = self.tokens[name] if empty is None else self.tokens.get(name, empty)
        room = self._room.get(name)
        # compared by identity: another tensor in its place has no free space after it
        if room is not None and not torch.is_inference_mode_enabled():
            room = None if room.buffer.is_inference() else room
        if room is None or room.view is not past or room.end + n > room.buffer.shape[-2]:
            kept = past.shape[-2]
            shape = (*past.shape[:-2], kept + n + max(ROOM, kept // 4), past.shape[-1])
            room = Room(past.new_empty(shape), past, kept)
            room.buffer[..., :kept, :].copy_(past)
        end = room.end + n
        first = end - n - past.shape[-2]
        found = view = room.buffer.narrow(-2, first, end - first)
        if not self.record_past and end - self.keep > first:
            view = room.buffer.narrow(-2, end - self.keep, self.keep)
        self.tokens[name] = view
        self._room[name] = Room(room.buffer, view, end)
        return found

    def _drop_unseen(self, name: str) -> None:
        """Drop of a token tensor that was replaced what no later token can see."""
        self._room.pop(name, None)
        if torch.compiler.is_exporting():
            self.tokens[name] = self._kept_in_program(self.tokens[name])
        elif not self.record_past:
            self._trim(name)

    def _kept_in_program(self, tokens: Tensor) -> Tensor:
        """What a program of ``torch.export`` keeps, as many whatever the lengths are.

        Rows that end before the newest column are moved there.
        """
        n, S, end = self.most_kept, tokens.shape[-2], self.bounds.seq_end
        if end is not None:
            n = S if n is None else n
            column = torch.arange(n, device=end.device) - n + (end - self.lead)[:, None]
            return take_tokens(tokens, column.clamp(min=0).long())
        return tokens if n is None else F.pad(tokens, (0, 0, n, 0))[..., S:, :]

    def compact(self, name: str) -> None:
        """Free the memory of entries that no later token sees, if they are most of the buffer."""
        room = self._room.get(name)
        if room is not None and room.buffer.shape[-2] > 2 * (room.view.shape[-2] + ROOM):
            self.tokens[name] = room.view.clone()
            del self._room[name]

    def read(self, name: str, initial: Tensor) -> Tensor:
        """A row tensor ``[B, ...]`` before this call.

        Args:
            name: Its name.
            initial: ``[B, ...]``, the values of rows that start.
        """
        value = self.rows.get(name, initial)
        if value is not initial:
            self._check(name, value, initial)
        if self._restarting is not None:
            mask = self._restarting.to(value.device).view(-1, *[1] * (value.dim() - 1))
            value = torch.where(mask, initial, value)
        self._before[name] = value
        return value

    def write(self, name: str, value: Tensor, history: Tensor | None = None) -> None:
        """Replace a row tensor, after ``read``.

        Args:
            name: Its name.
            value: ``[B, ...]`` after the last token.
            history: ``[B, T, ...]``, its values after each of the new tokens, from which a crop
                restores it. Kept only while the past is recorded.
        """
        before = self._before.pop(name)[:, None]
        if self.record_past and history is not None:
            first = self.history.get(name, before)
            self.history[name] = torch.cat([first, history], 1)
        # a view, such as the last of several values, would keep all of them in memory
        self.rows[name] = value.clone() if value._is_view() else value

    def _check(self, name: str, past: Tensor, states: Tensor) -> None:
        if past.shape != states.shape:
            what = f"have {name} of {self.kind or 'attention'} of shape {list(states.shape)}"
            must("past_key_values", f"{what} as in this model", list(past.shape))

    def place(self, seq_start: Tensor, position: int) -> None:
        """Start a call: its first column is ``position``; rows start at ``seq_start`` ``[B]``."""

    def begin(self) -> None:
        """Start a call: rows that were reset get their initial values."""
        self._restarting, self.restart = self.restart, None

    def reset(self, mask: Tensor) -> None:
        """Restart the rows in ``mask`` (bool ``[B]``) with the next call."""
        if self.rows:
            self.restart = mask if self.restart is None else self.restart | mask

    def apply(self, function: Callable[[Tensor], Tensor]) -> "PartState":
        """A state of the same part with ``function`` applied to every tensor."""
        other = self.fresh()
        for name in ("tokens", "rows", "history"):
            setattr(other, name, {k: function(v) for k, v in getattr(self, name).items()})
        other.restart = None if self.restart is None else function(self.restart)
        other.floor = None if self.floor is None else function(self.floor).cpu()
        other.keep = self.keep
        return other

    def first_kept(self, position: int, batch_size: int) -> Tensor:
        """First column (of ``position``) whose token is kept, int64 ``[B]``."""
        oldest = torch.full((batch_size,), position - self.kept)
        return oldest if self.floor is None else self.floor.maximum(oldest)

    @classmethod
    def merge(cls, states: "list[PartState]") -> "PartState":
        """Concatenate the rows of several states of one part, aligned at the newest token."""
        merged = states[0].fresh()
        kept = max(state.kept for state in states)
        for name in states[0].tokens:
            parts = [state.tokens[name] for state in states]
            merged.tokens[name] = torch.cat(
                [F.pad(t, (0, 0, kept - t.shape[-2], 0)) for t in parts]
            )
        for name in states[0].rows:
            merged.rows[name] = torch.cat([state.rows[name] for state in states])
        if any(state.restart is not None for state in states):
            sizes = [len(next(state.tensors())) for state in states]
            masks = [s.restart for s in states]
            merged.restart = torch.cat(
                [
                    torch.zeros(n, dtype=torch.bool) if mask is None else mask
                    for n, mask in zip(sizes, masks, strict=True)
                ]
            )
        return merged

    def realign(self, seq_start: Tensor, position: int) -> None:
        """Update after rows were merged or moved; they now start at ``seq_start`` ``[B]``."""

    def trim(self) -> None:
        """Drop entries of tokens that no later token can see, and free their memory."""
        for name in self.tokens:
            self._trim(name)

    def _trim(self, name: str) -> None:
        drop = self.tokens[name].shape[-2] - self.keep
        if drop > 0:
            self.tokens[name] = self.tokens[name][..., drop:, :].clone()
            self._room.pop(name, None)

    def move(self, by: Tensor) -> None:
        """Move the token entries of each row to the right by ``by`` int64 ``[B]`` columns.

        Entries that would move out on the right are dropped; negative moves keep all entries.
        """
        room = max(int(-by.min()), 0)
        for name, states in self.tokens.items():
            self.tokens[name] = _moved(F.pad(states, (0, 0, room, 0)), by, -2)
            self._room.pop(name, None)
        for name, past in self.history.items():
            self.history[name] = _moved(past, by, 1)

    def check_crop(
        self, num_columns: int, position: int, lacks: bool, counts: Tensor | None = None
    ) -> None:
        """Raise unless the newest columns can be removed.

        Args:
            num_columns: Number of columns to remove.
            position: Number of columns so far.
            lacks: Whether a row would need a token that is not kept.
            counts: int64 ``[B]``, number of these columns that hold tokens, if rows have holes.
        """
        if self.tokens and lacks:
            why = "leave what later tokens see (see activate_past_recording)"
            must("tokens_to_remove", why, -num_columns)
        removed = num_columns if counts is None else int(counts.max())
        for name in self._restored():
            past = self.history[name].shape[1] - 1 if name in self.history else 0
            if removed > past:
                why = f"be at least {-past}, what {self.kind} has recorded"
                must("tokens_to_remove", f"{why} (see activate_past_recording)", -removed)

    def _restored(self) -> Iterable[str]:
        """Names of the row tensors that a crop restores from their history."""
        return self.rows

    def crop(self, num_columns: int, counts: Tensor | None = None) -> None:
        """Remove the newest columns, then drop entries that no later token can see.

        With ``counts``, as in ``check_crop``, the remaining entries have been moved into place.
        """
        rest = self.kept - num_columns
        for name, states in self.tokens.items():
            self.tokens[name] = states[..., :rest, :]
        for name, past in self.history.items():
            self.rows[name] = past[:, -1 - num_columns].clone()
        self.history = {}
        self.trim()

    def visible_from(self, position: int, start: Tensor, end: Tensor) -> Tensor:
        """First column that a token at column ``position`` or later can see, int64 ``[B]``.

        In a row that has ended, ``position`` is the column after its last token.
        """
        begins = end.clamp(max=position)
        length = begins - start  # tokens in the sequence of each row
        if self.segment_len is None and self.window_size is None:
            return start
        near = [begins]
        if self.segment_len is not None:
            near.append(start + length // self.segment_len * self.segment_len)
        if self.window_size is not None:
            near.append(begins - self.window_size + 1)
        return torch.stack(near).amin(0).maximum(start)


def take_tokens(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens ``[B, ..., S, F]`` at the places int64 ``[B, n]`` of each row."""
    shape = (places.shape[0], *[1] * (tokens.dim() - 3), places.shape[1], 1)
    index = places.view(shape).to(tokens.device)
    return tokens.gather(-2, index.expand(*tokens.shape[:-2], -1, tokens.shape[-1]))


def _moved(x: Tensor, by: Tensor, dim: int) -> Tensor:
    """``x [B, ...]`` moved to the right in each row; new entries repeat the edge."""
    x = x.movedim(dim, 1)
    place = torch.arange(x.shape[1], device=x.device) - by.to(x.device)[:, None]
    index = place.clamp(0, max(x.shape[1] - 1, 0))
    index = index.view(*index.shape, *[1] * (x.dim() - 2)).expand(x.shape)
    return x.gather(1, index).movedim(1, dim)


def _may_write(past: Tensor, states: Tensor) -> bool:
    """Whether new entries can be written after the kept ones without copying."""
    # with gradients on, tensors returned earlier may be saved for a backward
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return past.dtype == states.dtype and past.device == states.device
