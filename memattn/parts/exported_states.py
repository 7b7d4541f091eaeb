"""The states of sequences in a program of ``torch.export``: a flat list of tensors, and back.

A program has no numbers of its own, so everything that a sequence keeps is in tensors of shapes
that follow from the batch and the number of columns so far. Outside of it tokens that no later one
sees are dropped; here attention with segments or a window has a fixed number of tokens, zeros in
front where there are fewer, and other attention has all columns. ``columns`` bool ``[B, position]``
says which columns held tokens: these stand behind each other at the end, in every row.

``states`` is a ``SequenceStates`` everywhere here.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import (
    _disable_current_modes,  # pyright: ignore[reportPrivateUsage]
)

from memattn.checks import is_traced, must
from memattn.parts.base import part_type
from memattn.parts.padding import check_mask, read_mask
from memattn.parts.state import OPEN_END, PartState, SequenceBounds


class FlatStates(NamedTuple):
    """The tensors of states, and what they are.

    Attributes:
        tensors: ``columns``, where there have been calls; then token and row tensors of each part
            of each layer.
        facts: What the states are made of again, as JSON.
        source: Tensors of states that these were made of; None where that was something else.
    """

    tensors: list[Any]
    facts: str
    source: tuple[Any, ...] | None = None

    def is_of(self, states: Any) -> bool:
        """Whether the states are still those that these were made of."""
        if self.source is None:
            return True
        own = _sources(states)
        same = (x is y for x, y in zip(self.source, own, strict=False))
        return len(own) == len(self.source) and all(same)


class WalkedLayers:
    """The layers of states. Exporters of transformers read ``__dict__``, in its order, for inputs.

    So what a program returned stays as the next one takes it until something else reads ``layers``.
    """

    __slots__ = ()

    untrimmed: bool  # what a program returned

    def _begin_walk(self) -> None:
        """Put first in ``__dict__`` what is first in programs: columns, where one returned them."""
        self.in_front: list[Tensor] = []
        self.untrimmed = False

    @property
    def layers(self) -> Any:
        """A list of LayerStates, or of objects with the same attributes."""
        if self.untrimmed:
            self.in_front, self.untrimmed = [], False
            for layer in self._layers:
                for state in layer.parts.values():
                    state.trim()
        return self._layers

    @layers.setter
    def layers(self, layers: Any) -> None:
        self._layers = layers


def append_in_program(
    states: Any, B: int, T: int, attention_mask: Tensor | None, device: torch.device
) -> None:
    """``SequenceStates.append_columns`` where a program is made, which checks no values."""
    p = states.position
    if any(state.record_past for state in states._states()):
        must("past_key_values", "not record its past in an exported program", "one that does")
    zeros = torch.zeros(B, dtype=torch.long, device=device)
    count, before = zeros, None
    if states.columns is not None:
        before = states.columns.to(device)
        if before.shape[0] != B:
            must("past_key_values", f"have the batch size of the input, {B}", before.shape[0])
        count = before.sum(1)
    begun, start, end, order = count > 0, p - count, None, None
    present = torch.ones(B, T, dtype=torch.bool, device=device)
    if attention_mask is not None:
        check_mask(attention_mask, B, (T, p + T))
        new = attention_mask[:, attention_mask.shape[1] - T :]
        present = new != 0
        first, last, order = read_mask(new, begun if before is not None else None)
        start = torch.where(begun, start, p + first)
        end = torch.where(last < T, p + last, OPEN_END)
        end = torch.where(first == last, torch.where(begun, p, OPEN_END), end)
    states.columns = present if before is None else torch.cat([before, present], 1)
    states.in_front = [states.columns]
    states.seq_start, states.seq_end, states.position = start, end, p + T
    states.order, states.in_program = order, True
    states.has_padding = states.ends_early = attention_mask is not None
    is_whole = before is None and attention_mask is None
    for state in states._states():
        state.place(start, p)
        S = p + T if state.most_kept is None else state.lead + state.kept + T
        first_column = states.position - S
        state.bounds = SequenceBounds(
            None if is_whole else (start - first_column).to(torch.int32),
            None if end is None else (end - first_column).clamp(max=S).to(torch.int32),
        )
        state.start = 0 if is_whole else None
        state.begin()
    for layer in states.layers:
        layer.position = states.position


def flatten_states(states: Any) -> FlatStates:
    """What ``unflatten_states`` makes the same states of; rows that have ended are moved first."""
    if states.in_program:
        return _flatten(states, states.columns)
    if states.flat is not None and states.flat.is_of(states):
        return states.flat
    _check_takeable(states)
    with _disable_current_modes():  # values are read, also while a program is being made
        states._close_gaps()
        found = _flatten(states, states.present if states.position else None)
    # export knows a tensor by its identity
    states.flat = found._replace(source=_sources(states))
    return states.flat


def _flatten(states: Any, columns: Tensor | None) -> FlatStates:
    tensors: list[Any] = [] if columns is None else [columns]
    layers: list[dict[str, Any]] = []
    for layer in states.layers:
        facts: dict[str, Any] = {}
        for name, state in layer.parts.items():
            tokens = dict(state.tokens)
            if not states.in_program:
                tokens = {key: _filled(x, state, states.position) for key, x in tokens.items()}
            tensors += [*tokens.values(), *state.rows.values()]
            facts[name] = [state.describe(), list(tokens), list(state.rows)]
        layers.append(facts)
    return FlatStates(tensors, json.dumps({"begun": columns is not None, "layers": layers}))


def axes_of(states: Any, rows: Any, columns: Any) -> list[dict[int, Any]]:
    """Which axes of the flat tensors are the batch, and which are the columns so far."""
    axes = [{0: rows, 1: columns}] if states.position else []
    for state in states._states():
        for tensor in state.tokens.values():
            grows = {tensor.dim() - 2: columns} if state.most_kept is None else {}
            axes.append({0: rows, **grows})
        axes += [{0: rows} for _ in state.rows]
    return axes


def _sources(states: Any) -> tuple[Any, ...]:
    """What is replaced wherever states change."""
    bounds = (states.seq_start, states.seq_end, states.columns)
    return (*bounds, *(each for state in states._states() for each in state.tensors()))


def unflatten_states(states: Any, tensors: Sequence[Any], facts: str) -> None:
    """Fill empty states, made by ``layers_of``, with what ``flatten_states`` gave."""
    if not all(isinstance(x, Tensor) for x in tensors):  # a tree of something else
        states.flat = FlatStates(list(tensors), facts)
        return
    named, rest = json.loads(facts), iter(tensors)
    columns = next(rest) if named["begun"] else None
    for layer, parts in zip(states.layers, named["layers"], strict=True):
        for name, (_, tokens, rows) in parts.items():
            state = layer.parts[name]
            state.tokens = {key: next(rest) for key in tokens}
            state.rows = {key: next(rest) for key in rows}
    if columns is None:
        return
    states.position = columns.shape[1]
    for layer in states.layers:
        layer.position = states.position
    if torch.compiler.is_exporting() or is_traced(columns):
        states.columns, states.in_program = columns, True
        states.in_front = [columns]
        return
    given, columns = columns, columns.cpu()
    start, end = states.position - columns.sum(1), torch.full((len(columns),), OPEN_END)
    states.seq_start, states.seq_end = start, end
    if not torch.equal(columns, states.present):
        states.columns = columns
    states._mark_visible()
    for state in states._states():
        # in front of what is seen may be zeros, or what was moved
        state.floor = state.visible_from(states.position, start, end)
    # until something is read, all is as the next program takes it
    states.in_front, states.untrimmed = [given], True


def layers_of(facts: str) -> list[dict[str, PartState]]:
    """The empty states that flat states are of, layer by layer."""
    layers = json.loads(facts)["layers"]
    return [{name: _empty(made[0]) for name, made in parts.items()} for parts in layers]


def _empty(facts: dict[str, Any]) -> PartState:
    return part_type(facts["kind"], "past_key_values").state_type(**facts)


def _filled(tokens: Tensor, state: PartState, position: int) -> Tensor:
    """A token tensor with as many entries as it has in a program."""
    missing = (position if state.most_kept is None else state.most_kept) - tokens.shape[-2]
    return F.pad(tokens, (0, 0, missing, 0))


def _check_takeable(states: Any) -> None:
    """Raise where a program could not go on with the states."""
    if any(state.record_past or state.history for state in states._states()):
        must("past_key_values", "not record its past in an exported program", "one that does")
    if any(state.restart is not None for state in states._states()):
        wanted = "have no rows that begin anew in an exported program"
        must("past_key_values", wanted, "rows that were reset")
