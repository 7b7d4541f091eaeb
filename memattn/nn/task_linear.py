"""Linear layers with a weight for each task, applied to a batch that mixes tasks."""

from collections import Counter
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.checks import (
    check_bool,
    check_int,
    check_like,
    check_rank,
    check_shape,
    check_tensor,
    check_type,
    must,
    plain_values,
)
from memattn.ops._attention import autocast


class TaskGroups(NamedTuple):
    """The rows of a batch grouped by task, computed once by ``group_by_task`` for many layers."""

    tasks: tuple[int, ...]  # tasks of the batch, ascending
    sizes: tuple[int, ...]  # rows of each
    order: Tensor | None  # int64 [B], row indices sorted by task; None if already sorted

    @property
    def n_rows(self) -> int:
        """Rows of the batch."""
        return sum(self.sizes)

    def sort(self, x: Tensor) -> Tensor:
        """The rows ``[B, ...]`` sorted by task."""
        return x if self.order is None else x.index_select(0, self.order)

    def unsort(self, x: Tensor) -> Tensor:
        """Undo ``sort``: the rows in their original order."""
        return x if self.order is None else x.index_select(0, self.order.argsort())


def group_by_task(task_id: int | Tensor, n_rows: int) -> TaskGroups:
    """Group the rows of a batch by task.

    Args:
        task_id: The task of all rows, an integer or an int32 or int64 tensor without axes; or of
            each row, ``[B]``. Values of a tensor are read on the host, which waits for a CUDA
            device.
        n_rows: Rows of the batch, B.

    Raises:
        TypeError: If ``task_id`` is neither an integer nor a tensor.
        ValueError: If its dtype or its shape does not fit.
    """
    if not isinstance(task_id, Tensor):
        if isinstance(task_id, bool):
            must("task_id", "be an integer or a tensor", "bool", TypeError)
        check_type("task_id", task_id, Integral, "be an integer or a tensor")
        return TaskGroups((int(task_id),), (n_rows,), None)
    if task_id.dtype not in (torch.int32, torch.int64):
        must("task_id", "have dtype torch.int32 or torch.int64", task_id.dtype)
    if task_id.dim() == 0:
        return TaskGroups((int(task_id),), (n_rows,), None)
    if list(task_id.shape) != [n_rows]:
        must("task_id", f"be an integer or have shape [B={n_rows}]", list(task_id.shape))
    sizes = sorted(Counter(plain_values(task_id)).items())
    in_order = bool((task_id.diff() >= 0).all())
    order = None if in_order else task_id.argsort(stable=True)
    return TaskGroups(tuple(task for task, _ in sizes), tuple(size for _, size in sizes), order)


