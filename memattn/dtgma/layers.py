"""The parts of DTG-MA: what a task has outside the layers, and a layer."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.nn.task_attention import ColumnLayout, TaskGraphAttention
from memattn.nn.task_linear import TaskGroups, TaskLinear

TaskName = int | str


def plain_name(value: Any) -> TaskName | None:
    """A task's name as a plain integer or string, of NumPy's too; None for what is no name."""
    if isinstance(value, str):
        return str(value)
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


class TaskColumn(nn.Module):
    """What a task has outside the layers: head, node tokens, mask and prototypes."""

    mask: Tensor | None  # bool [L, L] or [H, L, L]
    prototypes: Tensor | None  # [classes, F]

    def __init__(self, name: TaskName, hidden_dim: int, num_classes: int, n_nodes: int) -> None:
        super().__init__()
        self.name = name
        self.num_classes = num_classes
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

        Read columns know no dropout and no gradient; nobody sees what the last layer makes of them.
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
