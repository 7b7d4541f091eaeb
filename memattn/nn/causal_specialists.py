"""Gated specialists of a causal attention: further attentions over the same tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from memattn.checks import check_int, is_readable, must
from memattn.nn._heads import TokenCache
from memattn.nn.attention_specialist import (
    PROJECTIONS,
    AttentionSpecialist,
    AttentionWeights,
    beside_each_other,
    choose_slots,
    mix_with_base,
    project,
    reduce_branches,
)
from memattn.nn.base_attention import BaseAttention
from memattn.nn.branch_products import plan_branches
from memattn.nn.domain_gate import DomainGate, GateOutput, GateState
from memattn.nn.rotary import apply_rotary
from memattn.nn.specialist_holder import SpecialistHolder
from memattn.ops.branch_attention import branch_attention


class SpecialistCache(TokenCache, Protocol):
    """Cached keys and values of specialists, and the state of their gate."""

    def choose(self, wanted: tuple[str, ...], begins: Callable[[], bool]) -> tuple[str, ...]:
        """The specialists whose keys are kept, including those in ``wanted``.

        ``begins`` says whether no row has tokens of earlier calls.
        """
        ...

    def read(self, name: str, initial: Tensor) -> Tensor:
        """The kept tensor, one entry per row, ``[B, ...]``."""
        ...

    def write(self, name: str, value: Tensor, history: Tensor | None = None) -> None:
        """Replace the tensor; ``history [B, T, ...]`` has its values after each token."""
        ...


class SpecialistOutput(NamedTuple):
    """The output that replaces attention's, and the gates (None if not computed).

    Without gates every token uses only the base.
    """

    hidden_states: Tensor  # [B, T, E]
    gates: GateOutput | None


class _Call(NamedTuple):
    """Data that all specialists share in one call."""

    base: BaseAttention | None
    rotary: tuple[Tensor, Tensor] | None
    cache: SpecialistCache | None
    bounds: dict[str, Any]

    @property
    def own(self) -> AttentionWeights | None:
        """The weights of the base."""
        return None if self.base is None else self.base.weights

    def turn(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and rotated queries ``[B, A, H, T, D]`` and keys ``[B, F, Hkv, T, D]``."""
        if self.base is not None and self.base.q_norm is not None:
            query = self.base.q_norm(query)
        if self.base is not None and self.base.k_norm is not None:
            key = self.base.k_norm(key)
        if self.rotary is not None:
            angles = [angle[:, None] for angle in self.rotary]
            query, key = apply_rotary(query, *angles), apply_rotary(key, *angles)
        return query, key, value

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gates: Tensor,
        branches: Tensor | None,
        backend: str,
    ) -> Tensor:
        """Gated results of the slots, ``[B, A, H, T, D]``; attends to cached and new keys."""
        if self.cache is not None:
            key, value = self.cache.append("key", key), self.cache.append("value", value)
        return branch_attention(
            *(query, key, value, gates, branches),
            query_offset=key.shape[3] - query.shape[3],
            scale=None if self.base is None else self.base.scale,
            backend=backend,
            **self.bounds,
        ).out


