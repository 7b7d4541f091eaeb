"""PackNet: every task keeps its own share of the weights."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from memattn.checks import must
from memattn.continual.strategies.base import Budget
from memattn.continual.strategies.network import Batch, NetworkStrategy
from memattn.data.streams import Stream

_FREE = 0  # owner of a weight; task i owns those with i + 1


class PackNet(NetworkStrategy):
    """PackNet: trains the free weights, keeps the largest of them for the task, frees the others.

    A task uses its own weights and those of earlier tasks, and only its own are trained, so the
    logits of earlier tasks never change. Weights are matrices of the backbone; its biases and norms
    are trained with the first task and then frozen. Two thirds of the steps train, then each matrix
    is pruned by magnitude, and the last third trains what is kept.

    Args:
        stream: The tasks.
        budget: The training budget.
        seed: Seed of the weights and of all random choices.
        keep: Part of the free weights that a task keeps. None gives every task of the stream the
            same number of weights.

    Raises:
        ValueError: If ``keep`` is not between 0 and 1.

    Note:
        Source: Mallya and Lazebnik (2018), https://arxiv.org/abs/1711.05769. Differs: equal shares
        instead of a fixed part of what is free, and Adam instead of SGD.
    """

    name = "packnet"
    scenarios = ("task",)

    def __init__(
        self, stream: Stream, budget: Budget, seed: int, *, keep: float | None = None
    ) -> None:
        if keep is not None and not 0.0 < keep < 1.0:
            must("keep", "be None or between 0 and 1", keep)
        super().__init__(stream, budget, seed)
        self.keep = keep
        self.owner = {
            name: torch.full_like(p, _FREE, dtype=torch.int16)
            for name, p in self.network.backbone.named_parameters()
            if p.dim() > 1
        }
        self._trained: dict[str, Tensor] = {}  # which weights of each matrix are being trained

    def learn(self, index: int, data: Batch) -> None:
        n_steps = self.budget.steps(len(data.y))
        retrain = n_steps // 3
        batches = self.batches(index, data)
        self._trained = {name: owner == _FREE for name, owner in self.owner.items()}
        self.train(index, self.parameters(index), batches, n_steps - retrain)
        self.prune(index)
        self._trained = {name: owner == index + 1 for name, owner in self.owner.items()}
        self.train(index, self.parameters(index), batches, retrain)

    def parameters(self, index: int) -> list[nn.Parameter]:
        named = self.network.backbone.named_parameters()
        trained = [p for name, p in named if index == 0 or name in self.owner]
        return [*trained, *self.network.head(index).parameters()]

    @torch.no_grad()
    def prune(self, index: int) -> None:
        """Give the largest free weights of each matrix to the task, and set the others to 0."""
        keep = 1.0 / (len(self.stream) - index) if self.keep is None else self.keep
        for name, p in self.network.backbone.named_parameters():
            if name not in self.owner:
                continue
            free = self.owner[name] == _FREE
            size = torch.where(free, p.abs(), -1.0).flatten()
            largest = size.topk(round(keep * int(free.sum()))).indices
            self.owner[name].view(-1)[largest] = index + 1
            p[self.owner[name] == _FREE] = 0.0

    def before_step(self, index: int) -> None:
        for name, p in self.network.backbone.named_parameters():
            if name in self._trained:
                assert p.grad is not None
                p.grad *= self._trained[name]

    def forward(self, x: Tensor, index: int) -> Tensor:
        weights = {
            name: p * ((self.owner[name] > _FREE) & (self.owner[name] <= index + 1))
            for name, p in self.network.backbone.named_parameters()
            if name in self.owner
        }
        features = functional_call(self.network.backbone, weights, (x,))
        return self.network.logits(features, index)

    def parameters_to_predict(self) -> int:
        owners = sum(owner.numel() for owner in self.owner.values())
        return super().parameters_to_predict() + owners
