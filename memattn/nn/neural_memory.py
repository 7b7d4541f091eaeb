"""The neural memory of Titans as a layer: projections, convolutions, rates, operator, gate."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.checks import check_int, check_rank, check_shape, must
from memattn.nn.causal_convolution import (
    CausalConvolution,
    FilterInputs,
    PresentTokens,
    continued_inputs,
    filtered_vectors,
    present_tokens,
)
from memattn.nn.neural_memory_parameters import MemoryRates, MemoryWeights
from memattn.nn.neural_memory_state import NeuralMemoryLayerState
from memattn.ops import neural_memory
from memattn.ops._neural_memory_checks import DEEPEST
from memattn.reference.neural_memory import unpack


class NeuralMemoryLayerOutput(NamedTuple):
    """Output of the layer."""

    out: Tensor  # [B, T, E]
    state: NeuralMemoryLayerState
    surprise: Tensor  # [B, H, T], the norm of each token's gradient


class NeuralMemory(nn.Module):
    """A memory for each head, whose weights learn from each token.

    Queries, keys and values are projected, filtered by causal convolutions and passed through SiLU;
    queries and keys are normalised to length 1. Learning rate, momentum and decay of each token and
    head are sigmoids of projections; initially they are ``lr``, ``momentum`` and ``decay``, chosen
    so that a chunk of 64 equal tokens does not overshoot. The memory's output is normalised per
    head, gated by the token and projected.

    Args:
        hidden_size: Features of the hidden states, ``E``.
        num_heads: Memories, ``H``.
        head_dim: Features of a key and a value, ``D``; None means ``hidden_size / num_heads``.
        depth: Layers of a memory's network, 1 to 4.
        expansion: Width of its hidden layers, as a multiple of ``D``.
        chunk_size: Tokens whose gradients are taken at the same weights.
        conv_size: Tokens that the convolutions see; 1 means no convolution.
        num_persistent_tokens: Learned tokens, ``P``, that the memory reads before every sequence.
        lr: Initial learning rate.
        max_lr: Largest learning rate.
        momentum: Initial momentum; None means no momentum.
        decay: Initial decay; None means no decay.
        gate: Whether the output is gated.
        norm_eps: Epsilon of the output's norm.
        options: More arguments of ``memattn.neural_memory``: ``read``, ``activation``,
            ``residual``, ``loss``, ``huber_delta``, ``max_norm``, ``clamp``, ``skip_nonfinite``.
        backend: Backend of the operator, ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.

    Raises:
        ValueError: If heads do not divide or a value is outside its range.

    Example:
        >>> memory = NeuralMemory(hidden_size=64, num_heads=2, chunk_size=16)
        >>> x = torch.randn(2, 50, 64)
        >>> out, state, surprise = memory(x)
        >>> out.shape, surprise.shape
        (torch.Size([2, 50, 64]), torch.Size([2, 2, 50]))
        >>> memory(x[:, :1], state=state).out.shape  # continues from the state
        torch.Size([2, 1, 64])

    Note:
        Source: Behrouz et al., Titans, https://arxiv.org/abs/2501.00663, sections 3.1 and 4.4.
        Differs: rates belong to a token, not to a chunk; see ``memattn.neural_memory``.
    """

    persistent_tokens: nn.Parameter | None  # [P, E]

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        depth: int = 2,
        expansion: int = 4,
        chunk_size: int = 64,
        conv_size: int = 4,
        num_persistent_tokens: int = 0,
        lr: float = 0.01,
        max_lr: float = 1.0,
        momentum: float | None = 0.5,
        decay: float | None = 0.001,
        gate: bool = True,
        norm_eps: float = 1e-6,
        options: dict[str, Any] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (
            ("hidden_size", hidden_size),
            ("num_heads", num_heads),
            ("depth", depth),
            ("expansion", expansion),
            ("chunk_size", chunk_size),
            ("conv_size", conv_size),
        ):
            check_int(name, value, 1)
        check_int("num_persistent_tokens", num_persistent_tokens, 0)
        if depth > DEEPEST:
            must("depth", f"be at most {DEEPEST}", depth)
        if head_dim is None:
            if hidden_size % num_heads:
                must("hidden_size", f"be divisible by num_heads={num_heads}", hidden_size)
            head_dim = hidden_size // num_heads
        check_int("head_dim", head_dim, 1)
        rates = {"lr": lr / max_lr, "momentum": momentum, "decay": decay}
        rates = {name: rate for name, rate in rates.items() if rate is not None}
        for name, rate in rates.items():
            if not 0.0 < rate < 1.0:
                most = f"max_lr={max_lr}" if name == "lr" else "1"
                must(name, f"be between 0 and {most}", lr if name == "lr" else rate)
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.chunk_size = chunk_size
        self.conv_size = conv_size
        self.max_lr = max_lr
        self.rates = tuple(rates)
        self.options = dict(options or {})
        self.backend = backend
        inner = num_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(hidden_size, inner, bias=False)
        if conv_size > 1:
            self.q_conv = CausalConvolution(inner, conv_size)
            self.k_conv = CausalConvolution(inner, conv_size)
            self.v_conv = CausalConvolution(inner, conv_size)
        self.rate_proj = MemoryRates(hidden_size, num_heads, rates)
        sizes = [head_dim, *[expansion * head_dim] * (depth - 1), head_dim]
        self.memory_weights = MemoryWeights(num_heads, sizes)
        self.norm = nn.RMSNorm(head_dim, eps=norm_eps)
        self.gate_proj = nn.Linear(hidden_size, inner, bias=False) if gate else None
        self.o_proj = nn.Linear(inner, hidden_size, bias=False)
        if num_persistent_tokens:
            self.persistent_tokens = nn.Parameter(torch.empty(num_persistent_tokens, hidden_size))
        else:
            self.register_parameter("persistent_tokens", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New persistent tokens; submodules have their own initialisation."""
        if self.persistent_tokens is not None:
            nn.init.normal_(self.persistent_tokens, std=0.02)

    def start(self) -> NeuralMemoryLayerState:
        """The state of one row before its first token and after the persistent tokens."""
        none = self.o_proj.weight.new_zeros(1, 0, self.o_proj.weight.shape[0])
        tokens = none if self.persistent_tokens is None else self.persistent_tokens[None]
        return self._write(tokens, tokens, None).state

    def forward(
        self,
        hidden_states: Tensor,
        *,
        kv_states: Tensor | None = None,
        state: NeuralMemoryLayerState | None = None,
        seq_start: Tensor | None = None,
        seq_end: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> NeuralMemoryLayerOutput:
        """Write the tokens of ``hidden_states [B, T, E]``, and read at each of them.

        Args:
            hidden_states: ``[B, T, E]``.
            kv_states: ``[B, T, E]``, input of keys and values; None means ``hidden_states``.
            state: The state of an earlier call; None starts a sequence.
            seq_start: int32 ``[B]``, first token of each sequence in this call.
            seq_end: int32 ``[B]``, the token after its last.
            cu_seqlens: int32 ``[n+1]``, bounds of packed documents, with ``B = 1``; without a
                state.
        """
        check_rank("hidden_states", hidden_states, "B T E")
        kv_states = hidden_states if kv_states is None else kv_states
        B, T, E = hidden_states.shape
        check_shape("kv_states", kv_states, B=B, T=T, E=E)
        if cu_seqlens is None:
            if state is None and self.persistent_tokens is not None:
                state = self.start().expand(B)
            return self._write(hidden_states, kv_states, state, seq_start, seq_end)
        if state is not None:
            must("state", "be None with cu_seqlens", "a state")
        bounds = dict(seq_start=seq_start, seq_end=seq_end)
        if self.persistent_tokens is None:
            return self._write(hidden_states, kv_states, None, **bounds, cu_seqlens=cu_seqlens)
        # persistent tokens come before each document
        P = len(self.persistent_tokens)
        longer = cu_seqlens + P * torch.arange(len(cu_seqlens), device=cu_seqlens.device)
        column = torch.arange(T + P * (len(cu_seqlens) - 1), device=cu_seqlens.device)
        document = torch.searchsorted(longer[1:].contiguous(), column, right=True)
        place = column - longer[document]
        source = torch.where(place < P, T + place, cu_seqlens[document] + place - P)
        tokens = self.persistent_tokens[None].to(hidden_states.dtype)
        hidden_states, kv_states = (
            torch.cat([x, tokens], 1)[:, source] for x in (hidden_states, kv_states)
        )
        found = self._write(
            hidden_states, kv_states, None, **bounds, cu_seqlens=longer.to(cu_seqlens.dtype)
        )
        own = torch.arange(T, device=column.device)
        own = own + P * (1 + torch.searchsorted(cu_seqlens[1:].contiguous(), own, right=True))
        return found._replace(out=found.out[:, own], surprise=found.surprise[..., own])

    def read(
        self,
        hidden_states: Tensor,
        state: NeuralMemoryLayerState,
        *,
        weights: Tensor | None = None,
        seq_start: Tensor | None = None,
        seq_end: Tensor | None = None,
    ) -> tuple[Tensor, NeuralMemoryLayerState]:
        """Read ``[B, T, E]`` at the weights before the open chunk, or at ``weights``, without
        writing.

        The convolution of these queries has its own inputs in the returned state.

        Args:
            hidden_states: ``[B, T, E]``.
            state: A state from ``forward`` or ``start().expand(B)``.
            weights: ``[B, H, P]``, ``state.memory.packed_weights`` of an earlier state, to read at.
            seq_start: int32 ``[B]``, as in ``forward``.
            seq_end: int32 ``[B]``.
        """
        bounds = dict(seq_start=seq_start, seq_end=seq_end)
        query, state = self.read_queries(hidden_states, state, **bounds)
        packed = state.memory.packed_weights if weights is None else weights
        return self.answer(query, self.gates(hidden_states), packed), state

    def read_queries(
        self,
        hidden_states: Tensor,
        state: NeuralMemoryLayerState,
        *,
        seq_start: Tensor | None = None,
        seq_end: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, NeuralMemoryLayerState]:
        """The queries ``[B, H, T, D]`` of ``read`` (0 for missing tokens), and the new state."""
        check_rank("hidden_states", hidden_states, "B T E")
        bounds = present_tokens(hidden_states, seq_start, seq_end)
        (query,), inputs = self._filtered(
            *([self.q_proj(hidden_states)], ["q"], state.read_inputs, state.since, bounds),
            cu_seqlens,
        )
        if bounds is not None:
            query = torch.where(bounds.present[:, None, :, None], query, 0.0)
        return query, NeuralMemoryLayerState(state.memory, state.inputs, inputs, state.since)

    def gates(self, hidden_states: Tensor) -> Tensor | None:
        """The output gates of these tokens, ``[B, T, H D]``."""
        return None if self.gate_proj is None else self.gate_proj(hidden_states).sigmoid()

    def answer(self, query: Tensor, gates: Tensor | None, packed: Tensor) -> Tensor:
        """The result of ``read`` for given queries and gates, at weights ``[B, H, P]``."""
        sizes = [self.head_dim, *(layer.shape[1] for layer in self.memory_weights)]
        with torch.autocast(query.device.type, enabled=False):
            out = self.recall(unpack(packed, sizes), query.to(packed.dtype))
        return self._finish(out.to(query.dtype), gates)

    def recall(self, weights: Sequence[Tensor], key: Tensor) -> Tensor:
        """Outputs of memories with ``weights`` (layers ``[B, H, d_n, d_{n-1}]``) for keys.

        Keys and outputs are ``[B, H, T, D]`` in the dtype of the weights.
        """
        activation = F.silu if self.options.get("activation") == "silu" else F.gelu
        out = key @ weights[0].mT
        for layer in weights[1:]:
            out = activation(out) @ layer.mT
        return key + out if self.options.get("residual", False) else out

    def pairs(
        self,
        hidden_states: Tensor,
        *,
        kv_states: Tensor | None = None,
        state: NeuralMemoryLayerState | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, T, D]`` that ``forward`` writes for tokens without padding.

        Args:
            hidden_states: ``[B, T, E]``.
            kv_states: ``[B, T, E]``, as in ``forward``.
            state: As in ``forward``.
        """
        kv_states = hidden_states if kv_states is None else kv_states
        if state is None and self.persistent_tokens is not None:
            state = self.start().expand(hidden_states.shape[0])
        # the kept convolution inputs include queries
        projected = [self.q_proj(hidden_states), self.k_proj(kv_states), self.v_proj(kv_states)]
        past = None if state is None else state.inputs
        (_, key, value), _ = self._filtered(projected, list("qkv"), past, None, None)
        return key, value

    def _write(
        self,
        hidden_states: Tensor,
        kv_states: Tensor,
        state: NeuralMemoryLayerState | None,
        seq_start: Tensor | None = None,
        seq_end: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> NeuralMemoryLayerOutput:
        """``forward`` without persistent tokens."""
        projected = [self.q_proj(hidden_states), self.k_proj(kv_states), self.v_proj(kv_states)]
        past, since = (None, None) if state is None else (state.inputs, state.since)
        bounds = present_tokens(hidden_states, seq_start, seq_end)
        heads, inputs = self._filtered(projected, list("qkv"), past, since, bounds, cu_seqlens)
        query, key, value = heads
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        rates = self.rate_proj(kv_states).to(wide).sigmoid()
        rates = rearrange(rates, "b t (n h) -> n b h t", h=self.num_heads)
        rates = dict(zip(self.rates, rates, strict=True))
        out, memory, surprise = neural_memory(
            query,
            key,
            value,
            self.max_lr * rates["lr"],
            rates.get("momentum"),
            rates.get("decay"),
            list(self.memory_weights),
            state=None if state is None else state.memory,
            chunk_size=self.chunk_size,
            seq_start=seq_start,
            seq_end=seq_end,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
            **self.options,
        )
        assert memory is not None
        if since is not None:
            since = since + (hidden_states.shape[1] if bounds is None else bounds.length)
        read_inputs = None if state is None else state.read_inputs
        after = NeuralMemoryLayerState(memory, inputs, read_inputs, since)
        return NeuralMemoryLayerOutput(
            self._finish(out, self.gates(hidden_states)), after, surprise
        )

    def _finish(self, out: Tensor, gates: Tensor | None) -> Tensor:
        """Norm, gate and projection of the memory's output."""
        out = self.norm(
            out.to(self.norm.weight.dtype)
        )  # autocast does not convert the inputs of norms
        out = rearrange(out, "b h t d -> b t (h d)")
        if gates is not None:
            out = out * gates
        return self.o_proj(out)

    def _filtered(
        self,
        projected: Sequence[Tensor],
        names: Sequence[str],
        past: Tensor | None,
        since: Tensor | None,
        bounds: PresentTokens | None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Heads ``[B, H, T, D]`` of the filtered projections, queries and keys of length 1, and the
        inputs that later tokens need.
        """
        x = torch.cat(list(projected), -1)
        found, filters = FilterInputs(x, None, None), None
        if self.conv_size > 1:
            kept = self.conv_size - 1 + (0 if since is None else 2 * self.chunk_size)
            found = continued_inputs(x, past, kept, bounds, cu_seqlens)
            filters = torch.cat([getattr(self, f"{name}_conv").weight for name in names])
        units = self.num_heads * sum(name != "v" for name in names)  # values come last
        vectors = filtered_vectors(
            *(found.inputs, filters, x.shape[1], found.positions),
            num_unit=units,
            head_dim=self.head_dim,
            backend=self.backend,
        )
        return list(torch.split(vectors.transpose(1, 2), self.num_heads, 1)), found.after

    def extra_repr(self) -> str:
        depth, P = len(self.memory_weights), self.persistent_tokens
        sizes = f"num_heads={self.num_heads}, head_dim={self.head_dim}, depth={depth}"
        return f"{sizes}, chunk_size={self.chunk_size}, persistent={0 if P is None else len(P)}"
