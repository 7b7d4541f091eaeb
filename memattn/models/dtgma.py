"""DTG-MA: a classifier that learns tasks one after the other in columns of a task graph."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.models._task_graph import TaskGraph
from memattn.nn.task_attention import ColumnLayout, TaskGraphAttention
from memattn.nn.task_linear import TaskGroups, TaskLinear, group_by_task
from memattn.nn.task_tokens import TokenProjection
from memattn.ops._checks import check_int, check_tensor, must

TaskName = int | str
SHARED = ("frozen", "first_task")
INFERENCE = ("prototype", "entropy")


@dataclass(frozen=True)
class ParameterReport:
    """Parameters of a model, counted where they are."""

    shared: int  # token projection and norms
    tasks: dict[TaskName, int]  # of each task
    total: int
    trainable: int  # of them, what requires a gradient
    prototypes: int  # numbers kept for task inference, no parameters


class TaskColumn(nn.Module):
    """What a task has outside the layers: head, node tokens, mask and prototypes."""

    mask: Tensor | None
    prototypes: Tensor | None

    def __init__(self, name: TaskName, hidden_size: int, num_classes: int, n_nodes: int) -> None:
        super().__init__()
        self.name = name
        self.num_classes = num_classes
        self.frozen = False
        self.head = nn.Linear(hidden_size, num_classes)
        self.nodes = (
            nn.Parameter(torch.randn(n_nodes, hidden_size) * hidden_size**-0.5) if n_nodes else None
        )
        self.register_buffer("mask", None)
        self.register_buffer("prototypes", None)


class TaskFeedForward(nn.Module):
    """``E -> 4E -> E`` with ReLU, of each task."""

    def __init__(self, hidden_size: int, rank: int | None) -> None:
        super().__init__()
        self.up = TaskLinear(0, hidden_size, 4 * hidden_size, rank=rank)
        self.down = TaskLinear(0, 4 * hidden_size, hidden_size, rank=rank)

    def forward(self, x: Tensor, groups: TaskGroups) -> Tensor:
        """Map ``[n, L, E]`` to ``[n, L, E]``."""
        return self.down(F.relu(self.up(x, groups)), groups)


class DTGMALayer(nn.Module):
    """Task-graph attention and feed-forward, each behind a shared norm and around a residual."""

    def __init__(
        self, hidden_size: int, n_heads: int, dropout: float, rank: int | None, backend: str
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.attention = TaskGraphAttention(hidden_size, n_heads, rank=rank, backend=backend)
        self.ffn_norm = nn.LayerNorm(hidden_size)
        self.ffn = TaskFeedForward(hidden_size, rank)
        self.dropout = dropout

    def forward(
        self, own: Tensor, read: Tensor | None, layout: ColumnLayout, is_last: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Map own columns ``[B, L, E]`` and ``[R, L, E]`` read ones."""
        with torch.no_grad():
            normed_read = None if read is None else self.attention_norm(read)
        attended, attended_read = self.attention(self.attention_norm(own), normed_read, layout)
        own = own + self._drop(attended)
        own = own + self._drop(self.ffn(self.ffn_norm(own), layout.own))
        if read is None or layout.read is None or attended_read is None or is_last:
            return own, None
        with torch.no_grad():
            read = read + attended_read
            return own, read + self.ffn(self.ffn_norm(read), layout.read)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class DTGMAModel(nn.Module):
    """DTG-MA: isolated columns of attention for tasks that are learned one after the other."""

    def __init__(
        self,
        input_dim: int | Sequence[int],
        hidden_dim: int,
        num_classes: int,
        n_layers: int = 2,
        n_heads: int = 4,
        *,
        n_tokens: int = 16,
        patch_size: int | None = None,
        n_nodes: int = 0,
        positions: bool = False,
        dropout: float = 0.0,
        rank: int | None = None,
        shared: str = "frozen",
        inference: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_int("num_classes", num_classes, 1)
        check_int("n_layers", n_layers, 1)
        check_int("n_nodes", n_nodes, 0)
        if not 0.0 <= dropout < 1.0:
            must("dropout", "be at least 0 and below 1", dropout)
        if shared not in SHARED:
            must("shared", f"be one of {', '.join(SHARED)}", repr(shared))
        if inference is not None and inference not in INFERENCE:
            must("inference", f"be None or one of {', '.join(INFERENCE)}", repr(inference))
        self.num_classes = num_classes
        self.n_nodes = n_nodes
        self.shared = shared
        self.inference = inference
        self.tokens = TokenProjection(
            input_dim, hidden_dim, n_tokens=n_tokens, patch_size=patch_size, positions=positions
        )
        self.layers = nn.ModuleList(
            DTGMALayer(hidden_dim, n_heads, dropout, rank, backend) for _ in range(n_layers)
        )
        self.columns = nn.ModuleDict()
        self._graph = TaskGraph()
        self._numbers: dict[TaskName, int] = {}  # in the order of registration
        if shared == "frozen":
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
        """Give a task its column."""
        if isinstance(task, bool) or not isinstance(task, int | str):
            must("task", "be an integer or a string", type(task).__name__, TypeError)
        if task in self._numbers:
            must("task", "be a new name", repr(task))
        num_classes = self.num_classes if num_classes is None else num_classes
        check_int("num_classes", num_classes, 1)
        read = tuple(dict.fromkeys(self._number("reads", name) for name in reads))
        for number in read:
            if not self._column(number).frozen:
                must("reads", "name frozen tasks (freeze_task)", repr(self._column(number).name))
        source = None if init_from is None else self._number("init_from", init_from)

        hidden_size = self.tokens.projection.out_features
        number = max(self._numbers.values(), default=-1) + 1
        column = TaskColumn(task, hidden_size, num_classes, self.n_nodes)
        column.to(self.tokens.projection.weight)
        if source is not None:
            own = self._column(source)
            if own.num_classes == num_classes:
                column.head.load_state_dict(own.head.state_dict())
            if column.nodes is not None and own.nodes is not None:
                column.nodes.data.copy_(own.nodes)
        if self._numbers:
            self._freeze_shared()
        for _, linear in self._linears():
            linear.add_task(number, init_from=source)
            for parameter in linear.task_parameters(number).values():
                parameter.data = parameter.data.to(self.tokens.projection.weight)
        self.columns[str(number)] = column
        self._graph.add(number, read)
        self._numbers[task] = number

    def freeze_task(self, task: TaskName) -> None:
        """Let nothing change a task any more; its parameters require no gradient."""
        number = self._number("task", task)
        self._column(number).frozen = True
        for parameter in self._named(number).values():
            parameter.requires_grad_(False)
            parameter.grad = None
        self._freeze_shared()

    def is_frozen(self, task: TaskName) -> bool:
        """Whether a task is frozen."""
        return self._column(self._number("task", task)).frozen

    def get_task_parameters(self, task: TaskName) -> list[nn.Parameter]:
        """All parameters of a task."""
        return list(self._named(self._number("task", task)).values())

    def trainable_parameters(self, task: TaskName) -> list[nn.Parameter]:
        """What an optimizer is given to train a task."""
        number = self._number("task", task)
        if self._column(number).frozen:
            must("task", "not be frozen to be trained", repr(task))
        shared = [p for p in self._shared() if p.requires_grad]
        return [*self._named(number).values(), *shared]

    def parameter_report(self) -> ParameterReport:
        """Count the parameters there are."""
        tasks = {
            name: sum(p.numel() for p in self._named(number).values())
            for name, number in self._numbers.items()
        }
        shared = sum(p.numel() for p in self._shared())
        kept = [self._column(number).prototypes for number in self._numbers.values()]
        return ParameterReport(
            shared=shared,
            tasks=tasks,
            total=shared + sum(tasks.values()),
            trainable=sum(p.numel() for p in self.parameters() if p.requires_grad),
            prototypes=sum(p.numel() for p in kept if p is not None),
        )

    def forward(
        self, x: Tensor, task_id: TaskName | Sequence[TaskName] | Tensor | None = None
    ) -> Tensor:
        """Logits of each sample over the classes of its task."""
        check_tensor("x", x)
        groups = self._groups(task_id, x.shape[0])
        own = groups.sort(self.tokens(x))
        mask_of = lambda number: self._column(number).mask
        length = own.shape[1] + self.n_nodes
        sorted_groups = groups._replace(order=None)
        layout = self._graph.layout(sorted_groups, length, mask_of, x.device)
        read = None
        if layout.read is not None:
            with torch.no_grad():
                read = self._with_nodes(own.index_select(0, layout.read_sample), layout.read)
        own = self._with_nodes(own, sorted_groups)
        for i, layer in enumerate(self.layers):
            own, read = layer(own, read, layout, i == len(self.layers) - 1)
        features = own[:, -self.n_nodes :].mean(1)  # of the nodes, or of all where there are none
        parts = features.split(list(groups.sizes))
        logits = [
            self._column(number).head(part)
            for number, part in zip(groups.tasks, parts, strict=True)
        ]
        width = max(part.shape[1] for part in logits)
        padded = [F.pad(part, (0, width - part.shape[1]), value=-torch.inf) for part in logits]
        return groups.unsort(torch.cat(padded))

    def _groups(
        self, task_id: TaskName | Sequence[TaskName] | Tensor | None, n_rows: int
    ) -> TaskGroups:
        if task_id is None:
            must("task_id", "be given", "None")
        if isinstance(task_id, int | str):
            return group_by_task(self._number("task_id", task_id), n_rows)
        names = task_id.tolist() if isinstance(task_id, Tensor) else list(task_id)
        device = self.tokens.projection.weight.device
        numbers = torch.tensor([self._number("task_id", name) for name in names], device=device)
        return group_by_task(numbers, n_rows)

    def _with_nodes(self, tokens: Tensor, groups: TaskGroups) -> Tensor:
        """Columns ``[n, L, E]``: tokens with the node tokens of their task behind them."""
        if not self.n_nodes:
            return tokens
        parts = []
        for number, part in zip(groups.tasks, tokens.split(list(groups.sizes)), strict=True):
            nodes = self._column(number).nodes
            assert nodes is not None
            parts.append(torch.cat([part, nodes.expand(part.shape[0], -1, -1)], 1))
        return torch.cat(parts)

    def _number(self, argument: str, task: object) -> int:
        """The number of a task; raises for an unknown one."""
        if task not in self._numbers or isinstance(task, bool):
            known = ", ".join(map(repr, self._numbers)) or "none yet"
            must(argument, f"name registered tasks ({known})", repr(task))
        return self._numbers[task]  # type: ignore[index]

    def _column(self, number: int) -> TaskColumn:
        column = self.columns[str(number)]
        assert isinstance(column, TaskColumn)
        return column

    def _linears(self) -> Iterator[tuple[str, TaskLinear]]:
        return (
            (name, module)
            for name, module in self.layers.named_modules()
            if isinstance(module, TaskLinear)
        )

    def _named(self, number: int) -> dict[str, nn.Parameter]:
        """Parameters of a task by name."""
        own = {f"column.{name}": p for name, p in self._column(number).named_parameters()}
        for name, linear in self._linears():
            own |= {f"layers.{name}.{k}": p for k, p in linear.task_parameters(number).items()}
        return own

    def _shared(self) -> list[nn.Parameter]:
        norms = [m for m in self.layers.modules() if isinstance(m, nn.LayerNorm)]
        return [p for module in (self.tokens, *norms) for p in module.parameters()]

    def _freeze_shared(self) -> None:
        for parameter in self._shared():
            parameter.requires_grad_(False)
            parameter.grad = None
