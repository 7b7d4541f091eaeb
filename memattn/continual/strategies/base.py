"""What all strategies share: the budget, the network, the training loop, the counts."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memattn.continual.backbones import MLP, TokenTransformer
from memattn.continual.streams import SCENARIOS, Stream, Task
from memattn.ops._checks import check_int, must

Backbone = Literal["mlp", "transformer"]
BACKBONES: tuple[str, ...] = get_args(Backbone)
_EVAL_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every strategy may spend.

    Every strategy takes ``steps(n)`` gradient steps of Adam on a task with ``n`` train samples, on
    ``batch_size`` samples each, and has a backbone of the same sizes. What it keeps beside the
    backbone is by nature its own, and counted. Adam begins anew at each task, and its learning rate
    falls to 0 along a cosine.

    Attributes:
        epochs: Passes over the train data of a task.
        batch_size: Samples in a gradient step, replayed ones included.
        lr: First learning rate of Adam.
        hidden_dim: Width of the backbone.
        n_layers: Layers of the backbone.
        backbone: ``"mlp"``, or ``"transformer"`` over the tokens that DTG-MA has.
        n_heads: Attention heads of the transformer; divides ``hidden_dim``.
        buffer_size: Samples that a replay buffer holds.
        device: Where to compute.

    Raises:
        ValueError: If a field is out of range.
    """

    epochs: int = 30
    batch_size: int = 32
    lr: float = 1e-3
    hidden_dim: int = 128
    n_layers: int = 2
    backbone: Backbone = "mlp"
    n_heads: int = 4
    buffer_size: int = 200
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("epochs", "hidden_dim", "n_layers", "n_heads", "buffer_size"):
            check_int(name, getattr(self, name), 1)
        check_int("batch_size", self.batch_size, 4)  # replay divides it by four
        if not 0.0 < self.lr < math.inf:
            must("lr", "be positive and finite", self.lr)
        if self.backbone not in BACKBONES:
            must("backbone", f"be one of {', '.join(BACKBONES)}", repr(self.backbone))
        if self.hidden_dim % self.n_heads:
            must("n_heads", f"divide hidden_dim, {self.hidden_dim}", self.n_heads)

    def steps(self, n: int) -> int:
        """Gradient steps on a task with ``n`` train samples."""
        return self.epochs * math.ceil(n / self.batch_size)


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
    """A backbone with a head for each task, or with one head where tasks are not told apart."""

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


