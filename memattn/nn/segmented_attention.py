"""Segmented attention as a drop-in multi-head attention layer."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from memattn.checks import check_int, check_positive
from memattn.nn._heads import KeyValueCache, PersistentAttention
from memattn.nn.rotary import apply_rotary
from memattn.ops import segmented_attention


class SegmentedAttention(PersistentAttention):
    """Causal multi-head attention within segments, a sliding window and persistent tokens.

    Without ``segment_len`` and ``window_size`` it is plain causal attention. Persistent keys and
    values are parameters that every query sees. They are initialised small, so that at first they
    change the output little. They have no position, while queries may be rotated.

    Args:
        hidden_size: Features of the hidden states, ``E``.
        num_heads: Query heads, ``H``.
        num_kv_heads: Key and value heads, ``Hkv``, a divisor of ``num_heads``; None means equal.
        head_dim: Features of a head, ``D``; None means ``hidden_size / num_heads``.
        segment_len: Tokens in a segment, ``L``; None means no segments.
        window_size: Keys in the sliding window, the query's own included; None means no window.
        num_sink_tokens: Number of first tokens of each sequence or document that all its tokens
            see, besides segment and window.
        num_persistent_tokens: Persistent keys, ``P``.
        softcap: Bound that no score exceeds, as in Gemma 2; None means no bound.
        backend: Backend of the operator, ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.

    Raises:
        ValueError: If heads do not divide, a size is below its minimum, or ``softcap`` is not
            positive.

    Example:
        >>> attention = SegmentedAttention(hidden_size=64, num_heads=4, segment_len=16)
        >>> x = torch.randn(2, 50, 64)
        >>> attention(x).shape
        torch.Size([2, 50, 64])
        >>> rotary = RotaryEmbedding(attention.head_dim)
        >>> attention(x, rotary=rotary(sequence_positions(x))).shape
        torch.Size([2, 50, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        segment_len: int | None = None,
        window_size: int | None = None,
        num_sink_tokens: int = 0,
        num_persistent_tokens: int = 0,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, num_persistent_tokens)
        for name, value in (("segment_len", segment_len), ("window_size", window_size)):
            if value is not None:
                check_int(name, value, 1)
        check_int("num_sink_tokens", num_sink_tokens, 0)
        self.segment_len = segment_len
        self.window_size = window_size
        self.num_sink_tokens = num_sink_tokens
        self.softcap = None if softcap is None else check_positive("softcap", softcap)
        self.backend = backend

    def forward(
        self,
        hidden_states: Tensor,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        seq_start: Tensor | None = None,
        seq_end: Tensor | None = None,
        cache: KeyValueCache | None = None,
        change_value: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Attend over ``hidden_states [B, T, E]`` and return ``[B, T, E]``.

        Args:
            hidden_states: ``[B, T, E]``.
            rotary: Cosines and sines of a ``RotaryEmbedding``; None means no rotation.
            cu_seqlens: int32 ``[n+1]``, bounds of packed documents, with ``B = 1``.
            seq_start: int32 ``[B]``, the first column of each sequence, counted from the first
                key, cached keys included.
            seq_end: int32 ``[B]``, the column after the last one, counted like ``seq_start``.
            cache: Keys and values of earlier calls, extended by those of this one.
            change_value: Function whose result replaces the values ``[B, T, Hkv D]``.
        """
        query, key, value = self.split_heads(hidden_states, change_value)
        if rotary is not None:
            query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        if cache is not None:
            key, value = cache.update(key, value)
        bounds = dict(cu_seqlens=cu_seqlens, seq_start=seq_start, seq_end=seq_end)
        return self.merge_heads(self.attend(query, key, value, **bounds))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **bounds: Any) -> Tensor:
        """Head outputs ``[B, H, T, D]`` of the newest queries; ``bounds`` as in ``forward``."""
        return segmented_attention(
            query,
            key,
            value,
            segment_len=self.segment_len,
            window_size=self.window_size,
            num_sink_tokens=self.num_sink_tokens,
            persistent_key=self.persistent_key,
            persistent_value=self.persistent_value,
            query_offset=key.shape[2] - query.shape[2],
            softcap=self.softcap,
            backend=self.backend,
            **bounds,
        ).out

    def extra_repr(self) -> str:
        sizes = f"segment_len={self.segment_len}, window_size={self.window_size}"
        if self.num_sink_tokens:
            sizes += f", num_sink_tokens={self.num_sink_tokens}"
        if self.softcap is not None:
            sizes += f", softcap={self.softcap}"
        return f"{sizes}, num_persistent_tokens={self.num_persistent_tokens}"
