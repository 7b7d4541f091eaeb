"""Future attention as a drop-in multi-head attention layer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memattn.checks import check_bool, check_pair, must
from memattn.nn._heads import MultiHeadAttention, TokenCache
from memattn.nn.future_keys import FutureComputed, FutureRelative, FutureTable
from memattn.nn.rotary import apply_rotary
from memattn.ops import future_attention, future_attention_loss
from memattn.ops.future_attention import LOSS_TYPES

KEY_SOURCES = ("table", "relative", "computed")

Operands = tuple[tuple[Tensor, ...], dict[str, Any]]  # tensors and options of the operator


class FutureLayerOutput(NamedTuple):
    """Hidden states, and the loss of the layer's future part if it was computed."""

    hidden_states: Tensor  # [B, T, E]
    loss: Tensor | None  # scalar, float32 (float64 for float64 inputs)


class FutureAttention(MultiHeadAttention):
    """Causal multi-head attention that also sees learned keys for the next positions.

    One softmax runs over the keys of the past and ``future_dim`` future keys; see
    ``memattn.future_attention``. Future keys have one head for each query head, and start small.

    Args:
        hidden_size: Features of the hidden states, ``E``.
        num_heads: Query heads, ``H``.
        future_dim: Positions that a query sees ahead.
        num_positions: Positions of the longest sequence, ``N_ctx``; without effect for the source
            ``"relative"``, which has no longest one.
        source: Where future keys come from: ``"table"``, parameters at absolute positions,
            ``"relative"``, parameters by distance, or ``"computed"``, the table plus a low-rank
            projection of the token ``future_dim`` positions earlier.
        source_rank: Rank of that projection; without effect for the other sources.
        num_kv_heads: Key and value heads, ``Hkv``, a divisor of ``num_heads``; None means equal.
        head_dim: Features of a head, ``D``; None means ``hidden_size / num_heads``.
        loss_type: ``"mse"`` or ``"cosine"``: the loss between the future part of the output and the
            output of the real future keys. None means no such loss.
        detach_target: Whether the loss gives no gradient to the real keys, values and queries of
            its target.
        backend: Backend of the operator, ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.

    Raises:
        ValueError: If heads do not divide, a size is below its minimum, ``future_dim`` is above
            ``num_positions - 1``, or ``source`` or ``loss_type`` is unknown.

    Example:
        >>> attention = FutureAttention(64, 4, future_dim=8, num_positions=100, loss_type="mse")
        >>> x = torch.randn(2, 50, 64)
        >>> hidden_states, loss = attention(x)
        >>> hidden_states.shape, loss.shape
        (torch.Size([2, 50, 64]), torch.Size([]))
        >>> rotary = RotaryEmbedding(attention.head_dim)
        >>> angles = rotary(sequence_positions(x)), rotary(attention.future_positions(x))
        >>> attention(x, rotary=angles[0], future_rotary=angles[1]).hidden_states.shape
        torch.Size([2, 50, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        future_dim: int,
        num_positions: int,
        source: str = "table",
        source_rank: int = 16,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        loss_type: str | None = None,
        detach_target: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim)
        if loss_type is not None and loss_type not in LOSS_TYPES:
            must("loss_type", f"be None or one of {', '.join(LOSS_TYPES)}", repr(loss_type))
        check_bool("detach_target", detach_target)
        self.future_dim = future_dim
        self.loss_type = loss_type
        self.detach_target = detach_target
        self.backend = backend
        sizes = (num_heads, self.head_dim, future_dim)
        if source == "table":
            self.future = FutureTable(*sizes, num_positions)
        elif source == "relative":
            self.future = FutureRelative(*sizes)
        elif source == "computed":
            self.future = FutureComputed(hidden_size, *sizes, num_positions, source_rank)
        else:
            must("source", f"be one of {', '.join(KEY_SOURCES)}", repr(source))

    def future_positions(self, hidden_states: Tensor, *, offset: int = 0) -> Tensor:
        """The positions ``[1, R]`` whose cosines and sines ``future_rotary`` needs: 1, 2, ...

        Args:
            hidden_states: ``[B, T, E]``; only its shape and device are read.
            offset: Tokens in the cache.
        """
        rows = self.future.num_rows(offset + hidden_states.shape[1])
        return torch.arange(1, rows + 1, device=hidden_states.device)[None]

    def forward(
        self,
        hidden_states: Tensor,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        future_rotary: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        seq_start: Tensor | None = None,
        seq_end: Tensor | None = None,
        cache: TokenCache | None = None,
        output_loss: bool | None = None,
    ) -> FutureLayerOutput:
        """Attend over ``hidden_states [B, T, E]``.

        Args:
            hidden_states: ``[B, T, E]``.
            rotary: Cosines and sines of a ``RotaryEmbedding``; None means no rotation.
            future_rotary: Those of ``future_positions``, given together with ``rotary``.
            cu_seqlens: int32 ``[n+1]``, bounds of packed documents, with ``B = 1``.
            seq_start: int32 ``[B]``, the first column of each sequence, counted from the first
                key, cached keys included.
            seq_end: int32 ``[B]``, the column after the last one, counted like ``seq_start``.
            cache: Keys and values of earlier calls and, for the source ``"computed"``, the
                projected tokens; this call extends it.
            output_loss: Whether to compute the loss, if the layer has one; None means in training
                mode only.

        Returns:
            ``hidden_states [B, T, E]``, and ``loss``, None where it is not computed.

        Raises:
            ValueError: If shapes do not fit, a sequence is longer than ``num_positions``, or one of
                ``rotary`` and ``future_rotary`` is missing.
        """
        inputs, options = self.operands(
            hidden_states,
            rotary=rotary,
            future_rotary=future_rotary,
            cu_seqlens=cu_seqlens,
            seq_start=seq_start,
            seq_end=seq_end,
            cache=cache,
        )
        loss = None
        if self.loss_type is not None and (self.training if output_loss is None else output_loss):
            out, loss, _ = future_attention_loss(
                *inputs, loss_type=self.loss_type, detach_target=self.detach_target, **options
            )
        else:
            out = future_attention(*inputs, **options).out
        return FutureLayerOutput(self.merge_heads(out), loss)

    def operands(
        self,
        hidden_states: Tensor,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        future_rotary: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        seq_start: Tensor | None = None,
        seq_end: Tensor | None = None,
        cache: TokenCache | None = None,
    ) -> Operands:
        """The five tensors and the options that ``forward`` calls the operator with.

        The arguments are those of ``forward``; keys and values are appended to the cache.
        """
        check_pair(
            *("rotary", None if rotary is None else rotary[0]),
            *("future_rotary", None if future_rotary is None else future_rotary[0]),
        )
        plain_query, key, value = self.split_heads(hidden_states)
        query = plain_query
        if rotary is not None:
            query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        latent = self.future.latent(hidden_states)
        if cache is not None:
            key, value = cache.update(key, value)
            latent = None if latent is None else cache.append("latent", latent)
        bounds = dict(cu_seqlens=cu_seqlens, seq_start=seq_start, seq_end=seq_end)
        return self._operands(
            (query, key, value), plain_query, latent=latent, future_rotary=future_rotary, **bounds
        )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        future_rotary: tuple[Tensor, Tensor] | None = None,
        **bounds: Tensor | None,
    ) -> Tensor:
        """Head outputs ``[B, H, T, D]`` of the newest queries, for the source ``"table"``.

        Queries and keys are rotated already; the other arguments are those of ``forward``.
        """
        heads = (query, key, value)
        inputs, options = self._operands(heads, query, future_rotary=future_rotary, **bounds)
        return future_attention(*inputs, **options).out

    def _operands(
        self,
        heads: tuple[Tensor, Tensor, Tensor],
        plain_query: Tensor,
        *,
        future_rotary: tuple[Tensor, Tensor] | None,
        latent: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seq_start: Tensor | None = None,
        seq_end: Tensor | None = None,
    ) -> Operands:
        """The operands from query, key and value, unrotated queries and projected tokens."""
        query, key, value = heads
        rotates = future_rotary is not None
        length = key.shape[2]
        if latent is not None and cu_seqlens is not None and not torch.compiler.is_compiling():
            length = int(cu_seqlens.diff().max())  # each document has its own rows
        by_distance = self.future.future_index == "distance"
        offset = key.shape[2] - query.shape[2]
        whole = seq_start is None and cu_seqlens is None  # then no query stands before offset
        rows = self.future(
            self.future.num_rows(length),
            first_row=0 if by_distance or not whole else offset,
            rotary=future_rotary,
            latent=latent,
            cu_seqlens=cu_seqlens,
            seq_start=seq_start,
        )
        options = dict(
            future_dim=self.future_dim,
            future_query=plain_query if by_distance and rotates else None,
            future_index=self.future.future_index,
            cu_seqlens=cu_seqlens,
            seq_start=seq_start,
            seq_end=seq_end,
            query_offset=offset,
            backend=self.backend,
        )
        return (query, key, value, *rows), options

    def extra_repr(self) -> str:
        return f"loss_type={self.loss_type!r}, detach_target={self.detach_target}"
