"""Memory as context: attention over the tokens of a segment and the memory's outputs for them."""

import dataclasses
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from memattn.nn import (
    NeuralMemory,
    NeuralMemoryLayerState,
    PersistentAttention,
    apply_rotary,
)
from memattn.ops import segmented_attention
from memattn.parts.context import Angles, PartContext
from memattn.parts.context_keys import (
    ContextKeys,
    behind,
    by_segments,
    columns_from,
    segment_columns,
)
from memattn.parts.memory_routing import call_bounds
from memattn.parts.segment_pieces import Piece, SegmentPieces, segment_pieces
from memattn.parts.titans_layers import MemoryLayer, NormedGate, all_present
from memattn.parts.titans_options import REMEMBERED
from memattn.parts.titans_state import EARLIER, START, TitansState
from memattn.parts.views import MASSES_BY_SOURCE


class ContextAttention(PersistentAttention):
    """Attention within segments over tokens, the memory's outputs for them, and persistent keys.

    Tokens and memory outputs share the projections.

    Args:
        hidden_size: As in ``MultiHeadAttention``, with the three that follow.
        num_heads: Query heads, ``H``.
        segment_len: Tokens in a segment, ``L``.
        num_kv_heads: Key and value heads, ``Hkv``.
        head_dim: Features of a head, ``D``.
        num_persistent_tokens: Persistent keys, ``P``.
        num_longterm_tokens: Long-term memory tokens before each segment, ``M``.
        backend: Backend of the operator.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        segment_len: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        num_persistent_tokens: int = 0,
        num_longterm_tokens: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, num_persistent_tokens)
        self.segment_len = segment_len
        self.num_longterm_tokens = num_longterm_tokens
        self.backend = backend

    def memory_heads(self, remembered: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, Hkv, T, D]`` of the memory's outputs ``[B, T, E]``."""
        key, value = (
            rearrange(proj(remembered), "b t (h d) -> b h t d", d=self.head_dim)
            for proj in (self.k_proj, self.v_proj)
        )
        return key if angles is None else apply_rotary(key, *angles), value

    def forward(
        self,
        query: Tensor,
        keys: ContextKeys,
        *,
        seq_start: Tensor | None = None,
        seq_end: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attend from the last ``T`` of ``S`` tokens, ``[B, T, E]``.

        Args:
            query: ``[B, H, T, D]``.
            keys: The tokens' keys, and the memory's by segments, ``[B, Hkv, n_segments, M+L, D]``.
            seq_start: int32 ``[B]``, as in ``segmented_attention``.
            seq_end: int32 ``[B]``.
            cu_seqlens: int32 ``[n+1]``.
        """
        out = segmented_attention(
            query,
            *keys[:2],
            segment_len=self.segment_len + self.num_longterm_tokens,
            memory_key=keys.memory_key,
            memory_value=keys.memory_value,
            memory_is_causal=True,
            persistent_key=self.persistent_key,
            persistent_value=self.persistent_value,
            seq_start=seq_start,
            seq_end=seq_end,
            cu_seqlens=cu_seqlens,
            query_offset=keys.key.shape[2] - query.shape[2],
            backend=self.backend,
        ).out
        return self.merge_heads(out)

    def extra_repr(self) -> str:
        return f"segment_len={self.segment_len}, num_persistent_tokens={self.num_persistent_tokens}"


class ContextLayer(MemoryLayer):
    """A memory, attention over its outputs, and the gate that combines both."""

    def __init__(
        self, memory: NeuralMemory, attention: ContextAttention, hidden_size: int, eps: float
    ) -> None:
        super().__init__(memory)
        self.attention = attention
        self.gate = NormedGate(hidden_size, eps)


class AttendedSegments(NamedTuple):
    """Results of MAC for the tokens of a call, in the order of the pieces."""

    query: Tensor  # [B or 1, H, G, D]
    keys: ContextKeys  # [B or 1, Hkv, G, D]
    attended: Tensor  # [B or 1, G, E]
    remembered: Tensor  # [B or 1, G, E], memory read with queries from attention's output
    longterm: list[ContextKeys]  # one per piece, [rows, Hkv, M, D]; empty without such tokens


class MemoryAsContext(ContextLayer):
    """MAC: attention over a segment and the memory's outputs; the memory learns the result.

    The memory is read with its weights before the segment, and then learns attention's output, so a
    layer computes segment after segment.
    """

    def forward(self, hidden_states: Tensor, context: PartContext) -> Tensor:
        (B, T, _), L = hidden_states.shape, self.attention.segment_len
        cut = context.once(("segment pieces", L), lambda: segment_pieces(context, (B, T), L))
        found = self.run_segments(hidden_states, context, cut)
        return cut.columns(self.gate(found.attended, found.remembered))

    def run_segments(
        self, hidden_states: Tensor, context: PartContext, cut: SegmentPieces
    ) -> AttendedSegments:
        """Process the pieces of a call, and store in the state what later calls need."""
        cache, L = context.state, self.attention.segment_len
        M = self.attention.num_longterm_tokens
        assert cache is None or isinstance(cache, TitansState)
        x = cut.flat(hidden_states)
        angles = cut.angles(context, x.dtype)
        change = self.change_value(x, context, cut)
        query, key, value = self.attention.split_heads(x, change)
        if angles is not None:
            query, key = apply_rotary(query, *angles), apply_rotary(key, *angles)
        rows = cut.pieces[0].rows
        if cache is None:
            state = self.memory.start().expand(rows)
        else:
            state = cache.read_memory(self.memory, rows)
        queries, state = self.memory.read_queries(
            hidden_states, state, cu_seqlens=context.cu_seqlens, **call_bounds(context)
        )
        # computed for all segments at once, as it does not depend on the memory
        before = self.remembered_before(context)
        tensors = zip(
            *map(cut.split_or_none, (query, key, value, cut.flat(queries), self.memory.gates(x))),
            cut.split_or_none(None if before is None else cut.flat(before)),
            cut.split_angles(angles),
            strict=True,
        )
        starts = SegmentStarts(cache, cut.phase) if self.memory.chunk_size < L else None
        attended: list[Tensor] = []
        remembered: list[Tensor] = []
        memory_keys: list[Tensor] = []
        memory_values: list[Tensor] = []
        fronts: list[ContextKeys] = []
        left = hidden_states.shape[1]  # tokens of the call after a piece
        for piece, (q, k, v, asked, gates, taught, turned) in zip(cut.pieces, tensors, strict=True):
            if piece.rows < rows:  # some documents have ended
                rows = piece.rows
                state = state.select(torch.arange(rows, device=x.device))
            weights = state.memory.packed_weights
            if starts is not None:
                weights = starts.of(piece, weights)
            front = self.longterm_keys(state, weights, x)
            read = self.memory.answer(asked, gates, weights)
            memory = self.attention.memory_heads(read, turned)
            keys = ContextKeys(k, v, *memory)
            if piece.begin == 0 and cache is not None:
                y = self._continue(q, keys, front, cache, cut)
            else:
                keys = by_segments(behind(front, keys), M + L)
                end = None if piece.count is None else piece.count + M
                y = self.attention(q, keys, seq_end=end)
            learned = y if taught is None else y + taught
            left -= piece.width
            far = piece.count is None and left >= self.memory.chunk_size
            state = _recording(state, not far)
            out, state, _ = self.memory(y, kv_states=learned, state=state, seq_end=piece.count)
            attended.append(y)
            remembered.append(out)
            memory_keys.append(memory[0])
            memory_values.append(memory[1])
            if front is not None:
                fronts.append(front)
        keys = ContextKeys(key, value, cut.join(memory_keys), cut.join(memory_values))
        if cache is not None:
            present = all_present(hidden_states, context)
            cache.write_memory(state, present)
            if starts is not None:
                starts.keep(present.sum(1), L)
            for name, tensor in keys._asdict().items():
                cache.append(name, cut.columns(tensor))
        found = AttendedSegments(query, keys, cut.join(attended), cut.join(remembered), fronts)
        if self.weight_residual:
            context.handed[REMEMBERED] = cut.columns(found.remembered)
        return found

    def longterm_keys(
        self, state: NeuralMemoryLayerState, weights: Tensor | None, like: Tensor
    ) -> ContextKeys | None:
        """Keys of the long-term memory tokens, and of the memory's outputs for them before a
        segment.

        They have no position. ``weights`` are those of ``NeuralMemory.read``.
        """
        if self.longterm is None:
            return None
        tokens = self.longterm.tokens.to(like.dtype).expand(state.memory.count.shape[0], -1, -1)
        apart = dataclasses.replace(state, read_inputs=None)  # no tokens come before them
        read, _ = self.memory.read(tokens, apart, weights=weights)
        own, remembered = (self.attention.memory_heads(x, None) for x in (tokens, read))
        return ContextKeys(*own, *remembered)

    def _continue(
        self,
        query: Tensor,
        keys: ContextKeys,
        front: ContextKeys | None,
        cache: TitansState,
        cut: SegmentPieces,
    ) -> Tensor:
        """Attend in segments that earlier calls began; cached tokens come before the new ones."""
        L, phase, count = self.attention.segment_len, cut.phase, cut.pieces[0].count
        M = self.attention.num_longterm_tokens
        K = phase if isinstance(phase, int) else min(cache.kept, L - 1)
        if K:
            past = (cache.tokens[name][..., cache.kept - K :, :] for name in ContextKeys._fields)
            pairs = zip(past, keys, strict=True)
            keys = ContextKeys(*(torch.cat([x.to(y.dtype), y], 2) for x, y in pairs))
        start = index = None
        if isinstance(phase, Tensor):
            start = (K - phase).to(torch.int32)
        keys = behind(front, keys, start)
        if start is not None:
            index = columns_from(start, M + L, keys.key.shape[2])
        return self.attention(
            query,
            by_segments(keys, M + L, index),
            seq_start=start,
            seq_end=None if count is None else count + K + M,
        )


def _recording(state: NeuralMemoryLayerState, is_near: bool) -> NeuralMemoryLayerState:
    """The state; it records its past, if at all, only near the end of a call.

    No crop goes farther back, and a recording call computes token by token.
    """
    memory = state.memory
    if state.since is None or memory.records == is_near:
        return state
    memory = memory.record_past() if is_near else memory.forget_past()
    return dataclasses.replace(state, memory=memory)


class SegmentStarts:
    """The memory weights for reading each segment, if a segment has several chunks.

    Args:
        cache: The cached state, or None.
        phase: Indices of the call's first tokens in their segments.
    """

    def __init__(self, cache: TitansState | None, phase: int | Tensor) -> None:
        self.cache, self.phase = cache, phase
        self.start = None if cache is None else cache.rows.get(START)
        self.earlier = None if cache is None else cache.history.get(EARLIER)

    def of(self, piece: Piece, current: Tensor) -> Tensor:
        """Weights ``[rows, H, P]`` for reading a piece; ``current`` are those before the piece."""
        begins: bool | Tensor = True if piece.begin else self.phase == 0
        if self.cache is not None and piece.count is not None:
            begins = (piece.count > 0) & begins
        if self.start is None or begins is True:
            self.start, self.earlier = current, self.start
        elif isinstance(begins, Tensor):
            mask, before = begins[:, None, None], self.start
            earlier = before if self.earlier is None else self.earlier
            self.start, self.earlier = (
                torch.where(mask, *pair) for pair in ((current, before), (before, earlier))
            )
        return self.start

    def keep(self, length: Tensor, L: int) -> None:
        """Store what later calls need, after ``length`` int64 ``[B]`` tokens of each row."""
        assert self.cache is not None and self.start is not None
        earlier = self.start if self.earlier is None else self.earlier
        self.cache.keep_segments(self.start, earlier, (self.phase + length - 1) % L)


class MemoryInParallel(ContextLayer):
    """Attention within segments over tokens and memory outputs, gated by the memory output.

    The memory learns from the layer's input, so it processes the whole sequence in one call.
    """

    def forward(self, hidden_states: Tensor, context: PartContext) -> Tensor:
        remembered = self.remember(hidden_states, context)
        query, keys = self.heads(hidden_states, remembered, context)
        if context.state is not None:
            named = keys._asdict().items()
            keys = ContextKeys(*(context.state.append(name, x) for name, x in named))
        B, S, L = hidden_states.shape[0], keys.key.shape[2], self.attention.segment_len
        if torch.compiler.is_compiling():  # S is symbolic
            start, index = segment_columns(context, B, S, L)
        else:
            start, index = context.once(
                ("memory segments", L, S), lambda: segment_columns(context, B, S, L)
            )
        attended = self.attention(
            query,
            by_segments(keys, L, index),
            seq_start=start,
            seq_end=context.bounds.seq_end,
            cu_seqlens=context.cu_seqlens,
        )
        return self.gate(attended, remembered)

    def heads(
        self, hidden_states: Tensor, remembered: Tensor, context: PartContext
    ) -> tuple[Tensor, ContextKeys]:
        """Queries and keys of the tokens of a call."""
        change = self.change_value(hidden_states, context)
        query, key, value = self.attention.split_heads(hidden_states, change)
        angles = context.rotary
        if angles is not None:
            query, key = apply_rotary(query, *angles), apply_rotary(key, *angles)
        return query, ContextKeys(key, value, *self.attention.memory_heads(remembered, angles))


def _sources(layer: ContextLayer, hidden_states: Tensor, context: PartContext) -> dict[str, Tensor]:
    """Attention mass ``[B, H, T]`` on tokens, memory outputs, and keys that all tokens see."""
    attention, longterm = layer.attention, None
    if isinstance(layer, MemoryAsContext):
        shape = (hidden_states.shape[0], hidden_states.shape[1])
        cut = segment_pieces(context, shape, attention.segment_len)
        query, keys, _, _, fronts = layer.run_segments(hidden_states, context, cut)
        if fronts:
            pairs = zip(cut.split(query), fronts, strict=True)
            longterm = cut.join([_front_lse(*pair) for pair in pairs])
    else:
        assert isinstance(layer, MemoryInParallel)
        remembered = layer.remember(hidden_states, context)
        query, keys = layer.heads(hidden_states, remembered, context)

    def lse(key: Tensor, value: Tensor, **options: Any) -> Tensor:
        found = segmented_attention(query, key, value, backend=attention.backend, **options)
        return found.lse.double()

    parts = {
        "tokens": lse(keys.key, keys.value, segment_len=attention.segment_len),
        "memory": lse(keys.memory_key, keys.memory_value, segment_len=attention.segment_len),
    }
    if attention.persistent_key is not None and attention.persistent_value is not None:
        persistent = (attention.persistent_key, attention.persistent_value)
        shared = (x.expand(len(query), -1, -1, -1) for x in persistent)
        parts["persistent"] = lse(*shared, is_causal=False)
    if longterm is not None:
        parts["longterm"] = longterm[..., 0]
    total = torch.stack(list(parts.values())).logsumexp(0)
    return {name: (part - total).exp() for name, part in parts.items()}


def _front_lse(query: Tensor, front: ContextKeys) -> Tensor:
    """Log-sum-exp ``[B, H, T, 1]`` of the scores of all keys before a segment."""
    key = torch.cat([front.key, front.memory_key], 2)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (query @ key.mT * query.shape[-1] ** -0.5).double().logsumexp(-1, keepdim=True)


MASSES_BY_SOURCE[MemoryAsContext] = MASSES_BY_SOURCE[MemoryInParallel] = _sources