class Strategy:
    """A way to learn tasks one after another; ``fit`` each in turn, ``predict`` any learned one.

    Args:
        stream: The tasks to come, of which only shapes and classes are read before their turn.
        budget: What may be spent.
        seed: Seed of the weights and of every choice.

    Raises:
        ValueError: If the strategy has no meaning in the scenario of the stream, or for the
            backbone.
    """

    name: ClassVar[str]
    scenarios: ClassVar[tuple[str, ...]] = SCENARIOS
    backbones: ClassVar[tuple[str, ...]] = BACKBONES

    def __init__(self, stream: Stream, budget: Budget, seed: int) -> None:
        check_int("seed", seed, 0)
        if stream.scenario not in self.scenarios:
            wanted = f"have scenario {' or '.join(self.scenarios)} for strategy {self.name!r}"
            must("stream", wanted, repr(stream.scenario))
        if budget.backbone not in self.backbones:
            wanted = f"be {' or '.join(self.backbones)} for strategy {self.name!r}"
            must("budget.backbone", wanted, repr(budget.backbone))
        self.stream, self.budget, self.seed = stream, budget, seed
        self.learned = 0
        # apart, so that strategies which draw more see their samples in the same order
        self.order = torch.Generator().manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed + 1)
        with seeded(seed):
            self.network = self.build().to(budget.device)

    # -- what users call

    def fit(self, index: int, task: Task) -> None:
        """Learn the next task.

        Args:
            index: Its index, the number of tasks learned before.
            task: The task.

        Raises:
            ValueError: If it is not this task's turn.
        """
        self.stream.check_index(index)
        if index != self.learned:
            must("index", f"be that of the next task, {self.learned}", index)
        data = self.as_batch(index, task)
        if self.stream.scenario == "class":
            self.network.n_active = self.stream.offset(index) + len(task.classes)
        self.network.train()
        self.begin(index, data)
        self.learn(index, data)
        self.finish(index, data)
        self.network.eval()
        self.learned += 1

    @torch.no_grad()
    def predict(self, index: int, x: Tensor) -> Tensor:
        """Logits of samples of a task.

        Args:
            index: Index of the task. In scenarios ``"domain"`` and ``"class"`` it changes nothing.
            x: Samples, ``[n, ...]``.

        Returns:
            ``[n, n_classes]`` of the task in scenario ``"task"``, else ``[n, stream.n_outputs]``,
            with -inf for classes that have not come yet.

        Raises:
            ValueError: If in scenario ``"task"`` the task is not learned yet.
        """
        self.stream.check_index(index)
        if self.stream.scenario == "task" and index >= self.learned:
            must("index", f"be that of one of the {self.learned} tasks learned", index)
        self.network.eval()
        logits = torch.cat([self.forward(part, index) for part in self.inputs(x).split(_EVAL_ROWS)])
        missing = self.stream.n_outputs - logits.shape[1]
        if self.stream.scenario == "class" and missing:
            logits = F.pad(logits, (0, missing), value=-math.inf)
        return logits

    def parameters_stored(self) -> int:
        """Numbers that are kept to predict and to go on learning, without stored samples."""
        return self.parameters_to_predict() + sum(tensor.numel() for tensor in self.kept())

    def parameters_to_predict(self) -> int:
        """Numbers that are needed to predict every task."""
        return count_parameters(self.network)

    def buffer_numbers(self) -> int:
        """Numbers in stored samples."""
        return 0

    # -- what a strategy changes

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
        """Change or watch parameters after they moved."""

    def finish(self, index: int, data: Batch) -> None:
        """Keep what later tasks need."""

    def forward(self, x: Tensor, index: int) -> Tensor:
        """Logits of a learned task."""
        return self.network(x, index)

    def kept(self) -> Iterable[Tensor]:
        """Tensors that only further learning needs."""
        return ()

    # -- what strategies use

    def train(
        self,
        index: int,
        parameters: list[nn.Parameter],
        batches: Iterator[Batch],
        n_steps: int,
    ) -> None:
        """Take steps with a fresh optimiser; all other parameters are left alone."""
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = self.optimizer(index, parameters)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
        per_epoch = max(n_steps // self.budget.epochs, 1)
        for step in range(n_steps):
            progress = step % per_epoch / max(per_epoch - 1, 1)
            loss = self.loss(index, next(batches), progress)
            optimizer.zero_grad()
            loss.backward()
            self.before_step(index)
            optimizer.step()
            schedule.step()
            self.after_step(index)
        optimizer.zero_grad()

    def optimizer(self, index: int, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of one task."""
        return torch.optim.Adam(parameters, lr=self.budget.lr)

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

    def inputs(self, x: Tensor) -> Tensor:
        """Samples as the network reads them."""
        return x.to(self.budget.device, torch.float32)

    def as_batch(self, index: int, task: Task) -> Batch:
        """The train data of a task."""
        y = self.stream.labels(index, task.train_y).to(self.budget.device)
        return Batch(self.inputs(task.train_x), y, torch.full_like(y, index))

    def shared(self) -> dict[str, nn.Parameter]:
        """Parameters that later tasks go on training, by name."""
        named = self.network.named_parameters()
        own_heads = len(self.network.heads) > 1
        return {n: p for n, p in named if not (own_heads and n.startswith("heads."))}


def make_backbone(input_shape: tuple[int, ...], budget: Budget) -> nn.Module:
    """The backbone of a budget."""
    if budget.backbone == "mlp":
        return MLP(math.prod(input_shape), budget.hidden_dim, budget.n_layers)
    return TokenTransformer(input_shape, budget.hidden_dim, budget.n_layers, budget.n_heads)


def count_parameters(module: nn.Module) -> int:
    """Numbers in all parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let random weights depend on the seed alone, and leave the global generators as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
