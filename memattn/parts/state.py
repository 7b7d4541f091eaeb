"""What a sequence keeps of one part in one layer, between calls of the model."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn.checks import must

OPEN_END = 1 << 62  # the end of a row that may still grow
ROOM = 64  # entries, at least, that a token tensor is given room for


class SequenceBounds(NamedTuple):
    """Where sequences begin and end, in columns of the keys of a layer; None means everywhere."""

    seq_start: Tensor | None  # int32 [B]
    seq_end: Tensor | None  # int32 [B]


class Room(NamedTuple):
    """A token tensor that is the last part of a longer one, which has room behind it."""

    buffer: Tensor
    view: Tensor
    end: int  # entries of the buffer that are taken


class PartState:
    """Tensors by name, with the batch on axis 0 of each, of two kinds.

    A *token* tensor has one entry per token on its last axis but one (keys ``[B, H, S, D]``,
    inputs ``[B, S, E]``). ``append`` extends it; what no later token can see, given the segment and
    the window, is dropped. A *row* tensor has one entry per sequence (a recurrent memory). ``read``
    gives it, with the initial value in rows that begin anew, and ``write`` replaces it. A crop cuts
    token tensors; a row tensor is restored from the history that ``write`` was given since
    recording began, and without one a crop is refused. A part that needs more derives a class.

    Args:
        kind: The part that it belongs to.
        segment_len: Segment length that its tokens are seen in, or None.
        window_size: Window that its tokens are seen in, or None.
    """

    def __init__(
        self, kind: str, segment_len: int | None = None, window_size: int | None = None
    ) -> None:
        self.kind = kind
        self.segment_len = segment_len
        self.window_size = window_size
        self.record_past = False  # keep also what no later token can see, until cropped
        self._clear()

    def _clear(self) -> None:
        self.tokens: dict[str, Tensor] = {}
        self._room: dict[str, Room] = {}
        self.rows: dict[str, Tensor] = {}
        self.history: dict[str, Tensor] = {}  # [B, 1 + T, ...], values of rows at each column
        self.restart: Tensor | None = None  # bool [B], rows that begin with the next call
        self._restarting: Tensor | None = None  # those that begin with this call
        self._before: dict[str, Tensor] = {}
        self.keep = 0  # newest tokens that later ones can see, set by the cache
        # int64 [B], columns from which on the tokens kept are those of each row, once rows have
        # moved; what stands before is padding. Set by the cache.
        self.floor: Tensor | None = None
        self.bounds = SequenceBounds(None, None)  # of this call, set by the cache
        self.start: int | None = None  # column where all rows begin, if one, set by the cache
        self.lead = 0  # entries that this call puts before those kept

    def fresh(self) -> "PartState":
        """An empty one of the same part."""
        other = copy.copy(self)
        other._clear()
        return other

    def describe(self) -> dict[str, Any]:
        """Arguments that make an empty one, as plain values."""
        return dict(kind=self.kind, segment_len=self.segment_len, window_size=self.window_size)

    def __str__(self) -> str:
        facts = {name: value for name, value in self.describe().items() if value is not None}
        kind = facts.pop("kind") or "attention"
        inside = ", ".join(f"{name}={value}" for name, value in facts.items())
        return f"{kind}({inside})" if inside else kind

    def fits(self, other: "PartState") -> bool:
        """Whether this is a state of the same part; files of the first format name no part."""
        own, theirs = self.describe(), other.describe()
        if not own["kind"]:
            own["kind"] = theirs["kind"]
        return own == theirs

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is kept."""
        yield from self.tokens.values()
        yield from self.rows.values()
        yield from self.history.values()

    @property
    def nbytes(self) -> int:
        """Size of everything that is kept in bytes, with the room behind it."""
        rooms = (self._room.get(name) for name in self.tokens)
        held = [
            tensor if room is None or room.view is not tensor else room.buffer
            for room, tensor in zip(rooms, self.tokens.values(), strict=True)
        ]
        held += [*self.rows.values(), *self.history.values()]
        return sum(t.numel() * t.element_size() for t in held)

    @property
    def kept(self) -> int:
        """Tokens that are kept."""
        return next((t.shape[-2] for t in self.tokens.values()), 0)

    @property
    def most_kept(self) -> int | None:
        """The most tokens of a sequence that goes on which later ones can see; None means all."""
        if self.segment_len is None and self.window_size is None:
            return None
        return max(self.segment_len or 1, self.window_size or 1) - 1

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[B, Hkv, T, D]``, and return them behind those kept."""
        return self.append("key", key_states), self.append("value", value_states)

    def append(self, name: str, states: Tensor) -> Tensor:
        """Append ``[B, ..., T, F]`` to a token tensor, and return it behind what was kept."""
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
        """A token tensor that is kept with ``n`` more entries at its end, for the caller to write.

        It has room for more, so that most calls copy nothing. What was returned earlier stays as it
        was. Without gradients only. ``compact`` is called when they are written.

        Args:
            name: Its name.
            n: Number of entries.
            empty: Stands for what is kept where nothing is, ``[B, ..., 0, F]``.
        """
        past = self.tokens[name] if empty is None else self.tokens.get(name, empty)
        room = self._room.get(name)
        # kept by identity: whatever else replaced the tensor has no room behind it
        if room is not None and not torch.is_inference_mode_enabled():
            room = None if room.buffer.is_inference() else room
        if room is None or room.view is not past or room.end + n > room.buffer.shape[-2]:
            kept = past.shape[-2]
            shape = (*past.shape[:-2], kept + n + max(ROOM, kept // 4), past.shape[-1])
            room = Room(past.new_empty(shape), past, kept)
            room.buffer[..., :kept, :].copy_(past)
        end = room.end + n
        first = end - n - past.shape[-2]
        found = room.buffer[..., first:end, :]
        if not self.record_past:
            first = max(first, end - self.keep)
        self.tokens[name] = view = room.buffer[..., first:end, :]
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
        """Give back the memory of entries that no later token sees, where it is most of it."""
        room = self._room.get(name)
        if room is not None and room.buffer.shape[-2] > 2 * (room.view.shape[-2] + ROOM):
            self.tokens[name] = room.view.clone()
            del self._room[name]

    def read(self, name: str, initial: Tensor) -> Tensor:
        """A row tensor ``[B, ...]`` as it was before this call.

        Args:
            name: Its name.
            initial: ``[B, ...]``, the values of rows that begin.
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
        # a view, such as the last of all values, would keep the whole in memory
        self.rows[name] = value.clone() if value._is_view() else value

    def _check(self, name: str, past: Tensor, states: Tensor) -> None:
        if past.shape != states.shape:
            what = f"have {name} of {self.kind or 'attention'} of shape {list(states.shape)}"
            must("past_key_values", f"{what} as in this model", list(past.shape))

    def place(self, seq_start: Tensor, position: int) -> None:
        """A call begins: its first column is ``position``, rows begin at ``seq_start`` ``[B]``."""

    def begin(self) -> None:
        """A call begins: rows that were reset get their initial values in it."""
        self._restarting, self.restart = self.restart, None

    def reset(self, mask: Tensor) -> None:
        """Let rows begin anew with the next call, ``mask`` bool ``[B]``."""
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
        """First of ``position`` columns whose token is kept, int64 ``[B]``."""
        oldest = torch.full((batch_size,), position - self.kept)
        return oldest if self.floor is None else self.floor.maximum(oldest)

    @classmethod
    def merge(cls, states: "list[PartState]") -> "PartState":
        """The rows of several states of one part; tokens are aligned at the newest."""
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
        """Rows were merged or moved, and begin at ``seq_start`` ``[B]`` of ``position`` columns."""

    def trim(self) -> None:
        """Drop what belongs to tokens that no later token can see, and the memory it takes."""
        for name in self.tokens:
            self._trim(name)

    def _trim(self, name: str) -> None:
        drop = self.tokens[name].shape[-2] - self.keep
        if drop > 0:
            self.tokens[name] = self.tokens[name][..., drop:, :].clone()
            self._room.pop(name, None)

    def move(self, by: Tensor) -> None:
        """Move what belongs to the tokens of each row ``by`` int64 ``[B]`` columns to the right.

        What would leave on the right is dropped; what moves to the left is kept.
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
        """Raise unless the newest columns can be forgotten.

        Args:
            num_columns: How many.
            position: Columns that there are.
            lacks: Whether a row will need a token that is not kept.
            counts: int64 ``[B]``, how many of them hold tokens, where rows have holes.
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
        """Forget the newest columns, and then what no later token can see.

        With ``counts``, as in ``check_crop``, what remains has been moved to where it belongs.
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

        In a row that has ended, one that follows its last token.
        """
        begins = end.clamp(max=position)
        length = begins - start  # of the sequence of each row, in tokens
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
    """``x [B, ...]`` moved to the right in each row; what moves in repeats the edge."""
    x = x.movedim(dim, 1)
    place = torch.arange(x.shape[1], device=x.device) - by.to(x.device)[:, None]
    index = place.clamp(0, max(x.shape[1] - 1, 0))
    index = index.view(*index.shape, *[1] * (x.dim() - 2)).expand(x.shape)
    return x.gather(1, index).movedim(1, dim)


def _may_write(past: Tensor, states: Tensor) -> bool:
    """Whether new entries may be written behind those kept, instead of copying both."""
    # with gradients on, what was returned earlier may be saved for a backward
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return past.dtype == states.dtype and past.device == states.device
