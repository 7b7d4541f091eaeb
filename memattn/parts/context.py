"""The context of a call that a part receives with its hidden states."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memattn.nn import RotaryEmbedding
from memattn.parts.chapters import Chapters, OpenChapter
from memattn.parts.packing import PackedRows
from memattn.parts.state import PartState, SequenceBounds
from memattn.parts.token_order import TokenOrder

Angles = tuple[Tensor, Tensor]


def _no_tensors() -> dict[str, Tensor]:
    return {}


@dataclass
class PartContext:
    """One call of the model, as one part in one layer needs to know it.

    Attributes:
        positions: int64 ``[B, T]`` or ``[1, T]``, each token's place in its own sequence.
        present: bool ``[B, T]``, False for padding; None without padding.
        bounds: First and last column of each sequence among the kept keys and the new ones.
        cu_seqlens: int32 ``[n+1]``, bounds of packed documents, or None.
        offset: Columns that the cache has seen before this call.
        rotary: Cosines and sines of ``positions``; None if positions are not rotary.
        rotary_embedding: Module that computes them for other positions.
        measure_losses: Whether the part is to return its losses.
        residual: The hidden states ``[B, T, E]`` before the norm; the output is added to them.
        shared_module: The module that the part's layers share, or None.
        state: The cached state of this part in this layer; None without a cache.
        carry: Tensors passed on by the layers before, by name.
        library: The chapters of texts that the model keeps, or None.
        chapters: The open chapters of this part in this layer.
        shared: Results that ``once`` caches in this call of the model.
        handed: Tensors that the part's module passes to the next layer, for ``PartOutput.carry``.
        attended: For a part beside attention: the output ``[B, T, E]`` of attention and of such
            parts that ran before; else None.
        base: For a part beside attention: the attention module; else None.
        inputs: Extra tensors from the caller of the model, by the names of ``PartConfig.inputs``.
        order: The order of the caller's columns in this call, if rows have holes or hold several
            documents.
        newest_only: Whether the caller needs only the logits of the newest tokens, as in
            generation.
        newest: Number of last tokens whose output of this layer is needed; None means all. Set only
            for layers without further parts.
    """

    positions: Tensor
    present: Tensor | None = None
    bounds: SequenceBounds = SequenceBounds(None, None)
    cu_seqlens: Tensor | None = None
    offset: int = 0
    rotary: Angles | None = None
    rotary_embedding: RotaryEmbedding | None = None
    measure_losses: bool = False
    residual: Tensor | None = None
    shared_module: nn.Module | None = None
    state: PartState | None = None
    carry: Mapping[str, Tensor] = field(default_factory=_no_tensors)
    library: Chapters | None = None
    chapters: tuple[OpenChapter, ...] = ()
    shared: dict[Any, Any] = field(default_factory=dict)
    handed: dict[str, Tensor] = field(default_factory=dict)
    attended: Tensor | None = None
    base: nn.Module | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=_no_tensors)
    order: TokenOrder | PackedRows | None = None
    newest_only: bool = False
    newest: int | None = None

    def of_part(
        self,
        state: PartState | None,
        carry: Mapping[str, Tensor],
        residual: Tensor | None = None,
        shared_module: nn.Module | None = None,
        chapters: tuple[OpenChapter, ...] = (),
        attended: Tensor | None = None,
        base: nn.Module | None = None,
    ) -> "PartContext":
        """This context for one part, with the part's own fields."""
        return PartContext(
            positions=self.positions,
            present=self.present,
            bounds=self.bounds if state is None else state.bounds,
            cu_seqlens=self.cu_seqlens,
            offset=self.offset,
            rotary=self.rotary,
            rotary_embedding=self.rotary_embedding,
            measure_losses=self.measure_losses,
            residual=residual,
            shared_module=shared_module,
            state=state,
            carry=carry,
            library=self.library,
            chapters=chapters,
            shared=self.shared,
            attended=attended,
            base=base,
            inputs=self.inputs,
            order=self.order,
        )

    def attention_inputs(self) -> dict[str, Any]:
        """Arguments that every attention module of ``memattn.nn`` takes."""
        return dict(rotary=self.rotary, cache=self.state, **self.sequence_bounds())

    def sequence_bounds(self) -> dict[str, Tensor | None]:
        """Arguments of operators that give the bounds of sequences and documents."""
        return dict(
            cu_seqlens=self.cu_seqlens,
            seq_start=self.bounds.seq_start,
            seq_end=self.bounds.seq_end,
        )

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """The result of ``compute``, computed once in this call of the model."""
        if key not in self.shared:
            self.shared[key] = compute()
        return self.shared[key]

    def lengths(self) -> Tensor:
        """Tokens so far in each token's sequence, int64 ``[B or 1, 1 or T]``."""
        if self.cu_seqlens is not None:
            bounds = self.cu_seqlens.long()
            columns = torch.arange(self.positions.shape[1], device=bounds.device)
            document = torch.searchsorted(bounds[1:], columns, right=True)
            return bounds.diff()[document.clamp(max=bounds.numel() - 2)][None]
        positions = self.positions
        if self.present is not None:
            positions = positions.masked_fill(~self.present, -1)
        return positions.amax(1, keepdim=True) + 1
