"""PyTorch's multi-head attention, frozen, with gated specialists."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.checks import check_bool, check_int, is_readable, must
from memattn.nn._attention_masks import AttentionMasks, hidden_keys, take_apart
from memattn.nn.attention_specialist import (
    AttentionWeights,
    beside_each_other,
    choose_slots,
    mix_with_base,
    project,
    reduce_branches,
    weights_of,
)
from memattn.nn.branch_products import plan_branches
from memattn.nn.domain_gate import DomainGate, GateOutput
from memattn.nn.specialist_holder import SpecialistHolder
from memattn.ops.branch_attention import branch_attention


class ShiftableMultiheadAttention(SpecialistHolder):
    """A frozen ``nn.MultiheadAttention`` and N gated specialists that shift its output.

    ``Y = g_0 Base(x) + sum_e g_e Specialist_e(x)`` with the gates of a ``DomainGate``. A specialist
    is initialised as a copy of the base and is closed until ``gate.set_prior`` opens it.

    The base module is called with the given arguments, so a token that uses only the base gets
    exactly its output. ``base_mha`` itself is used, not a copy. It is frozen and stays in
    evaluation mode, without dropout; gradients flow through it to its input. Specialists have no
    dropout either. In self-attention, padding gets the base's output.

    Args:
        d_model: Features of the input, those of the base.
        num_heads: Heads, those of the base.
        base_mha: The attention, batch first or not, with or without biases.
        num_specialists: Initial number of specialists.
        rank: Rank of new specialists' change of the base's weights; None: full weights.
        gate: A gate for ``d_model`` features without specialists; None means one by token.
        backend: Backend of ``branch_attention``.

    Raises:
        TypeError: If an argument has the wrong Python type.
        ValueError: If the base's width or heads differ, or the gate does not fit.
        NotImplementedError: If the base has ``add_bias_kv`` or ``add_zero_attn``.

    Note:
        Source: Shiftable attention, https://github.com/computermaster0101/shiftable-attention-poc.
        Differs: the base has gradients for its input and no dropout, gates see neither later tokens
        nor padding, and specialists that no token uses are not computed.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        base_mha: nn.MultiheadAttention,
        num_specialists: int = 0,
        *,
        rank: int | None = None,
        gate: DomainGate | None = None,
        backend: str = "auto",
    ) -> None:
        check_int("d_model", d_model, 1)
        check_int("num_heads", num_heads, 1)
        check_int("num_specialists", num_specialists, 0)
        check_base("base_mha", base_mha, d_model, num_heads)
        if gate is None:
            gate = DomainGate(d_model).to(base_mha.out_proj.weight)
        super().__init__(d_model, gate, rank, backend)
        self.base = base_mha.requires_grad_(False).eval()
        # makes an nn.TransformerEncoderLayer call this module instead of its fused kernel, which
        # would read the base's weights
        self._qkv_same_embed_dim = False
        for _ in range(num_specialists):
            self.add_specialist()

    # attributes that users of an nn.MultiheadAttention read
    embed_dim = property(lambda self: self.base.embed_dim)
    num_heads = property(lambda self: self.base.num_heads)
    head_dim = property(lambda self: self.base.head_dim)
    batch_first = property(lambda self: self.base.batch_first)
    in_proj_weight = property(lambda self: self.base.in_proj_weight)
    in_proj_bias = property(lambda self: self.base.in_proj_bias)
    out_proj = property(lambda self: self.base.out_proj)

    def train(self, mode: bool = True) -> "ShiftableMultiheadAttention":
        super().train(mode)
        self.base.eval()
        return self

    def add_specialist(self, name: str | None = None, *, prior: float = 0.0) -> str:
        """Add a copy of the base, closed unless it has a ``prior``, and return its name.

        Raises:
            ValueError: If ``name`` is taken or no name, or ``prior`` is negative or not finite.
        """
        return self.add_copy(weights_of(self.base), name, prior=prior)

    def gates_of(
        self,
        query: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        domain_prior: Tensor | None = None,
        domain_mask: Tensor | None = None,
        domain_weights: Tensor | None = None,
    ) -> GateOutput:
        """The gates of a self-attention with these arguments of ``forward``."""
        x = self._batched(query)
        return self.gate(
            x,
            present=None if key_padding_mask is None else ~hidden_keys(key_padding_mask, len(x)),
            is_causal=is_causal or attn_mask is not None,
            prior=domain_prior,
            mask=domain_mask,
            override=domain_weights,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        domain_prior: Tensor | None = None,
        domain_mask: Tensor | None = None,
        domain_weights: Tensor | None = None,
        return_gates: bool = False,
    ) -> Any:
        """Call it like the base.

        Args:
            query: As for the base, like all arguments up to ``is_causal``.
            key: Likewise.
            value: Likewise.
            key_padding_mask: Likewise. In self-attention the gate ignores padding, too.
            need_weights: Whether to return the base's attention weights.
            attn_mask: Likewise.
            average_attn_weights: Likewise.
            is_causal: Likewise: a hint that ``attn_mask`` is causal.
            domain_prior: ``prior`` of the ``DomainGate``.
            domain_mask: Its ``mask``.
            domain_weights: Its ``override``.
            return_gates: Whether to also return the gates.

        Returns:
            The output and attention weights or None, as the base does; with ``return_gates`` a
            ``GateOutput`` as a third.

        Raises:
            TypeError: If an argument has the wrong Python type.
            ValueError: If an argument does not fit, or the gate's scope is ``"sequence"`` and there
                is an ``attn_mask``, which may hide later tokens from earlier ones.
        """
        check_bool("return_gates", return_gates)
        out, attention = self.base(
            *(query, key, value),
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        used = self.used_specialists(domain_prior, domain_weights)
        given = any(x is not None for x in (domain_prior, domain_mask, domain_weights))
        if not (used or given or return_gates):
            return out, attention
        is_self = query is key
        gates = self.gates_of(
            *(query, key_padding_mask if is_self else None, attn_mask, is_causal),
            domain_prior=domain_prior,
            domain_mask=domain_mask,
            domain_weights=domain_weights,
        )
        if used:
            q, k, v = (self._batched(x) for x in (query, key, value))
            masks = take_apart(q, k, key_padding_mask, attn_mask, is_causal, is_self)
            slots = self.most_slots(domain_weights)
            shifted = self._shift(self._batched(out), (q, k, v), gates.gates, used, masks, slots)
            shifted = shifted if self.batch_first else shifted.transpose(0, 1)
            out = shifted.reshape(out.shape)
        return (out, attention, gates) if return_gates else (out, attention)

    def _batched(self, x: Tensor) -> Tensor:
        """An input or output of the base as ``[B, T, E]``."""
        if x.dim() == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _shift(
        self,
        base: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        gates: Tensor,
        used: list[int],
        masks: AttentionMasks,
        slots: int | None,
    ) -> Tensor:
        """The base's output ``[B, T, E]`` combined with those of the specialists."""
        names = [self.gate.specialists[e] for e in used]
        shares = gates[..., [1 + e for e in used]]  # [B, T, F]
        if masks.bias is not None:
            others = self._by_mask(inputs, shares, self._weights(names), masks.bias)
        elif slots is None or slots >= len(used) or not is_readable(shares):
            others = self._by_intervals(inputs, shares, self._weights(names), masks, slots)
        else:
            others = self._by_rows(inputs, shares, names, masks, slots)
        return mix_with_base(base, gates, others)

    def _weights(self, names: list[str]) -> AttentionWeights:
        """Stacked weights of these specialists."""
        own = weights_of(self.base)
        return beside_each_other([self.specialist(name).weights(own) for name in names])

    def _project(
        self, inputs: tuple[Tensor, Tensor, Tensor], weights: AttentionWeights, n: int
    ) -> list[Tensor]:
        """Queries, keys and values of ``n`` specialists, ``[B, F, H, T, D]``."""
        biases = (weights.q_bias, weights.k_bias, weights.v_bias)
        return [
            project(x, weight, bias, n, self.num_heads)
            for x, weight, bias in zip(inputs, weights[:3], biases, strict=True)
        ]

    def _by_rows(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        shares: Tensor,
        names: list[str],
        masks: AttentionMasks,
        slots: int,
    ) -> Tensor:
        """As ``_by_intervals``, but computes only the specialists that tokens use."""
        plan = plan_branches(shares, slots)
        if not plan.spans:
            return torch.zeros_like(inputs[0])
        own = weights_of(self.base)
        weights = {f: self.specialist(names[f]).weights(own) for f in plan.branches}
        query = plan.queries(inputs[0], weights, self.num_heads)
        key = plan.keys(inputs[1], weights, self.num_heads, "k")
        value = plan.keys(inputs[2], weights, self.num_heads, "v")
        out = self._attend(query, key, value, plan.gates, plan.places, masks)
        return plan.reduce(out, weights)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gates: Tensor,
        branches: Tensor | None,
        masks: AttentionMasks,
    ) -> Tensor:
        return branch_attention(
            *(query, key, value, gates, branches),
            is_causal=masks.is_causal,
            seq_start=masks.seq_start,
            seq_end=masks.seq_end,
            backend=self.backend,
        ).out

    def _by_intervals(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        shares: Tensor,
        weights: AttentionWeights,
        masks: AttentionMasks,
        slots: int | None,
    ) -> Tensor:
        """Gated sum ``[B, T, E]`` of the specialists for masks that are intervals of keys."""
        n = shares.shape[-1]
        query, key, value = self._project(inputs, weights, n)
        chosen = choose_slots(shares, slots)
        out = self._attend(chosen.take(query), key, value, *chosen, masks)
        return reduce_branches(chosen.put(out, n), shares, weights)

    def _by_mask(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        shares: Tensor,
        weights: AttentionWeights,
        bias: Tensor,
    ) -> Tensor:
        """The gated sum for other masks, by PyTorch's attention."""
        n = shares.shape[-1]
        query, key, value = (x.flatten(1, 2) for x in self._project(inputs, weights, n))
        if bias.shape[1] > 1:
            bias = bias.repeat(1, n, 1, 1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        gate = shares.transpose(1, 2)[:, :, None, :, None]  # [B, F, 1, T, 1]
        by_branch = torch.unflatten(out, 1, (n, self.num_heads))
        gated = torch.where(gate == 0, 0.0, gate * by_branch).to(out.dtype)
        return reduce_branches(gated, shares, weights)


def check_base(name: str, base: object, d_model: int, num_heads: int) -> None:
    """Raise unless ``base`` is an attention of this width with as many heads."""
    if not isinstance(base, nn.MultiheadAttention):
        must(name, "be an nn.MultiheadAttention", type(base).__name__, TypeError)
    width = base.out_proj.out_features
    if width != d_model:
        must(name, f"have embed_dim=d_model={d_model}", width)
    # torch does not type the number of heads
    heads: int = base.num_heads  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if heads != num_heads:
        must(name, f"have num_heads={num_heads}", heads)
    if base.bias_k is not None or base.add_zero_attn:
        must(name, "have no add_bias_kv and no add_zero_attn", "one of them", NotImplementedError)
