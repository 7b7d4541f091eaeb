"""The columns of a DTG-MA model: which tasks there are, and what each has outside the layers."""

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.checks import check_tensor, must
from memattn.dtgma.graph import TaskGraph
from memattn.nn.task_attention import ColumnLayout
from memattn.nn.task_linear import TaskGroups, group_by_task

TaskName = int | str


def plain_name(value: Any) -> TaskName | None:
    """A task's name as a plain integer or string, of NumPy's too; None for what is no name."""
    if isinstance(value, str):
        return str(value)
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def listed(names: Sequence[TaskName]) -> str:
    """Names in a message."""
    return ", ".join(map(repr, names))


class TaskColumn(nn.Module):
    """What a task has outside the layers: head, node tokens, mask and prototypes."""

    mask: Tensor | None  # bool [L, L] or [H, L, L]
    prototypes: Tensor | None  # [classes, F]

    def __init__(self, name: TaskName, hidden_dim: int, num_classes: int, n_nodes: int) -> None:
        super().__init__()
        self.name = name
        self.num_classes = num_classes
        self.n_nodes = n_nodes
        self.frozen = False
        self.head = nn.Linear(hidden_dim, num_classes)
        self.nodes = None
        if n_nodes:
            self.nodes = nn.Parameter(torch.randn(n_nodes, hidden_dim) * hidden_dim**-0.5)
        self.register_buffer("mask", None)
        self.register_buffer("prototypes", None)

    def copy_from(self, other: "TaskColumn") -> None:
        """Take over the nodes, and the head if it has as many classes."""
        if other.num_classes == self.num_classes:
            self.head.load_state_dict(other.head.state_dict())
        if self.nodes is not None and other.nodes is not None:
            self.nodes.data.copy_(other.nodes)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **options: Any
    ) -> None:
        """Take over mask and prototypes too, which may be missing on either side."""
        weight = self.head.weight
        for name, dtype in dict(mask=torch.bool, prototypes=weight.dtype).items():
            stored = state_dict.get(prefix + name)
            place = None
            if stored is not None:
                place = torch.empty(stored.shape, dtype=dtype, device=weight.device)
            setattr(self, name, place)
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    def with_nodes(self, tokens: Tensor) -> Tensor:
        """Tokens ``[n, L, E]`` with the node tokens after them."""
        if self.nodes is None:
            return tokens
        return torch.cat([tokens, self.nodes.expand(tokens.shape[0], -1, -1)], 1)

    def classify(self, features: Tensor) -> Tensor:
        """Logits ``[n, classes]`` from a column ``[n, L, E]``.

        Of the mean over node tokens, or over all tokens where there are no nodes.
        """
        if self.nodes is not None:
            features = features[:, -self.nodes.shape[0] :]
        return self.head(features.mean(1))

    def tensors(self) -> dict[str, Tensor]:
        """Mask and prototypes, those that the task has."""
        kept = dict(mask=self.mask, prototypes=self.prototypes)
        return {name: tensor for name, tensor in kept.items() if tensor is not None}


