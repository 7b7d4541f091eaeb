"""The layers of DTG-MA: task-graph attention, and the feed-forward network of each task."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.nn._modules import modules_of
from memattn.nn.task_attention import ColumnLayout, TaskGraphAttention
from memattn.nn.task_linear import TaskGroups, TaskLinear


class TaskFeedForward(nn.Module):
    """``E -> 4E -> E`` with ReLU, of each task."""

    def __init__(self, hidden_dim: int, rank: int | None) -> None:
        super().__init__()
        self.up = TaskLinear(0, hidden_dim, 4 * hidden_dim, rank=rank)
        self.down = TaskLinear(0, 4 * hidden_dim, hidden_dim, rank=rank)

    def forward(self, x: Tensor, groups: TaskGroups) -> Tensor:
        """Map ``[n, L, E]`` to ``[n, L, E]``."""
        return self.down(F.relu(self.up(x, groups)), groups)


class DTGMALayer(nn.Module):
    """Task-graph attention and feed-forward, each after a shared norm and around a residual."""

    def __init__(
        self, hidden_dim: int, n_heads: int, dropout: float, rank: int | None, backend: str
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_dim)
        self.attention = TaskGraphAttention(hidden_dim, n_heads, rank=rank, backend=backend)
        self.ffn_norm = nn.LayerNorm(hidden_dim)
        self.ffn = TaskFeedForward(hidden_dim, rank)
        self.dropout = dropout

    def forward(
        self, own: Tensor, read: Tensor | None, layout: ColumnLayout, is_last: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Map own columns ``[B, L, E]`` and read ones ``[R, L, E]``.

        Read columns get no dropout and no gradient. The last layer does not compute them, since
        nothing reads them any more.
        """
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


class DTGMALayers(nn.ModuleList):
    """The layers of a model, applied in order."""

    def forward(self, own: Tensor, read: Tensor | None, layout: ColumnLayout) -> Tensor:
        """Map own columns ``[B, L, E]``, which attend to read ones ``[R, L, E]``, to ``[B, L, E]``.

        Args:
            own: The column of each sample's task.
            read: Columns that these tasks read; None where they read none.
            layout: Which columns belong to which sample and task.
        """
        for i in range(len(self)):
            own, read = self.layer(i)(own, read, layout, is_last=i == len(self) - 1)
        return own

    def layer(self, index: int) -> DTGMALayer:
        """The layer of an index."""
        layer = self[index]
        assert isinstance(layer, DTGMALayer)
        return layer

    def add_task(self, number: int, init_from: int | None) -> None:
        """Give a task its parameters: new ones, or a copy of those of the task ``init_from``."""
        for linear in modules_of(self, TaskLinear).values():
            linear.add_task(number, init_from=init_from)

    def remove_task(self, number: int) -> None:
        """Drop the parameters of a task."""
        for linear in modules_of(self, TaskLinear).values():
            linear.remove_task(number)

    def task_parameters(self, number: int) -> dict[str, nn.Parameter]:
        """The parameters of a task by name."""
        own: dict[str, nn.Parameter] = {}
        for name, linear in modules_of(self, TaskLinear).items():
            own |= {f"{name}.{k}": p for k, p in linear.task_parameters(number).items()}
        return own

    def norm_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the norms, which tasks share, by name."""
        own: dict[str, nn.Parameter] = {}
        for name, norm in modules_of(self, nn.LayerNorm).items():
            own |= {f"{name}.{k}": p for k, p in norm.named_parameters()}
        return own
