"""Hard attention to the task: a gate for every hidden unit and task."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from memattn.checks import must
from memattn.continual.strategies.base import Budget
from memattn.continual.strategies.network import Batch, NetworkStrategy
from memattn.continual.strategies.penalty import check_non_negative
from memattn.data.streams import Stream

_MAX_EMBEDDING = 6.0
_MAX_COSH = 50.0  # where cosh is clamped, against overflow


class HAT(NetworkStrategy):
    """Hard attention to the task: each task gates hidden units, and what it uses is protected.

    The output of every hidden layer is multiplied by ``gate = sigmoid(s * e)`` with an embedding
    ``e`` for each task. ``s`` rises from ``1 / s_max`` to ``s_max`` in every epoch. With ``used``
    the largest gate of a unit in earlier tasks, a weight moves by ``1 - min(used_post, used_pre)``
    of its step, a bias and a weight of the first layer by ``1 - used_post``. The loss has
    ``hat_lambda * sum gate (1 - used) / sum (1 - used)`` added.

    Args:
        stream: The tasks.
        budget: The training budget; the backbone is the MLP.
        seed: Seed of the weights and of all random choices.
        hat_lambda: Strength of the pull towards few units.
        s_max: Slope of the gates in testing.
        embedding_lr: Learning rate of the embeddings.

    Raises:
        ValueError: If an argument is out of range, or the backbone is another.

    Note:
        Source: Serra et al. (2018), https://arxiv.org/abs/1801.01423, section 2, with its
        compensation of the embeddings' gradients and their clamp at 6. Differs: it is the step of
        Adam that is scaled, not the gradient, since Adam would bring a small gradient back to full
        size; embeddings have a learning rate of their own for the same reason; no learning rate
        search on validation data within a task.
    """

    name = "hat"
    scenarios = ("task",)
    backbones = ("mlp",)

    def __init__(
        self,
        stream: Stream,
        budget: Budget,
        seed: int,
        *,
        hat_lambda: float = 0.75,
        s_max: float = 400.0,
        embedding_lr: float = 0.05,
    ) -> None:
        check_non_negative("hat_lambda", hat_lambda)
        if not 1.0 < s_max < math.inf:
            must("s_max", "be above 1 and finite", s_max)
        if not 0.0 < embedding_lr < math.inf:
            must("embedding_lr", "be positive and finite", embedding_lr)
        super().__init__(stream, budget, seed)
        self.hat_lambda, self.s_max, self.embedding_lr = hat_lambda, s_max, embedding_lr
        shape = len(stream), budget.n_layers, budget.hidden_dim
        embeddings = torch.randn(shape, generator=self.generator).to(budget.device)
        self.embeddings = [nn.Parameter(embedding) for embedding in embeddings]
        self.used = torch.zeros_like(embeddings[0])  # [n_layers, hidden_dim]
        self._s = s_max

    def begin(self, index: int, data: Batch) -> None:
        self._mobile = mobile_parts(self.used)

    def optimizer(self, index: int, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        embedding = {"params": [self.embeddings[index]], "lr": self.embedding_lr}
        return torch.optim.Adam([{"params": parameters}, embedding], lr=self.budget.lr)

    def loss(self, index: int, batch: Batch, progress: float) -> Tensor:
        self._s = annealed_slope(progress, self.s_max)
        gates = torch.sigmoid(self._s * self.embeddings[index])
        features = self.network.backbone(batch.x, lambda i, hidden: hidden * gates[i])
        return self.cross_entropy(features, batch) + self.hat_lambda * capacity(gates, self.used)

    @torch.no_grad()
    def before_step(self, index: int) -> None:
        embedding = self.embeddings[index]
        assert embedding.grad is not None
        embedding.grad *= compensation(embedding, self._s, self.s_max)
        self._before = [p.clone() for p in self.network.backbone.parameters()]

    @torch.no_grad()
    def after_step(self, index: int) -> None:
        self.embeddings[index].clamp_(-_MAX_EMBEDDING, _MAX_EMBEDDING)
        backbone = self.network.backbone.parameters()
        for p, before, part in zip(backbone, self._before, self._mobile, strict=True):
            # where the share is 0, exactly the value before
            p.copy_(torch.lerp(before, p, part))

    def finish(self, index: int, data: Batch) -> None:
        gates = torch.sigmoid(self.s_max * self.embeddings[index].detach())
        self.used = torch.maximum(self.used, gates)
        del self._before, self._mobile

    def forward(self, x: Tensor, index: int) -> Tensor:
        gates = torch.sigmoid(self.s_max * self.embeddings[index])
        features = self.network.backbone(x, lambda i, hidden: hidden * gates[i])
        return self.network.logits(features, index)

    def parameters_to_predict(self) -> int:
        return super().parameters_to_predict() + sum(e.numel() for e in self.embeddings)

    def kept(self) -> Iterable[Tensor]:
        return [self.used]


def annealed_slope(progress: float, s_max: float) -> float:
    """Slope of the gates: ``1 / s_max`` at the begin of an epoch, ``s_max`` at its end."""
    return 1.0 / s_max + (s_max - 1.0 / s_max) * progress


def capacity(gates: Tensor, used: Tensor) -> Tensor:
    """Share of the free units that a task takes, ``sum gate (1 - used) / sum (1 - used)``.

    Args:
        gates: Gates of the task, ``[n_layers, hidden_dim]``.
        used: Largest gates of earlier tasks, of the same shape.
    """
    left = 1.0 - used
    # where no unit is free the share is 0
    return (gates * left).sum() / left.sum().clamp_min(torch.finfo(left.dtype).tiny)


def compensation(embedding: Tensor, s: float, s_max: float) -> Tensor:
    """Factor that makes an embedding's gradient what it would be at slope 1, times ``s_max``."""
    steep = torch.cosh((s * embedding).clamp(-_MAX_COSH, _MAX_COSH)) + 1.0
    return s_max / s * steep / (torch.cosh(embedding) + 1.0)


def mobile_parts(used: Tensor) -> list[Tensor]:
    """Share of its step that each parameter of the MLP takes: weight, bias, weight, bias, ...

    Args:
        used: Largest gates of earlier tasks, ``[n_layers, hidden_dim]``.
    """
    parts = []
    for i, post in enumerate(used):
        # the inputs of the first layer are used by every task
        weight = post[:, None] if i == 0 else torch.minimum(post[:, None], used[i - 1][None, :])
        parts += [1.0 - weight, 1.0 - post]
    return parts
