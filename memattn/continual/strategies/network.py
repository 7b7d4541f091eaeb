"""Strategies that train a backbone with task heads: the network and its training loop."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memattn.checks import check_loss
from memattn.continual.backbones import MLP, TokenTransformer
from memattn.continual.strategies.base import Budget, Strategy, count_parameters, seeded
from memattn.data.streams import Stream, Task


class Batch(NamedTuple):
    """Samples with the task of each."""

    x: Tensor  # [n, ...]
    y: Tensor  # [n], among the outputs of the network
    task: Tensor  # [n], index of the task

    def rows(self, index: Tensor) -> "Batch":
        """Some of the samples."""
        return Batch(self.x[index], self.y[index], self.task[index])

    @staticmethod
    def cat(batches: Iterable["Batch"]) -> "Batch":
        """The samples of several batches."""
        x, y, task = zip(*batches, strict=True)
        return Batch(torch.cat(x), torch.cat(y), torch.cat(task))


class Network(nn.Module):
    """A backbone with a head for each task, or with one head where the task is not given."""

    def __init__(self, stream: Stream, budget: Budget) -> None:
        super().__init__()
        self.backbone = make_backbone(stream.input_shape, budget)
        sizes = [stream.n_outputs]
        if stream.scenario == "task":
            sizes = [len(task.classes) for task in stream.tasks]
        self.heads = nn.ModuleList(nn.Linear(budget.hidden_dim, size) for size in sizes)
        self.n_active = stream.n_outputs  # outputs of a shared head whose classes have been seen

    def head(self, index: int) -> nn.Module:
        """The head of a task."""
        return self.heads[index if len(self.heads) > 1 else 0]

    def logits(self, features: Tensor, index: int) -> Tensor:
        """Logits of the classes of a task, or of all that were seen so far."""
        return self.head(index)(features)[:, : self.n_active]

    def forward(self, x: Tensor, index: int) -> Tensor:
        return self.logits(self.backbone(x), index)


class NetworkStrategy(Strategy):
    """A strategy that trains one ``Network``; subclasses change the steps that differ."""

    def __init__(self, stream: Stream, budget: Budget, seed: int) -> None:
        super().__init__(stream, budget, seed)
        # separate generators: samples come in the same order, whatever else a strategy draws
        self.order = torch.Generator().manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.noise = torch.Generator().manual_seed(seed + 2)
        with seeded(seed):
            self.network = self.build().to(budget.device)

    def learn_task(self, index: int, task: Task) -> None:
        data = self.as_batch(index, task)
        if self.stream.scenario == "class":
            self.network.n_active = self.stream.offset(index) + len(task.classes)
        self.begin(index, data)
        self.learn(index, data)
        self.finish(index, data)

    def parameters_to_predict(self) -> int:
        return count_parameters(self.network)

    def parameters_stored(self) -> int:
        return self.parameters_to_predict() + sum(tensor.numel() for tensor in self.kept())

    # methods that strategies override

    def build(self) -> Network:
        """The network, with random weights."""
        return Network(self.stream, self.budget)

    def begin(self, index: int, data: Batch) -> None:
        """Prepare for a task."""

    def learn(self, index: int, data: Batch) -> None:
        """Take the steps on a task."""
        n_steps = self.budget.steps(len(data.y))
        self.train(index, self.parameters(index), self.batches(index, data), n_steps)

    def parameters(self, index: int) -> list[nn.Parameter]:
        """What is trained on a task: the backbone and the task's head."""
        return [*self.network.backbone.parameters(), *self.network.head(index).parameters()]

    def batches(self, index: int, data: Batch) -> Iterator[Batch]:
        """Endless batches to learn a task from."""
        return self.shuffled(data, self.budget.batch_size)

    def loss(self, index: int, batch: Batch, progress: float) -> Tensor:
        """What is minimised; ``progress`` runs from 0 to 1 in every epoch."""
        return self.cross_entropy(self.network.backbone(batch.x), batch)

    def before_step(self, index: int) -> None:
        """Change gradients before the optimiser reads them."""

    def after_step(self, index: int) -> None:
        """Change or record parameters after the optimiser's step."""

    def finish(self, index: int, data: Batch) -> None:
        """Store what later tasks need."""

    def forward(self, x: Tensor, index: int) -> Tensor:
        """Logits of a learned task."""
        return self.network(x, index)

    def kept(self) -> Iterable[Tensor]:
        """Tensors that only further learning needs."""
        return ()

    # methods that strategies call

    def train(
        self,
        index: int,
        parameters: list[nn.Parameter],
        batches: Iterator[Batch],
        n_steps: int,
    ) -> None:
        """Train these parameters with a new optimiser; others do not change.

        Raises:
            FloatingPointError: If the loss is not finite at the end of an epoch.
        """
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = self.optimizer(index, parameters)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
        per_epoch = max(n_steps // self.budget.epochs, 1)
        for step in range(n_steps):
            progress = step % per_epoch / max(per_epoch - 1, 1)
            loss = self.loss(index, self.noisy(next(batches)), progress)
            optimizer.zero_grad()
            loss.backward()
            self.before_step(index)
            optimizer.step()
            schedule.step()
            self.after_step(index)
            # once in an epoch, as reading it waits for the device; NaN stays
            if step % per_epoch == per_epoch - 1 or step == n_steps - 1:
                what = f"loss of {self.name} on task {self.stream.tasks[index].name!r}"
                check_loss(what, loss.item(), step // per_epoch, self.budget.lr)
        optimizer.zero_grad()

    def optimizer(self, index: int, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of one task."""
        return torch.optim.Adam(parameters, lr=self.budget.lr)

    def noisy(self, batch: Batch) -> Batch:
        """A batch with the budget's noise on its inputs."""
        if not self.budget.input_noise:
            return batch
        noise = torch.randn(batch.x.shape, generator=self.noise).to(batch.x)
        return batch._replace(x=batch.x + self.budget.input_noise * noise)

    def shuffled(self, data: Batch, size: int) -> Iterator[Batch]:
        """Batches of all samples in random order, again and again."""
        while True:
            for rows in torch.randperm(len(data.y), generator=self.order).split(size):
                yield data.rows(rows.to(data.y.device))

    def cross_entropy(self, features: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy of samples, each by the head of its task."""
        tasks = batch.task.unique().tolist() if len(self.network.heads) > 1 else [0]
        if len(tasks) == 1:
            return F.cross_entropy(self.network.logits(features, tasks[0]), batch.y)
        total = features.new_zeros(())
        for task in tasks:
            rows = batch.task == task
            logits = self.network.logits(features[rows], task)
            total = total + F.cross_entropy(logits, batch.y[rows], reduction="sum")
        return total / len(batch.y)

    def as_batch(self, index: int, task: Task) -> Batch:
        """The train data of a task."""
        y = self.stream.labels(index, task.train_y).to(self.budget.device)
        return Batch(self.inputs(task.train_x), y, torch.full_like(y, index))

    def shared(self) -> dict[str, nn.Parameter]:
        """Parameters that later tasks train too, by name."""
        named = self.network.named_parameters()
        own_heads = len(self.network.heads) > 1
        return {n: p for n, p in named if not (own_heads and n.startswith("heads."))}


def make_backbone(input_shape: tuple[int, ...], budget: Budget) -> nn.Module:
    """The backbone of a budget."""
    if budget.backbone == "mlp":
        return MLP(math.prod(input_shape), budget.hidden_dim, budget.n_layers)
    return TokenTransformer(input_shape, budget.hidden_dim, budget.n_layers, budget.n_heads)
