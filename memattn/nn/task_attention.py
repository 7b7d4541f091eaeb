"""Attention over the columns of a task graph; each task has its own projections."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from memattn.checks import check_int, check_string, must
from memattn.nn.task_linear import TaskGroups, TaskLinear
from memattn.ops import TaskMask, task_masked_attention
from memattn.ops._dispatch import BACKENDS


@dataclass(frozen=True)
class ColumnLayout:
    """The arrangement of a batch's columns in sequences.

    A *column* is what one task computes from one sample: ``[L, E]``. The sequence of a sample is
    its own column followed by the columns that its task reads, ``C`` in all. Shorter sequences are
    padded with columns that no query sees. Own columns are sorted by task, and so are read columns.
    """

    own: TaskGroups  # B columns, one for each sequence
    read: TaskGroups | None  # R columns; None if no task reads
    read_sample: Tensor  # int64 [R], the sequence that contains a read column
    read_at: Tensor  # int64 [R], its index in [B, C - 1]
    read_slot: Tensor  # int64 [B, C - 1], the inverse; 0 for padding
    mask: TaskMask  # one mask for each task of the batch, over C * L positions
    mask_row: Tensor  # int32 [B]

    def join(self, own: Tensor, read: Tensor | None) -> Tensor:
        """Sequences ``[B, C * L, E]`` of own columns ``[B, L, E]`` and read ones ``[R, L, E]``."""
        if read is None:
            return own
        others = read.index_select(0, self.read_slot.flatten())
        others = others.view(*self.read_slot.shape, *read.shape[1:])
        return rearrange(torch.cat([own[:, None], others], 1), "b c l e -> b (c l) e")

    def split(self, sequences: Tensor) -> tuple[Tensor, Tensor | None]:
        """The inverse of ``join``; read columns are detached."""
        if self.read is None:
            return sequences, None
        n_columns = self.read_slot.shape[1] + 1
        columns = rearrange(sequences, "b (c l) e -> b c l e", c=n_columns)
        others = rearrange(columns.detach()[:, 1:], "b c l e -> (b c) l e")
        return columns[:, 0], others.index_select(0, self.read_at)


class TaskGraphAttention(nn.Module):
    """Multi-head attention with query, key, value and output projections of each task.

    Args:
        hidden_size: Features of the hidden states, ``E``.
        num_heads: Heads, ``H``.
        rank: Rank of the projections; None for full ones.
        backend: Backend of ``memattn.task_masked_attention``.

    Raises:
        TypeError: If an argument has the wrong Python type.
        ValueError: If heads do not divide, a size is below 1, or ``backend`` is unknown.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, *, rank: int | None = None, backend: str = "auto"
    ) -> None:
        super().__init__()
        check_int("hidden_size", hidden_size, 1)
        check_int("num_heads", num_heads, 1)
        if hidden_size % num_heads:
            must("hidden_size", f"be divisible by num_heads={num_heads}", hidden_size)
        check_string("backend", backend, BACKENDS)
        if backend not in BACKENDS:
            must("backend", f"be one of {', '.join(BACKENDS)}", repr(backend))
        self.num_heads = num_heads
        self.backend = backend
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            TaskLinear(0, hidden_size, hidden_size, rank=rank) for _ in range(4)
        )

    def forward(
        self, own: Tensor, read: Tensor | None, layout: ColumnLayout
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over own columns ``[B, L, E]`` and read ones ``[R, L, E]``, and return both.

        Read columns get no gradient.
        """
        query, key, value = (
            self.project(proj, own, read, layout)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = task_masked_attention(
            query, key, value, layout.mask, layout.mask_row, backend=self.backend
        ).out
        own, read = layout.split(rearrange(out, "b h s d -> b s (h d)"))
        return self.o_proj(own, layout.own), self._frozen(self.o_proj, read, layout)

    def project(
        self, proj: TaskLinear, own: Tensor, read: Tensor | None, layout: ColumnLayout
    ) -> Tensor:
        """Heads ``[B, H, C * L, D]`` of one of this layer's projections, of all columns."""
        joined = layout.join(proj(own, layout.own), self._frozen(proj, read, layout))
        return rearrange(joined, "b s (h d) -> b h s d", h=self.num_heads)

    def _frozen(self, proj: TaskLinear, read: Tensor | None, layout: ColumnLayout) -> Tensor | None:
        if read is None or layout.read is None:
            return None
        with torch.no_grad():
            return proj(read, layout.read)
