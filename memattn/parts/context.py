"""What a part is told about the tokens that it gets."""

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


@dataclass
class PartContext:
    """Everything about one call of the model, seen from one part in one layer.

    Attributes:
        positions: int64 ``[B, T]`` or ``[1, T]``, each token's place in its own sequence.
        present: bool ``[B, T]``, False for padding; None where every token is there.
        bounds: The same as bounds, in columns of the keys that the state keeps, new ones behind.
        cu_seqlens: int32 ``[n+1]``, bounds of packed documents, or None.
        offset: Columns before the first one here: those that the cache has seen.
        rotary: Cosines and sines of ``positions``, or None where positions are not rotary.
        rotary_embedding: What makes such of other positions.
        measure_losses: Whether the part is to return its losses.
        residual: The hidden states ``[B, T, E]`` before the norm, which the output is added to.
        shared_module: The module that the part's layers share, or None.
        state: What the sequences keep of this part in this layer, or None without a cache.
        carry: What the layers before handed on, by name.
        library: The chapters of texts that the model keeps, or None.
        chapters: What the part keeps in this layer of those that are open.
        shared: What ``once`` remembers in this call of the model.
        handed: What a module of the part hands on to the next layer, for ``PartOutput.carry``.
        attended: Output ``[B, T, E]`` of attention and of the parts beside it that ran before, for
            a part that stands beside attention; else None.
        base: The module of attention itself, for such a part; else None.
        inputs: What the caller of the model gave to parts, by the names of ``PartConfig.inputs``.
        order: The order in which columns of the caller stand here, where rows have holes or
            hold several documents.
        newest_only: Whether the caller wants logits of the newest tokens alone, as generation does.
        newest: Tokens, counted from the last, whose output of this layer anyone looks at; None is
            all. Only a layer without further parts is told, and no part is.
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
    carry: Mapping[str, Tensor] = field(default_factory=dict)
    library: Chapters | None = None
    chapters: tuple[OpenChapter, ...] = ()
    shared: dict[Any, Any] = field(default_factory=dict)
    handed: dict[str, Tensor] = field(default_factory=dict)
    attended: Tensor | None = None
    base: nn.Module | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
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
        """The same for one part, with what is its own."""
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
        """Keywords that every attention module of ``memattn.nn`` takes."""
        return dict(rotary=self.rotary, cache=self.state, **self.sequence_bounds())

    def sequence_bounds(self) -> dict[str, Tensor | None]:
        """Keywords of operators that say where sequences and documents begin and end."""
        return dict(
            cu_seqlens=self.cu_seqlens,
            seq_start=self.bounds.seq_start,
            seq_end=self.bounds.seq_end,
        )

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What ``compute`` returns, computed by the first layer that asks in this call."""
        if key not in self.shared:
            self.shared[key] = compute()
        return self.shared[key]

    def lengths(self) -> Tensor:
        """Tokens so far of each token's own sequence, int64 ``[B or 1, 1 or T]``."""
        if self.cu_seqlens is not None:
            bounds = self.cu_seqlens.long()
            columns = torch.arange(self.positions.shape[1], device=bounds.device)
            document = torch.searchsorted(bounds[1:], columns, right=True)
            return bounds.diff()[document.clamp(max=bounds.numel() - 2)][None]
        positions = self.positions
        if self.present is not None:
            positions = positions.masked_fill(~self.present, -1)
        return positions.amax(1, keepdim=True) + 1