class CausalSpecialists(SpecialistHolder):
    """Gated specialists of a decoder's attention, which is called first.

    ``Y = g_0 Base(x) + sum_e g_e Specialist_e(x)``. A specialist is causal attention to all earlier
    tokens of its sequence, with projections initialised from the base. Windows, persistent keys and
    memories of the base apply to the base only.

    Args:
        hidden_size: Features of the hidden states, ``E``.
        num_heads: Query heads of the base, ``H``.
        num_kv_heads: Key and value heads of the base, ``Hkv``.
        head_dim: Features of a head, ``D``.
        gate: A gate for ``hidden_size`` features without specialists.
        rank: Rank of new specialists' change of the base's weights; None: full weights.
        backend: Backend of ``branch_attention``.

    Raises:
        TypeError: If an argument has the wrong Python type.
        ValueError: If a size is below 1, or the gate does not fit.

    Note:
        Source: Shiftable attention, https://github.com/computermaster0101/shiftable-attention-poc.
        Differs: it is causal, specialists have a state for decoding, and gradients flow through the
            base to its input.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        gate: DomainGate,
        *,
        rank: int | None = None,
        backend: str = "auto",
    ) -> None:
        for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            check_int(name, value, 1)
        check_int("head_dim", head_dim, 1)
        super().__init__(hidden_size, gate, rank, backend)
        self.hidden_size, self.head_dim = hidden_size, head_dim
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads

    def add_specialist(
        self, name: str | None = None, *, prior: float = 0.0, base: BaseAttention | None = None
    ) -> str:
        """Add a specialist, closed unless it has a ``prior``, and return its name.

        Args:
            name: Its name; None takes the first ``specialist_<n>`` that is free.
            prior: Its prior.
            base: The attention that it copies; None leaves that to ``copy_base``.

        Raises:
            ValueError: If ``name`` is taken or no name, ``prior`` is negative or not finite, or
                the base has other sizes.
        """
        if base is not None:
            self._check_base(base)
        weights = self._blank() if base is None else base.weights
        return self.add_copy(weights, name, prior=prior)

    def copy_base(self, base: BaseAttention | None) -> None:
        """Initialise all specialists as copies of an attention, except those loaded from files.

        Raises:
            ValueError: If it has other sizes, or if it is None and the specialists are low-rank.
        """
        if base is None:
            if self.rank is not None:
                must("rank", "be None where there is no attention to add to", self.rank)
            return
        self._check_base(base)
        for name in self.gate.specialists:
            specialist = self.specialist(name)
            if not specialist.has_biases_of(base.weights):
                new = AttentionSpecialist(base.weights, self.rank)
                like = next(specialist.parameters())
                new = new.to(device=like.device, dtype=like.dtype)
                self.specialists[name] = new.train(self.training)
            else:
                specialist.copy(base.weights)

    def _blank(self) -> AttentionWeights:
        """Weights of the shapes that the specialist has without a base."""
        E, D = self.hidden_size, self.head_dim
        like = self.gate.place
        q, kv = (like.new_zeros(n * D, E) for n in (self.num_heads, self.num_kv_heads))
        return AttentionWeights(q, kv, kv, like.new_zeros(E, len(q)), *(None,) * 4)

    def _check_base(self, base: BaseAttention) -> None:
        """Raise unless a base has the heads and the features of the specialists."""
        blank = self._blank()
        got = [list(getattr(base.weights, name).shape) for name in PROJECTIONS]
        want = [list(getattr(blank, name).shape) for name in PROJECTIONS]
        if got != want or base.num_heads != self.num_heads:
            must("base", f"have {self.num_heads} heads and projections of {want}", got)

    def forward(
        self,
        hidden_states: Tensor,
        attended: Tensor,
        base: BaseAttention | None,
        *,
        positions: Tensor,
        present: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        seq_start: Tensor | None = None,
        seq_end: Tensor | None = None,
        cache: SpecialistCache | None = None,
        prior: Tensor | None = None,
        mask: Tensor | None = None,
        override: Tensor | None = None,
        labels: Tensor | None = None,
        label_weights: Tensor | None = None,
    ) -> SpecialistOutput:
        """Gate the base and the specialists.

        Args:
            hidden_states: Input of attention, ``[B, T, E]``.
            attended: Output of attention, ``[B, T, E]``; returned unchanged for tokens that use
                only the base.
            base: Description of the attention; None if it has no projections.
            positions: int64 ``[B or 1, T]``, each token's place in its own sequence or document.
            present: bool ``[B, T]``, False for padding.
            rotary: Cosines and sines ``[B or 1, 1, T, D/2]``, or None.
            cu_seqlens: int32 ``[n+1]``, bounds of packed documents, with ``B = 1``.
            seq_start: int32 ``[B]``, the first column of each sequence, cached ones included.
            seq_end: int32 ``[B]``, the column after the last one.
            cache: State of earlier calls, which this call extends.
            prior: ``prior`` of the ``DomainGate``.
            mask: Its ``mask``.
            override: Its ``override``.
            labels: Its ``labels``.
            label_weights: Its ``label_weights``.

        Raises:
            ValueError: If an argument does not fit, or ``cache`` lacks a specialist that is used.
        """
        used = self.used_specialists(prior, override)
        if cache is not None:  # later calls may use any open specialist
            wanted = sorted({*used, *self.gate.open_specialists})
            names = tuple(self.gate.specialists[e] for e in wanted)
            names = cache.choose(names, lambda: not bool((positions[:, :1] > 0).any()))
            for name in names:
                if name not in self.gate.specialists:
                    must("past_key_values", "hold specialists of this model", name)
            used = [self.gate.specialists.index(name) for name in names]
        if not used and all(given is None for given in (prior, mask, override, labels)):
            return SpecialistOutput(attended, None)
        gates = self._gates(
            *(hidden_states, positions, cache),
            present=present,
            prior=prior,
            mask=mask,
            override=override,
            labels=labels,
            label_weights=label_weights,
        )
        if not used:
            return SpecialistOutput(attended, gates)
        call = _Call(
            base, rotary, cache, dict(cu_seqlens=cu_seqlens, seq_start=seq_start, seq_end=seq_end)
        )
        names = [self.gate.specialists[e] for e in used]
        shares = gates.gates[..., [1 + e for e in used]]  # [B, T, F]
        slots = self.most_slots(override)
        if slots is not None and slots < len(used) and is_readable(shares):
            others = self._by_rows(hidden_states, shares, names, slots, call)
        else:
            others = self._by_branches(hidden_states, shares, names, slots, call)
        return SpecialistOutput(mix_with_base(attended, gates.gates, others), gates)

    def _by_branches(
        self, x: Tensor, shares: Tensor, names: list[str], slots: int | None, call: _Call
    ) -> Tensor:
        """Gated sum of specialists ``[B, T, E]``; each is projected for all tokens."""
        n = len(names)
        each = [self.specialist(name).weights(call.own) for name in names]
        weights = beside_each_other(each)
        query = project(x, weights.q, weights.q_bias, n, self.num_heads)
        key, value = self._keys(x, weights, n)
        chosen = choose_slots(shares, slots)
        query, key, value = call.turn(chosen.take(query), key, value)
        out = call.attend(query, key, value, *chosen, self.backend)
        return reduce_branches(chosen.put(out, n), shares, weights)

    def _by_rows(
        self, x: Tensor, shares: Tensor, names: list[str], slots: int, call: _Call
    ) -> Tensor:
        """The same sum; queries and outputs are computed only for the specialists a token uses.

        Keys of all specialists are computed: later tokens may use any of them, and a row's result
            must not depend on what other rows use.
        """
        plan = plan_branches(shares, max(slots, 1))
        each = [self.specialist(name).weights(call.own) for name in names]
        weights = dict(enumerate(each))
        query = plan.queries(x, weights, self.num_heads)
        key, value = self._keys(x, beside_each_other(each, ("k", "v")), len(names))
        query, key, value = call.turn(query, key, value)
        out = call.attend(query, key, value, plan.gates, plan.slots, self.backend)
        return plan.reduce(out, weights)

    def _keys(self, x: Tensor, weights: AttentionWeights, n: int) -> tuple[Tensor, Tensor]:
        """Keys and values of n specialists, ``[B, F, Hkv, T, D]``."""
        key = project(x, weights.k, weights.k_bias, n, self.num_kv_heads)
        return key, project(x, weights.v, weights.v_bias, n, self.num_kv_heads)

    def _gates(
        self,
        hidden_states: Tensor,
        positions: Tensor,
        cache: SpecialistCache | None,
        **options: Any,
    ) -> GateOutput:
        """Gates of the tokens, after those of earlier calls."""
        B, T, E = hidden_states.shape
        options |= dict(index=positions.expand(B, T), is_causal=True)
        if cache is None or self.gate.scope != "prefix":
            return self.gate(hidden_states, **options)
        before = cache.read("gate", hidden_states.new_zeros(B, E + 1, dtype=torch.float64))
        gates = self.gate(hidden_states, state=GateState(before[:, :-1], before[:, -1]), **options)
        cache.write("gate", gates.sums[:, -1], history=gates.sums)
        return gates
