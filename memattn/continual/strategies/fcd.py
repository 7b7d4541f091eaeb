"""Frozen core decomposition: shared, frozen factors make weights of a small vector per task."""

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

from memattn.checks import check_int, must
from memattn.continual.strategies.base import Budget, seeded
from memattn.continual.strategies.network import Batch, Network, NetworkStrategy
from memattn.continual.strategies.penalty import check_non_negative
from memattn.data.streams import Stream


class FCD(NetworkStrategy):
    """FCD: the weights of a task are a Tucker product of shared factors and the task's own vector.

    Every weight matrix of the backbone is ``left (core x_3 v) right``, where ``core x_3 v`` is
    ``sum_k core[:, :, k] v[k]``. The first task trains the factors ``left``, ``core`` and
    ``right``, biases and norms; then they are frozen. Every task trains its own vectors ``v``, one
    for each matrix, and its head. So logits of earlier tasks never change.

    Args:
        stream: The tasks.
        budget: The training budget.
        seed: Seed of the weights and of all random choices.
        rank: Rows and columns of a core.
        vector_size: Numbers in a vector.
        vector_lr: Initial learning rate of the vectors.
        separation: Strength of the penalty on the mean squared cosine between the vectors of a task
            and those of the tasks before it.

    Raises:
        ValueError: If an option is out of range.

    Note:
        Source: the comparison in the README of DTG-MA, https://github.com/infosave2007/dtgma, and
        the formula in that of https://github.com/infosave2007/fcd, whose code was not read: the
        initial values, the learning rate of the vectors and a vector for each matrix are ours.
    """

    name = "fcd"
    scenarios = ("task",)

    def __init__(
        self,
        stream: Stream,
        budget: Budget,
        seed: int,
        *,
        rank: int = 32,
        vector_size: int = 16,
        vector_lr: float = 0.1,
        separation: float = 0.0,
    ) -> None:
        check_int("rank", rank, 1)
        check_int("vector_size", vector_size, 1)
        if not 0.0 < vector_lr < math.inf:
            must("vector_lr", "be positive and finite", vector_lr)
        check_non_negative("separation", separation)
        self.rank, self.vector_size = rank, vector_size
        self.vector_lr, self.separation = vector_lr, separation
        super().__init__(stream, budget, seed)

    def build(self) -> Network:
        network = Network(self.stream, self.budget)
        self.tucker = TuckerBackbone(network.backbone, self.rank, self.vector_size)
        network.backbone = self.tucker
        return network

    def begin(self, index: int, data: Batch) -> None:
        with seeded(self.seed + index):
            self.tucker.add_task()

    def parameters(self, index: int) -> list[nn.Parameter]:
        own = [self.tucker.vectors[index], *self.network.head(index).parameters()]
        return [*self.tucker.shared(), *own] if index == 0 else own

    def optimizer(self, index: int, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        own = self.tucker.vectors[index]
        others = [p for p in parameters if p is not own]
        vectors = {"params": [own], "lr": self.vector_lr}
        return torch.optim.Adam([{"params": others}, vectors], lr=self.budget.lr)

    def loss(self, index: int, batch: Batch, progress: float) -> Tensor:
        loss = self.cross_entropy(self.tucker(batch.x, index), batch)
        if index and self.separation:
            earlier = torch.stack(list(self.tucker.vectors)[:index])
            cosine = torch.cosine_similarity(self.tucker.vectors[index], earlier, dim=-1)
            loss = loss + self.separation * cosine.square().mean()
        return loss

    def forward(self, x: Tensor, index: int) -> Tensor:
        return self.network.logits(self.tucker(x, index), index)


class TuckerBackbone(nn.Module):
    """A backbone whose weight matrices are made of shared factors and the vectors of a task.

    Args:
        backbone: What is computed with them. Its own matrices are dropped.
        rank: Rows and columns of a core.
        vector_size: Numbers in a vector.
    """

    def __init__(self, backbone: nn.Module, rank: int, vector_size: int) -> None:
        super().__init__()
        self.names = [name for name, p in backbone.named_parameters() if p.dim() == 2]
        self.left, self.core, self.right = (nn.ParameterList() for _ in range(3))
        for name in self.names:
            n_out, n_in = backbone.get_parameter(name).shape
            # the products have the variance of nn.Linear's weights, 1 / (3 n_in)
            self.left.append(torch.randn(n_out, rank) * rank**-0.5)
            self.core.append(torch.randn(rank, rank, vector_size) * (3 * n_in) ** -0.5)
            self.right.append(torch.randn(rank, n_in) * rank**-0.5)
            owner, _, leaf = name.rpartition(".")
            module = backbone.get_submodule(owner)
            delattr(module, leaf)
            # a place without numbers for the weights of a task
            module.register_buffer(leaf, torch.empty(0), persistent=False)
        self.backbone = backbone
        self.vector_size = vector_size
        self.vectors = nn.ParameterList()  # of each task, [matrices, vector_size]

    def add_task(self) -> None:
        """Random vectors of unit expected length for a new task."""
        size = len(self.names), self.vector_size
        vectors = torch.randn(size) * self.vector_size**-0.5
        self.vectors.append(vectors.to(self.core[0].device))

    def shared(self) -> list[nn.Parameter]:
        """The parameters of all tasks."""
        return [p for name, p in self.named_parameters() if not name.startswith("vectors.")]

    def weights(self, index: int) -> dict[str, Tensor]:
        """The matrices of a task by name."""
        parts = zip(self.names, self.left, self.core, self.right, self.vectors[index], strict=True)
        return {name: left @ (core @ v) @ right for name, left, core, right, v in parts}

    def forward(self, x: Tensor, index: int) -> Tensor:
        """Features of a task, ``[B, hidden_dim]``."""
        return functional_call(self.backbone, self.weights(index), (x,))