class TaskLinear(nn.Module):
    """``y = x W_t^T + b_t`` with a weight ``W_t`` for each task ``t``.

    A batch may mix tasks: its rows are sorted by task, and each task's rows are one group of a
    single grouped matrix product (PyTorch's, if it supports device and dtype; else one product per
    task over slices of the sorted rows). No weight is copied per sample.

    Every task has its own parameters, which can be frozen, saved and optimised separately. A task
    that is not in the batch gets no gradient (its ``grad`` stays None).

    Args:
        n_tasks: Initial number of tasks, numbered from 0; ``add_task`` adds more.
        in_features: Features of the input.
        out_features: Features of the output.
        rank: Rank of a weight ``W_t = B_t A_t``; None for full weights.
        bias: Whether each task has a bias.
        shared_weight: Frozen weight ``[out_features, in_features]`` that is added to each task's,
            for a ``rank``. ``B_t`` then starts at 0, so that a new task starts as the shared
            weight.

    Raises:
        TypeError: If an argument has the wrong Python type.
        ValueError: If a size is below its minimum, or ``shared_weight`` has another shape or comes
            without ``rank``.

    Example:
        >>> linear = TaskLinear(3, 16, 8)
        >>> linear(torch.randn(4, 5, 16), torch.tensor([2, 0, 2, 1])).shape
        torch.Size([4, 5, 8])
        >>> linear.weight.shape
        torch.Size([3, 8, 16])
    """

    shared_weight: Tensor | None
    _place: Tensor

    def __init__(
        self,
        n_tasks: int,
        in_features: int,
        out_features: int,
        *,
        rank: int | None = None,
        bias: bool = True,
        shared_weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_int("n_tasks", n_tasks, 0)
        check_int("in_features", in_features, 1)
        check_int("out_features", out_features, 1)
        check_bool("bias", bias)
        if rank is not None:
            check_int("rank", rank, 1)
        if shared_weight is not None:
            if rank is None:
                must("shared_weight", "come with a rank", "rank=None")
            check_tensor("shared_weight", shared_weight)
            check_shape("shared_weight", shared_weight, out=out_features, d_in=in_features)
            shared_weight = shared_weight.detach().clone()
        self.in_features, self.out_features = in_features, out_features
        self.rank = rank
        self.register_buffer("shared_weight", shared_weight)
        self.full = nn.ParameterDict() if rank is None else None
        self.down = None if rank is None else nn.ParameterDict()  # A_t
        self.up = None if rank is None else nn.ParameterDict()  # B_t
        self.bias = nn.ParameterDict() if bias else None
        self._tasks: list[int] = []
        # keeps dtype and device of a layer without tasks
        self.register_buffer("_place", torch.empty(0), persistent=False)
        for _ in range(n_tasks):
            self.add_task()

    @property
    def tasks(self) -> tuple[int, ...]:
        """The tasks, in the order in which they were added."""
        return tuple(self._tasks)

    @property
    def weight(self) -> Tensor:
        """The weights of all tasks, ``[N, out_features, in_features]``: a differentiable copy."""
        if not self._tasks:
            return self._place.new_empty(0, self.out_features, self.in_features)
        if self.full is not None:
            return torch.stack(self._of(self.full, self._tasks))
        assert self.up is not None and self.down is not None
        up, down = (torch.stack(self._of(p, self._tasks)) for p in (self.up, self.down))
        return up @ down if self.shared_weight is None else self.shared_weight + up @ down

    def add_task(self, task: int | None = None, *, init_from: int | None = None) -> int:
        """Add a task with its parameters, and return its number.

        Args:
            task: Its number; None for the next one.
            init_from: A task whose parameters it starts with, copied; None draws them as
                ``torch.nn.Linear`` does.

        Raises:
            ValueError: If ``task`` exists, or ``init_from`` does not.
        """
        task = max(self._tasks, default=-1) + 1 if task is None else task
        check_int("task", task, 0)
        if task in self._tasks:
            must("task", "be a new one", task)
        if init_from is not None:
            self._check_task("init_from", init_from)
        for name, parameters in self._kinds():
            if init_from is None:
                value = self._draw(name).to(self._place)
            else:
                value = parameters[str(init_from)].detach().clone()
            parameters[str(task)] = nn.Parameter(value)
        self._tasks.append(task)
        return task

    def remove_task(self, task: int) -> None:
        """Remove a task and its parameters.

        Raises:
            ValueError: If there is no such task.
        """
        self._check_task("task", task)
        for _, parameters in self._kinds():
            del parameters[str(task)]
        self._tasks.remove(task)

    def task_parameters(self, task: int) -> dict[str, nn.Parameter]:
        """The parameters of one task: ``weight``, or ``down`` and ``up``, and ``bias``.

        Raises:
            ValueError: If there is no such task.
        """
        self._check_task("task", task)
        return {name: parameters[str(task)] for name, parameters in self._kinds()}

    def forward(self, x: Tensor, task_id: int | Tensor | TaskGroups) -> Tensor:
        """Map ``[B, ..., in_features]`` to ``[B, ..., out_features]``.

        Args:
            x: ``[B, ..., in_features]``, in the dtype of the weights (any under autocast).
            task_id: The task of all rows, or of each: int32 or int64 ``[B]``; or the
                ``TaskGroups`` of a batch whose rows ``x`` are *already sorted* by task.

        Raises:
            TypeError: If ``x`` or ``task_id`` has the wrong Python type.
            ValueError: If a shape, the dtype or the device of ``x`` does not fit, or a task does
                not exist.
        """
        check_tensor("x", x)
        if x.dim() < 2 or x.shape[-1] != self.in_features:
            must("x", f"have shape [B, ..., {self.in_features}]", list(x.shape))
        if isinstance(task_id, TaskGroups):
            return self._forward_sorted(x, task_id)
        groups = group_by_task(task_id, x.shape[0])
        return groups.unsort(self._forward_sorted(groups.sort(x), groups))

    def _forward_sorted(self, x: Tensor, groups: TaskGroups) -> Tensor:
        if groups.n_rows != x.shape[0]:
            must("task_id", f"have B={x.shape[0]} rows", groups.n_rows)
        for task in groups.tasks:
            self._check_task("task_id", task)
        if not groups.tasks:  # an empty batch of no task
            return F.linear(x, x.new_zeros(self.out_features, self.in_features))
        inner = x.shape[1:-1].numel()
        sizes = [size * inner for size in groups.sizes]
        rows = x.reshape(sum(sizes), self.in_features)
        factors = self.full if self.up is None else self.down
        assert factors is not None
        first = self._of(factors, groups.tasks)
        # a slice without rows: casting it under autocast costs nothing
        check_like("x", autocast(x[:0]), "the weights", autocast(first[0][:0]))
        bias = None if self.bias is None else self._of(self.bias, groups.tasks)
        if self.up is None:
            out = grouped_linear(rows, sizes, first, bias)
        else:
            low = grouped_linear(rows, sizes, first)
            out = grouped_linear(low, sizes, self._of(self.up, groups.tasks), bias)
            if self.shared_weight is not None:
                out = out + F.linear(rows, self.shared_weight)
        return out.view(*x.shape[:-1], self.out_features)

    def _kinds(self) -> Iterator[tuple[str, nn.ParameterDict]]:
        named = dict(weight=self.full, down=self.down, up=self.up, bias=self.bias)
        return ((name, kind) for name, kind in named.items() if kind is not None)

    def _of(self, parameters: nn.ParameterDict, tasks: Sequence[int]) -> list[Tensor]:
        # use the integer in the layer's own list: torch.compile may trace a task as a symbol
        own = (self._tasks[self._tasks.index(task)] for task in tasks)
        return [parameters[str(task)] for task in own]

    def _draw(self, name: str) -> Tensor:
        """Initial values as those of ``torch.nn.Linear``: uniform, below ``1/sqrt(inputs)``."""
        rank = self.rank or 0
        shape, inputs = {
            "weight": ((self.out_features, self.in_features), self.in_features),
            "bias": ((self.out_features,), self.in_features),
            "down": ((rank, self.in_features), self.in_features),
            "up": ((self.out_features, rank), rank),
        }[name]
        if name == "up" and self.shared_weight is not None:
            return torch.zeros(shape)
        bound = inputs**-0.5
        # compensates that the product of two drawn matrices is smaller by a factor of sqrt(3)
        bound *= 3**0.5 if name == "up" else 1.0
        return torch.empty(shape).uniform_(-bound, bound)

    def _check_task(self, name: str, task: int) -> None:
        if task not in self._tasks:
            must(name, f"be one of the tasks {self._tasks}", task)

    def extra_repr(self) -> str:
        return (
            f"tasks={self._tasks}, in_features={self.in_features}, "
            f"out_features={self.out_features}, rank={self.rank}, bias={self.bias is not None}"
        )


def grouped_linear(
    rows: Tensor, sizes: Sequence[int], weights: list[Tensor], bias: list[Tensor] | None = None
) -> Tensor:
    """``torch.nn.functional.linear`` with a weight for each group of consecutive rows.

    Args:
        rows: ``[R, d_in]``.
        sizes: Rows of each group; their sum is R.
        weights: The weight of each group, ``[d_out, d_in]``.
        bias: The bias of each group, ``[d_out]``, or None.

    Returns:
        ``[R, d_out]``.
    """
    check_rank("rows", rows, "R d_in")
    if len(weights) == 1:
        return F.linear(rows, weights[0], None if bias is None else bias[0])
    rows, stackable = autocast(rows), [autocast(weight) for weight in weights]
    if not _takes_grouped_mm(rows, stackable[0]):
        biases = [None] * len(weights) if bias is None else bias
        parts = zip(rows.split_with_sizes(list(sizes)), weights, biases, strict=True)
        return torch.cat([F.linear(*part) for part in parts])
    ends = torch.tensor(sizes).cumsum(0).to(rows.device, torch.int32)
    out = F.grouped_mm(rows.contiguous(), torch.stack(stackable).mT, offs=ends)
    if out.requires_grad:
        # its backward does not support expanded gradients
        out.register_hook(Tensor.contiguous)  # pyright: ignore[reportUnknownMemberType]
    if bias is None:
        return out
    each = torch.tensor(sizes, device=rows.device)
    return out + torch.stack([autocast(b) for b in bias]).repeat_interleave(
        each, 0, output_size=rows.shape[0]
    )


def _takes_grouped_mm(rows: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's grouped product supports these without a loop that waits for the device."""
    if not hasattr(F, "grouped_mm") or rows.shape[0] == 0 or rows.dtype != weight.dtype:
        return False
    if torch.compiler.is_compiling() and rows.dtype != torch.bfloat16:
        return False  # under torch.compile it supports bfloat16 only
    if rows.is_cuda:
        if rows.dtype != torch.bfloat16 or torch.cuda.get_device_capability(rows.device)[0] < 9:
            return False
    elif rows.device.type != "cpu" or rows.dtype not in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ):
        return False
    # rows of both operands and of the result start at multiples of 16 bytes
    sizes = (*weight.shape, rows.storage_offset())
    return all(size * rows.element_size() % 16 == 0 for size in sizes)