class TaskColumns(nn.ModuleDict):
    """The columns of all tasks by number, with the names of the tasks and the task graph.

    Tasks are numbered in the order of registration.

    Attributes:
        graph: Which tasks read which, by number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph = TaskGraph()
        self._numbers: dict[TaskName, int] = {}  # in the order of registration

    @property
    def names(self) -> tuple[TaskName, ...]:
        """Names of the tasks, in the order of registration."""
        return tuple(self._numbers)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of the tasks, in the order of registration."""
        return tuple(self._numbers.values())

    @property
    def next_number(self) -> int:
        """The number of the next task."""
        return max(self.numbers, default=-1) + 1

    def number(self, argument: str, task: Any) -> int:
        """The number of a task; raises for an unknown one, which ``argument`` names."""
        name = plain_name(task)
        if name is None or name not in self._numbers:
            known = f"({listed(self.names)})" if self._numbers else "(there are none yet)"
            must(argument, f"name registered tasks {known}", repr(task))
        return self._numbers[name]

    def at(self, number: int) -> TaskColumn:
        """The column of a task's number."""
        column = self[str(number)]
        assert isinstance(column, TaskColumn)
        return column

    def of(self, task: Any) -> TaskColumn:
        """The column of a registered task."""
        return self.at(self.number("task", task))

    def names_of(self, numbers: Sequence[int]) -> tuple[TaskName, ...]:
        """Names of tasks by number."""
        return tuple(self.at(number).name for number in numbers)

    def new_name(self, task: Any) -> TaskName:
        """The plain name of a task to register; raises for what is no name or no new one."""
        name = plain_name(task)
        if name is None:
            must("task", "be an integer or a string", type(task).__name__, TypeError)
        if name in self._numbers:
            must("task", "be a new name", repr(name))
        return name

    def frozen_numbers(self, argument: str, tasks: Sequence[TaskName]) -> tuple[int, ...]:
        """Numbers of tasks that are frozen, each once; raises for any other."""
        numbers = {self.number(argument, task): task for task in tasks}
        for number, task in numbers.items():
            if not self.at(number).frozen:
                must(argument, "name frozen tasks (see freeze_task)", repr(task))
        return tuple(numbers)

    def add(self, number: int, column: TaskColumn, reads: tuple[int, ...]) -> None:
        """Add the column of a task that reads these others."""
        self[str(number)] = column
        self.graph.add(number, reads)
        self._numbers[column.name] = number

    def remove(self, number: int) -> None:
        """Drop the column of a task; raises where another task reads it."""
        name = self.at(number).name
        readers = self.names_of(self.graph.readers(number))
        if readers:
            must("task", f"not be read by other tasks ({listed(readers)})", repr(name))
        del self[str(number)]
        self.graph.remove(number)
        del self._numbers[name]

    def groups(self, task_id: Any, x: Tensor) -> TaskGroups:
        """The samples of a batch ``[B, ...]`` by the number of their task."""
        names = task_id.tolist() if isinstance(task_id, Tensor) else task_id
        if isinstance(names, int | str | Integral):
            return group_by_task(self.number("task_id", names), x.shape[0])
        if not isinstance(names, list | tuple):
            must("task_id", "be a name, names or a tensor", type(task_id).__name__, TypeError)
        if len(names) != x.shape[0]:
            must("task_id", f"name one task, or one for each of B={x.shape[0]} samples", len(names))
        numbers = [self.number("task_id", name) for name in names]
        task_numbers = torch.tensor(numbers, dtype=torch.int64, device=x.device)
        return group_by_task(task_numbers, x.shape[0])

    def assemble(
        self, tokens: Tensor, groups: TaskGroups, layout: ColumnLayout
    ) -> tuple[Tensor, Tensor | None]:
        """The columns of a batch, ``[n, L, E]`` each: tokens with the node tokens of their task.

        Args:
            tokens: Tokens ``[B, L, E]``, sorted by task.
            groups: The tasks of the batch.
            layout: Which columns they read.

        Returns:
            The columns of the tasks themselves, and those that they read; None where they read
            none. Read columns get no gradient.
        """
        own = self._with_nodes(tokens, groups)
        if layout.read is None:
            return own, None
        with torch.no_grad():
            return own, self._with_nodes(tokens.index_select(0, layout.read_sample), layout.read)

    def _with_nodes(self, tokens: Tensor, groups: TaskGroups) -> Tensor:
        return torch.cat([column.with_nodes(part) for column, part in self._parts(tokens, groups)])

    def classify(self, features: Tensor, groups: TaskGroups) -> Tensor:
        """Logits ``[n, classes]`` of columns ``[n, L, E]``, sorted by task.

        Rows of tasks with fewer classes than others are filled with minus infinity.
        """
        logits = [column.classify(part) for column, part in self._parts(features, groups)]
        width = max(part.shape[1] for part in logits)
        padded = [F.pad(part, (0, width - part.shape[1]), value=-torch.inf) for part in logits]
        return torch.cat(padded)

    def _parts(self, x: Tensor, groups: TaskGroups) -> Iterator[tuple[TaskColumn, Tensor]]:
        """The rows of each task, sorted as ``groups`` says."""
        columns = (self.at(number) for number in groups.tasks)
        return zip(columns, x.split(list(groups.sizes)), strict=True)

    def layout(self, groups: TaskGroups, length: int, device: torch.device) -> ColumnLayout:
        """How the columns of a batch, each of ``length`` tokens, stand in its sequences."""
        return self.graph.layout(groups, length, lambda n: self._mask(n, length), device)

    def _mask(self, number: int, length: int) -> Tensor | None:
        """The mask of a task's column of ``length`` tokens."""
        column = self.at(number)
        if column.mask is not None and column.mask.shape[-1] != length:
            n_tokens = column.mask.shape[-1] - column.n_nodes
            wanted = f"give the {n_tokens} tokens that the mask of task {column.name!r} is for"
            must("x", f"{wanted} (see set_mask)", length - column.n_nodes)
        return column.mask

    def described(self) -> list[str]:
        """A line about each task."""
        lines = []
        for number in self.numbers:
            column, reads = self.at(number), self.names_of(self.graph.reads(number))
            state = "frozen" if column.frozen else "trainable"
            line = f"  task {column.name!r}: {column.num_classes} classes, {state}"
            lines.append(line + (f", reads {listed(reads)}" if reads else ""))
        return lines

    def check_classes(self, state_dict: Mapping[str, Any]) -> None:
        """Raise unless a model's state dict holds these tasks, with as many classes."""
        heads = ((k.split("."), v) for k, v in state_dict.items() if k.startswith("columns."))
        stored = {k[1]: v.shape[0] for k, v in heads if k[2:] == ["head", "weight"]}
        own = {str(number): self.at(number).num_classes for number in self.numbers}
        if stored != own:
            wanted = f"hold the tasks of this model, with classes {own} by number"
            must("state_dict", f"{wanted} (DTGMAModel.save and load keep all tasks)", stored)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self.graph.forget_masks()  # they were built from the masks of before
        super()._load_from_state_dict(*args, **options)


def check_mask(mask: Tensor, n_heads: int, n_nodes: int, n_image_tokens: int | None) -> None:
    """Raise unless a mask can be that of a task's column.

    Args:
        mask: bool ``[L, L]`` or ``[n_heads, L, L]``.
        n_heads: Attention heads.
        n_nodes: Node tokens at the end of a column.
        n_image_tokens: Tokens of an image; None where inputs decide how many there are.
    """
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        must("mask", "have dtype torch.bool (True = allowed)", mask.dtype)
    fits = mask.dim() in (2, 3) and mask.shape[-1] == mask.shape[-2] > n_nodes
    if not fits or mask.shape[:-2] not in ((), (n_heads,)):
        nodes = f" with L > n_nodes={n_nodes}" if n_nodes else ""
        must("mask", f"have shape [L, L] or [n_heads={n_heads}, L, L]{nodes}", list(mask.shape))
    if n_image_tokens is not None and mask.shape[-1] != n_image_tokens + n_nodes:
        wanted = f"have L={n_image_tokens + n_nodes} ({n_image_tokens} tokens of an image and "
        must("mask", f"{wanted}n_nodes={n_nodes})", mask.shape[-1])
