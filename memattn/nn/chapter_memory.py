"""Cross-attention of tokens to a memory bank, and the router that selects chapters."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from memattn.checks import check_int, check_rank, must
from memattn.nn.chapter_mixture import mix_chapters
from memattn.nn.linear import LowRankLinear, ZeroLinear
from memattn.nn.memory_bank import MemoryBank
from memattn.nn.mlp import GELUMLP, SwiGLU
from memattn.ops import chapter_attention, chapter_router
from memattn.ops._dispatch import resolve_backend
from memattn.ops.chapter_attention import COMBINE
from memattn.ops.chapter_router import NORMALISATIONS, RouterOutput
from memattn.ops.segmented_attention import AttentionOutput
from memattn.reference.chapter_quantization import LARGEST, dequantize_rows, quantize_rows


class ProjectedChapters(NamedTuple):
    """Keys and values of chapters in the form of ``chapter_attention``."""

    key: Tensor  # [C, Hkv, M, D], or quantised codes
    value: Tensor  # [C, Hkv, M, D]
    key_scale: Tensor | None = None  # [C, Hkv, M]
    value_scale: Tensor | None = None


class ChapterRouter(nn.Module):
    """A linear router that selects chapters, with its losses; see ``memattn.ops.chapter_router``.

    Args:
        hidden_size: Features of a row, ``E``.
        num_chapters: Chapters of the bank, ``C``.
        top_k: Routed chapters that a row selects.
        num_shared: Number of first chapters that every row selects; they have no logits.
        temperature: Divisor of the logits.
        routed_scale: Factor of the weights of routed chapters.
        normalisation: ``"mean"`` or ``"sum"``, of the load-balance loss.
        backend: Backend of the operator, ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_chapters: int,
        top_k: int,
        *,
        num_shared: int = 0,
        temperature: float = 1.0,
        routed_scale: float = 1.0,
        normalisation: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_int("num_shared", num_shared, 0)
        check_int("num_chapters", num_chapters, num_shared + 1)
        check_int("top_k", top_k, 1)
        if top_k > num_chapters - num_shared:
            most = num_chapters - num_shared
            must("top_k", f"be at most num_chapters - num_shared = {most}", top_k)
        if normalisation not in NORMALISATIONS:
            must("normalisation", f"be one of {', '.join(NORMALISATIONS)}", repr(normalisation))
        self.top_k = top_k
        self.num_shared = num_shared
        self.temperature = temperature
        self.routed_scale = routed_scale
        self.normalisation = normalisation
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(num_chapters - num_shared, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_chapters - num_shared))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """New weights, normal with ``std``, and zero biases."""
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor, valid: Tensor | None = None) -> RouterOutput:
        """Select chapters for rows ``[B, N, E]``; ``valid [B, N]`` marks the rows that exist."""
        return chapter_router(
            hidden,
            self.weight,
            self.bias,
            top_k=self.top_k,
            num_shared=self.num_shared,
            temperature=self.temperature,
            routed_scale=self.routed_scale,
            valid=valid,
            normalisation=self.normalisation,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        chapters, E = self.weight.shape
        return f"{E} -> {chapters}, top_k={self.top_k}, num_shared={self.num_shared}"


class MemoryCrossAttention(nn.Module):
    """Multi-head attention of tokens to selected chapters of a memory bank.

    Keys and values of the chapters are projected once per call for the whole batch. Memory tokens
    have no position and no order. There are no biases. The output projection may start at zero, so
    that at first the layer has no effect.

    Args:
        hidden_size: Features of the hidden states, ``E``.
        memory_dim: Features of a memory token.
        num_heads: Query heads, ``H``.
        num_kv_heads: Key and value heads, ``Hkv``, a divisor of ``num_heads``; None means equal.
        inner_size: Features of all query heads together, ``H * D``; None means ``hidden_size``.
        projection_rank: Rank of the four projections; None means full rank.
        combine: ``"joint"``, one softmax over all selected chapters, or ``"independent"``, one for
            each.
        kv_bits: 8 or 4: keys and values are quantised after their projection, with straight-through
            gradients. None: not quantised.
        zero_output: Whether the output projection starts at zero.
        backend: Backend of the operator, ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.

    Example:
        >>> bank = StandardMemoryBank(num_tokens=64, memory_dim=32, num_chapters=4)
        >>> attention = MemoryCrossAttention(48, 32, num_heads=3, zero_output=False)
        >>> indices = torch.tensor([[0, 2], [1, -1]])  # of two sequences
        >>> attention(torch.randn(2, 10, 48), bank, indices).shape
        torch.Size([2, 10, 48])
    """

    def __init__(
        self,
        hidden_size: int,
        memory_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        inner_size: int | None = None,
        projection_rank: int | None = None,
        combine: str = "joint",
        kv_bits: int | None = None,
        zero_output: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        inner_size = hidden_size if inner_size is None else inner_size
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, size in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            check_int(name, size, 1)
        if inner_size % num_heads:
            must("num_heads", f"divide inner_size={inner_size}", num_heads)
        if num_heads % num_kv_heads:
            must("num_kv_heads", f"divide num_heads={num_heads}", num_kv_heads)
        if combine not in COMBINE:
            must("combine", f"be one of {', '.join(COMBINE)}", repr(combine))
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = inner_size // num_heads
        if kv_bits not in (None, *LARGEST):
            must("kv_bits", f"be None or one of {', '.join(map(str, LARGEST))}", kv_bits)
        self.combine = combine
        self.kv_bits = kv_bits
        self.backend = backend
        kv_size = num_kv_heads * self.head_dim

        def linear(
            in_features: int, out_features: int, last: type[nn.Linear] | None = None
        ) -> nn.Linear | LowRankLinear:
            if projection_rank is None:
                plain = nn.Linear(in_features, out_features, bias=False)
                return plain if last is None else last(in_features, out_features)
            up = None if last is None else last(projection_rank, out_features)
            return LowRankLinear(in_features, out_features, projection_rank, up)

        self.q_proj = linear(hidden_size, inner_size)
        self.k_proj = linear(memory_dim, kv_size)
        self.v_proj = linear(memory_dim, kv_size)
        self.o_proj = linear(inner_size, hidden_size, ZeroLinear if zero_output else None)

    def project(self, bank: MemoryBank, chapters: Tensor | None = None) -> ProjectedChapters:
        """Keys and values of a bank's chapters, ``[U, Hkv, M, D]`` each.

        Args:
            bank: The bank.
            chapters: int64 ``[U]``, indices of the chapters; None means all.
        """
        rows = bank.stored(chapters, self.dtype)  # read once for keys and values
        return self._of_heads(
            self._project(bank, rows, self.k_proj), self._project(bank, rows, self.v_proj)
        )

    def project_states(self, states: Tensor) -> ProjectedChapters:
        """Keys and values ``[1, Hkv, n, D]`` of one chapter with the given memory tokens.

        Args:
            states: ``[n, memory_dim]``, in the dtype of the weights.
        """
        return self._of_heads(self.k_proj(states)[None], self.v_proj(states)[None])

    def _of_heads(self, key: Tensor, value: Tensor) -> ProjectedChapters:
        """Split projected rows ``[U, M, Hkv * D]`` into heads; quantise them with ``kv_bits``."""
        key, value = (
            rearrange(states, "u m (h d) -> u h m d", d=self.head_dim) for states in (key, value)
        )
        if self.kv_bits is None:
            return ProjectedChapters(key, value)
        (key_codes, key_scale), (value_codes, value_scale) = (
            quantize_rows(states, self.kv_bits) for states in (key, value)
        )
        if not torch.is_grad_enabled():
            return ProjectedChapters(key_codes, value_codes, key_scale, value_scale)

        def seen(states: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
            return states + (dequantize_rows(codes, scale, states.dtype) - states).detach()

        return ProjectedChapters(
            seen(key, key_codes, key_scale), seen(value, value_codes, value_scale)
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the projections."""
        return next(self.k_proj.parameters()).dtype

    @staticmethod
    def _project(bank: MemoryBank, rows: Tensor, proj: nn.Linear | LowRankLinear) -> Tensor:
        if type(proj) is LowRankLinear:
            return proj.up(MemoryCrossAttention._project(bank, rows, proj.down))
        if type(proj) is nn.Linear:
            return bank.project_rows(rows, proj.weight)
        return proj(bank.expand_rows(rows))  # with an adapter, such as LoRA

    def forward(
        self,
        hidden_states: Tensor,
        bank: MemoryBank,
        indices: Tensor,
        weights: Tensor | None = None,
        *,
        projected: ProjectedChapters | None = None,
        open_chapters: Sequence[tuple[ProjectedChapters, float]] = (),
        open_bounds: Mapping[str, Any] | None = None,
        routing_block: int | None = None,
        seq_start: Tensor | None = None,
        seq_end: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        query_offset: int = 0,
    ) -> Tensor:
        """Attend from ``hidden_states [B, T, E]`` and return ``[B, T, E]``.

        Args:
            hidden_states: ``[B, T, E]``.
            bank: The bank with ``C`` chapters.
            indices: Selected chapters, in the form of ``chapter_attention``.
            weights: Their weights, float32, the shape of the indices; None means 1.
            projected: Keys and values of all chapters, if already computed.
            open_chapters: Further chapters of any length that every token attends to, each with a
                weight; 1 is the weight of one chapter of the bank (see ``mix_chapters``).
            open_bounds: ``seq_start`` and ``seq_end`` for them, in columns of this call.
            routing_block: As in ``chapter_attention``, like all arguments below.
            seq_start: int32 ``[B]``.
            seq_end: int32 ``[B]``.
            cu_seqlens: int32 ``[n + 1]``.
            query_offset: Position of the first query.
        """
        check_rank("hidden_states", hidden_states, "B T E")
        query = rearrange(self.q_proj(hidden_states), "b t (h d) -> b h t d", d=self.head_dim)
        if projected is None:
            chapters = None
            if resolve_backend(self.backend, query) != "reference":
                # the reference sums in the order of the bank, which must not depend on the batch
                chapters, indices = selected_union(indices, bank.num_chapters)
            projected = self.project(bank, chapters)
        bank_output = self._attend(
            query,
            projected,
            indices,
            weights,
            routing_block=routing_block,
            seq_start=seq_start,
            seq_end=seq_end,
            cu_seqlens=cu_seqlens,
            query_offset=query_offset,
        )
        out = bank_output.out
        if open_chapters:
            every = indices.new_zeros(query.shape[0], 1)
            others: list[tuple[AttentionOutput, float]] = []
            for chapter, weight in open_chapters:
                output = self._attend(query, chapter, every, None, **open_bounds or {})
                # a chapter weighs as much as one of the bank, whatever its length
                times = bank.tokens_per_chapter / chapter.key.shape[2] if self.is_joint else 1.0
                others.append((output, weight * times))
            out = mix_chapters(bank_output, others, joint=self.is_joint)
        return self.o_proj(rearrange(out, "b h t d -> b t (h d)"))

    @property
    def is_joint(self) -> bool:
        """Whether all chapters share one softmax."""
        return self.combine == "joint"

    def _attend(
        self,
        query: Tensor,
        projected: ProjectedChapters,
        indices: Tensor,
        weights: Tensor | None,
        **options: Any,
    ) -> AttentionOutput:
        return chapter_attention(
            query,
            projected.key,
            projected.value,
            indices,
            weights,
            combine=self.combine,
            key_scale=projected.key_scale,
            value_scale=projected.value_scale,
            backend=self.backend,
            **options,
        )

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, {self.combine}"


class MemoryBanks(nn.Module):
    """The memory banks of a model, shared by its memory layers."""

    def __init__(self, banks: list[MemoryBank]) -> None:
        super().__init__()
        self.banks = nn.ModuleList(banks)


class ChapterMemory(nn.Module):
    """The modules of one layer: router, cross-attention, and for variant B an MLP.

    Args:
        router: Selects chapters; None if every token sees all of them.
        attention: Attends to the selected chapters.
        bank_index: Index of the bank that it reads.
        mlp_norm: Norm before the MLP; given together with ``mlp``.
        mlp: MLP after the memory; its output projection should start at zero, as the attention's.
    """

    def __init__(
        self,
        router: ChapterRouter | None,
        attention: MemoryCrossAttention,
        bank_index: int,
        mlp_norm: nn.Module | None = None,
        mlp: SwiGLU | GELUMLP | None = None,
    ) -> None:
        super().__init__()
        self.router = router
        self.attention = attention
        self.bank_index = bank_index
        self.mlp_norm = mlp_norm
        self.mlp = mlp


def selected_union(indices: Tensor, num_chapters: int) -> tuple[Tensor | None, Tensor]:
    """The chapters that any row selected, and the indices renumbered to them.

    The union has the static size ``min(C, number of indices)``, padded with chapters that no row
    selected. If that is all chapters, or in a program exported for any number of indices, the
    indices are unchanged.

    Returns:
        int64 ``[U]``, ascending among the selected ones, or None for all; and int32 indices.
    """
    if torch.compiler.is_exporting() or indices.numel() >= num_chapters:
        return None, indices
    flat = indices.long().flatten()
    # one more entry for the empty slots
    slot = torch.where(flat < 0, num_chapters, flat)
    used = torch.zeros(num_chapters + 1, dtype=torch.bool, device=indices.device)
    used = used.index_fill(0, slot, True)[:num_chapters]
    order = torch.sort(~used, stable=True).indices
    place = torch.empty_like(order).scatter_(
        0, order, torch.arange(num_chapters, device=order.device)
    )
    place = torch.where(flat < 0, -1, place[flat.clamp(min=0)])
    return order[: indices.numel()], place.view_as(indices).int()
