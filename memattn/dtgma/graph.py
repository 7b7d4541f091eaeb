"""The graph of tasks: which columns a task reads, and how a batch's columns are laid out."""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from memattn.nn.task_attention import ColumnLayout
from memattn.nn.task_linear import TaskGroups
from memattn.ops import TaskMask

_CACHED_MASKS = 64


class TaskGraph:
    """Read-only edges between tasks, which are numbered in the order of registration.

    Edges run from later to earlier tasks only, so there are no cycles.
    """

    def __init__(self) -> None:
        self._reads: dict[int, tuple[int, ...]] = {}
        self._masks: dict[tuple, TaskMask] = {}

    def add(self, task: int, reads: tuple[int, ...]) -> None:
        """Add a task that reads these."""
        self._reads[task] = tuple(sorted(reads))

    def remove(self, task: int) -> None:
        """Remove a task that no other reads."""
        del self._reads[task]
        self.forget_masks()

    def forget_masks(self) -> None:
        """Drop the masks that were built, after a change to what they were built from."""
        self._masks.clear()

    def reads(self, task: int) -> tuple[int, ...]:
        """Tasks that a task reads itself."""
        return self._reads[task]

    def readers(self, task: int) -> list[int]:
        """Tasks that read a task."""
        return [other for other, reads in self._reads.items() if task in reads]

    def columns(self, task: int) -> list[int]:
        """The columns of a task's sequence: its own, then all that it reads, however indirectly."""
        found, pending = set(), list(self._reads[task])
        while pending:
            other = pending.pop()
            if other not in found:
                found.add(other)
                pending += self._reads[other]
        return [task, *sorted(found)]

    def layout(
        self,
        own: TaskGroups,
        length: int,
        own_mask: Callable[[int], Tensor | None],
        device: torch.device,
    ) -> ColumnLayout:
        """The layout of a batch whose rows are sorted as ``own`` says.

        Args:
            own: Tasks of the batch.
            length: Tokens L of a column.
            own_mask: The mask of a task's column, bool ``[L, L]`` or ``[H, L, L]``, or None.
            device: Where the layout is wanted.
        """
        columns = [self.columns(task) for task in own.tasks]
        n_read = max(map(len, columns)) - 1
        starts = [0, *accumulate(own.sizes)]
        slots: dict[int, list[Tensor]] = {}  # places in [B, C - 1] of each task that is read
        for start, end, tasks in zip(starts, starts[1:], columns, strict=False):
            for slot, task in enumerate(tasks[1:]):
                at = torch.arange(start, end) * n_read + slot
                slots.setdefault(task, []).append(at)
        placed = {task: torch.cat(slots[task]) for task in sorted(slots)}
        read_at = torch.cat(list(placed.values())) if placed else torch.empty(0, dtype=torch.long)
        read_slot = torch.zeros(own.n_rows * n_read, dtype=torch.long)
        read_slot[read_at] = torch.arange(read_at.numel())
        read = TaskGroups(tuple(placed), tuple(len(at) for at in placed.values()), None)
        mask_row = torch.arange(len(own.tasks)).repeat_interleave(torch.tensor(own.sizes))
        return ColumnLayout(
            own=own,
            read=read if placed else None,
            read_sample=(read_at // max(n_read, 1)).to(device),
            read_at=read_at.to(device),
            read_slot=read_slot.view(own.n_rows, n_read).to(device),
            mask=self._mask(own.tasks, columns, length, own_mask, device),
            mask_row=mask_row.to(device, torch.int32),
        )

    def _mask(
        self,
        tasks: tuple[int, ...],
        columns: list[list[int]],
        length: int,
        own_mask: Callable[[int], Tensor | None],
        device: torch.device,
    ) -> TaskMask:
        """A mask with a row for each of the tasks, built once."""
        key = (tasks, length, device)
        if key not in self._masks:
            if len(self._masks) == _CACHED_MASKS:
                del self._masks[next(iter(self._masks))]  # the oldest
            self._masks[key] = self._build_mask(columns, length, own_mask).to(device)
        return self._masks[key]

    def _build_mask(
        self, columns: list[list[int]], length: int, own_mask: Callable[[int], Tensor | None]
    ) -> TaskMask:
        n_columns = max(map(len, columns))
        edges = torch.zeros(len(columns), n_columns, n_columns, dtype=torch.bool)
        for row, tasks in enumerate(columns):
            for a, task in enumerate(tasks):
                for other in (task, *self._reads[task]):
                    edges[row, a, tasks.index(other)] = True
        own = {task: own_mask(task) for tasks in columns for task in tasks}
        given = [mask for mask in own.values() if mask is not None]
        if not given:
            node = torch.arange(n_columns).repeat_interleave(length)
            return TaskMask.from_graph(edges, node, node)
        heads = max((mask.shape[0] for mask in given if mask.dim() == 3), default=1)
        pairs = edges.repeat_interleave(length, 1).repeat_interleave(length, 2)
        pairs = pairs[:, None].repeat(1, heads, 1, 1)
        for row, tasks in enumerate(columns):
            for a, task in enumerate(tasks):
                mask = own[task]
                if mask is not None:
                    at = slice(a * length, (a + 1) * length)
                    pairs[row, :, at, at] = mask.cpu()
        return TaskMask.from_dense(pairs)
