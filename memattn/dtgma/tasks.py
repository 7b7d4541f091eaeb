"""The tasks of a DTG-MA model: which there are, what they read, which parameters are theirs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from memattn.checks import check_int, check_tensor, must
from memattn.dtgma.graph import TaskGraph
from memattn.dtgma.layers import TaskColumn, TaskName, plain_name
from memattn.nn.task_linear import TaskLinear
from memattn.nn.task_tokens import TokenProjection

_Model = TypeVar("_Model", bound="TaskModel")


@dataclass(frozen=True)
class ParameterReport:
    """Parameters of a model, counted where they are.

    Attributes:
        shared: Parameters of the token projection and the norms.
        tasks: Parameters of each task.
        total: All of them.
        trainable: Those that require a gradient.
        prototypes: Numbers kept for task inference, which are no parameters.
    """

    shared: int
    tasks: dict[TaskName, int]
    total: int
    trainable: int
    prototypes: int


class TaskModel(nn.Module):
    """Registration, freezing, masks and parameters of tasks; ``DTGMAModel`` computes with them.

    Args:
        tokens: The shared projection of inputs to tokens.
        layers: The layers, whose ``TaskLinear`` modules get parameters for each task.
        num_classes: Classes of a task that is registered without a number of its own.
        n_heads: Attention heads.
        n_nodes: Node tokens of each task.
        train_shared: Whether shared parameters are trained with the first task.
    """

    def __init__(
        self,
        tokens: TokenProjection,
        layers: nn.ModuleList,
        *,
        num_classes: int,
        n_heads: int,
        n_nodes: int,
        train_shared: bool,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.layers = layers
        self.columns = nn.ModuleDict()
        self.num_classes = num_classes
        self.n_heads = n_heads
        self.n_nodes = n_nodes
        self._graph = TaskGraph()
        self._numbers: dict[TaskName, int] = {}  # in the order of registration
        self._shared_frozen = False
        if not train_shared:
            self._freeze_shared()

    @property
    def tasks(self) -> tuple[TaskName, ...]:
        """Names of the tasks, in the order of registration."""
        return tuple(self._numbers)

    def register_task(
        self,
        task: TaskName,
        num_classes: int | None = None,
        *,
        reads: Sequence[TaskName] = (),
        init_from: TaskName | None = None,
    ) -> None:
        """Give a new task its column.

        Args:
            task: Its name, an integer or a string.
            num_classes: Its classes; None means the model's ``num_classes``.
            reads: Earlier tasks whose columns it reads. They must be frozen, and bring along the
                columns that they read themselves.
            init_from: A task whose parameters it starts with, copied, but for the head if that has
                another number of classes; None draws new ones.

        Raises:
            TypeError: If ``task`` is neither an integer nor a string.
            ValueError: If ``task`` exists, ``reads`` or ``init_from`` names one that does not, or
                ``reads`` one that is not frozen.
        """
        name = plain_name(task)
        if name is None:
            must("task", "be an integer or a string", type(task).__name__, TypeError)
        task = name
        if task in self._numbers:
            must("task", "be a new name", repr(task))
        num_classes = self.num_classes if num_classes is None else num_classes
        check_int("num_classes", num_classes, 1)
        read = {self._number("reads", name): name for name in reads}
        for number, name in read.items():
            if not self._column(number).frozen:
                must("reads", "name frozen tasks (see freeze_task)", repr(name))
        source = None if init_from is None else self._number("init_from", init_from)

        weight = self.tokens.projection.weight
        column = TaskColumn(task, weight.shape[0], num_classes, self.n_nodes).to(weight)
        if source is not None:
            column.copy_from(self._column(source))
        if self._numbers:
            self._freeze_shared()
        number = max(self._numbers.values(), default=-1) + 1
        for _, linear in self._linears():
            linear.add_task(number, init_from=source)
        self.columns[str(number)] = column
        self._graph.add(number, tuple(read))
        self._numbers[task] = number

    def remove_task(self, task: TaskName) -> None:
        """Drop a task and its parameters.

        Raises:
            ValueError: If there is no such task, or another one reads it.
        """
        number = self._number("task", task)
        readers = [self._column(other).name for other in self._graph.readers(number)]
        if readers:
            must("task", f"not be read by other tasks ({listed(readers)})", repr(task))
        for _, linear in self._linears():
            linear.remove_task(number)
        del self.columns[str(number)]
        self._graph.remove(number)
        del self._numbers[task]

    def freeze_task(self, task: TaskName) -> None:
        """Let nothing change a task any more: its parameters require no gradient.

        Shared parameters are frozen with it.
        """
        number = self._number("task", task)
        self._column(number).frozen = True
        for parameter in self._named(number).values():
            parameter.requires_grad_(False)
            parameter.grad = None
        self._freeze_shared()

    def is_frozen(self, task: TaskName) -> bool:
        """Whether a task is frozen."""
        return self._column(self._number("task", task)).frozen

    def reads(self, task: TaskName) -> tuple[TaskName, ...]:
        """Tasks whose columns a task reads itself."""
        return tuple(self._column(n).name for n in self._graph.reads(self._number("task", task)))

    def num_classes_of(self, task: TaskName) -> int:
        """Classes of a task."""
        return self._column(self._number("task", task)).num_classes

    def set_mask(self, task: TaskName, mask: Tensor | None) -> None:
        """Say which tokens of a task's column see which.

        Args:
            task: A task that is not frozen.
            mask: bool ``[L, L]``, or ``[n_heads, L, L]`` for a mask of each head; True is allowed.
                ``L`` counts the tokens of the input and, after them, the node tokens. A token that
                sees nothing adds only the bias of the output projection. None allows everything.

        Raises:
            TypeError: If ``mask`` is no tensor.
            ValueError: If there is no such task, it is frozen, or the mask's dtype or shape does
                not fit. Where ``input_dim`` is an integer, inputs decide what ``L`` is, and
                ``forward`` raises.
        """
        number = self._number("task", task)
        if self._column(number).frozen:
            must("task", "not be frozen to get another mask", repr(task))
        if mask is not None:
            check_tensor("mask", mask)
            if mask.dtype != torch.bool:
                must("mask", "have dtype torch.bool (True = allowed)", mask.dtype)
            fits = mask.dim() in (2, 3) and mask.shape[-1] == mask.shape[-2] > self.n_nodes
            if not fits or mask.shape[:-2] not in ((), (self.n_heads,)):
                wanted = f"have shape [L, L] or [n_heads={self.n_heads}, L, L]"
                nodes = f" with L > n_nodes={self.n_nodes}" if self.n_nodes else ""
                must("mask", wanted + nodes, list(mask.shape))
            n_tokens = self.tokens.n_image_tokens
            if n_tokens is not None and mask.shape[-1] != n_tokens + self.n_nodes:
                wanted = f"have L={n_tokens + self.n_nodes} ({n_tokens} tokens of an image and "
                must("mask", f"{wanted}n_nodes={self.n_nodes})", mask.shape[-1])
            mask = mask.detach().to(self.tokens.projection.weight.device, copy=True)
        self._column(number).mask = mask
        self._graph.forget_masks()

    def get_task_parameters(self, task: TaskName) -> list[nn.Parameter]:
        """All parameters of a task, and none that it shares."""
        return list(self._named(self._number("task", task)).values())

    def trainable_parameters(self, task: TaskName) -> list[nn.Parameter]:
        """What an optimizer is given to train a task: its own, and shared ones not yet frozen.

        Raises:
            ValueError: If there is no such task, or it is frozen.
        """
        if self.is_frozen(task):
            must("task", "not be frozen to be trained", repr(task))
        shared = [p for p in self._shared().values() if p.requires_grad]
        return [*self.get_task_parameters(task), *shared]

    def requires_grad_(self: _Model, requires_grad: bool = True) -> _Model:
        """Let parameters require a gradient, or none; what is frozen never requires one.

        Frozen are tasks after ``freeze_task``, and shared parameters as ``shared`` says.
        """
        super().requires_grad_(requires_grad)
        frozen = [self._named(n) for n in self._numbers.values() if self._column(n).frozen]
        if self._shared_frozen:
            frozen.append(self._shared())
        for parameters in frozen:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take over parameters, masks and prototypes of a model with the same tasks.

        They must have been registered in the same order, after the same removals, with as many
        classes. Names of tasks, what they read and which are frozen are no part of a state dict,
        and stay as they are here; ``save`` and ``load`` keep all of a model.

        Raises:
            ValueError: If ``strict``, and the tasks differ.
            RuntimeError: As in ``torch.nn.Module``, for other keys and shapes that do not fit.
        """
        heads = ((k.split("."), v) for k, v in state_dict.items() if k.startswith("columns."))
        stored = {k[1]: v.shape[0] for k, v in heads if k[2:] == ["head", "weight"]}
        own = {str(n): self._column(n).num_classes for n in self._numbers.values()}
        if strict and stored != own:
            wanted = f"hold the tasks of this model, with classes {own} by number"
            must("state_dict", f"{wanted} (DTGMAModel.save and load keep all tasks)", stored)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self._graph.forget_masks()
        super()._load_from_state_dict(*args, **options)

    def parameter_report(self) -> ParameterReport:
        """Count the parameters that there are now."""
        shared = sum(p.numel() for p in self._shared().values())
        tasks = {t: sum(p.numel() for p in self.get_task_parameters(t)) for t in self.tasks}
        kept = [self._column(number).prototypes for number in self._numbers.values()]
        return ParameterReport(
            shared=shared,
            tasks=tasks,
            total=shared + sum(tasks.values()),
            trainable=sum(p.numel() for p in self.parameters() if p.requires_grad),
            prototypes=sum(p.numel() for p in kept if p is not None),
        )

    def _number(self, argument: str, task: Any) -> int:
        """The number of a task; raises for an unknown one."""
        name = plain_name(task)
        if name is None or name not in self._numbers:
            known = f"({listed(self.tasks)})" if self._numbers else "(there are none yet)"
            must(argument, f"name registered tasks {known}", repr(task))
        return self._numbers[name]

    def _column(self, number: int) -> TaskColumn:
        column = self.columns[str(number)]
        assert isinstance(column, TaskColumn)
        return column

    def _linears(self) -> Iterator[tuple[str, TaskLinear]]:
        modules = self.layers.named_modules()
        return ((name, module) for name, module in modules if isinstance(module, TaskLinear))

    def _named(self, number: int) -> dict[str, nn.Parameter]:
        """Parameters of a task by name."""
        own = {f"column.{name}": p for name, p in self._column(number).named_parameters()}
        for name, linear in self._linears():
            own |= {f"layers.{name}.{k}": p for k, p in linear.task_parameters(number).items()}
        return own

    def _shared(self) -> dict[str, nn.Parameter]:
        """Shared parameters by name."""
        own = {f"tokens.{name}": p for name, p in self.tokens.named_parameters()}
        for name, module in self.layers.named_modules():
            if isinstance(module, nn.LayerNorm):
                own |= {f"layers.{name}.{k}": p for k, p in module.named_parameters()}
        return own

    def _freeze_shared(self) -> None:
        self._shared_frozen = True
        for parameter in self._shared().values():
            parameter.requires_grad_(False)
            parameter.grad = None


def listed(names: Sequence[TaskName]) -> str:
    """Names in a message."""
    return ", ".join(map(repr, names))
