"""The base class of continual-learning strategies, and their training budget."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memattn.checks import check_device, check_int, check_seed, must
from memattn.data.streams import SCENARIOS, Stream, Task

Backbone = Literal["mlp", "transformer"]
BACKBONES: tuple[str, ...] = get_args(Backbone)
_EVAL_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The training budget, the same for every strategy.

    Every strategy takes ``steps(n)`` gradient steps of Adam on a task with ``n`` train samples, on
    ``batch_size`` samples each, and has a backbone of the same sizes. What a strategy keeps beside
    the backbone differs between strategies; it is counted. Adam restarts at each task, and its
    learning rate falls to 0 along a cosine.

    Attributes:
        epochs: Passes over the train data of a task.
        batch_size: Samples in a gradient step, replayed ones included.
        lr: Initial learning rate of Adam.
        hidden_dim: Width of the backbone.
        n_layers: Layers of the backbone.
        backbone: ``"mlp"``, or ``"transformer"``, which splits inputs into tokens as DTG-MA does.
        n_heads: Attention heads of the transformer; divides ``hidden_dim``.
        buffer_size: Samples that a replay buffer holds.
        input_noise: Standard deviation of the Gaussian noise that is added to inputs in training.
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
    input_noise: float = 0.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("epochs", "hidden_dim", "n_layers", "n_heads", "buffer_size"):
            check_int(name, getattr(self, name), 1)
        check_int("batch_size", self.batch_size, 4)  # replay divides it by four
        if not 0.0 < self.lr < math.inf:
            must("lr", "be positive and finite", self.lr)
        if not 0.0 <= self.input_noise < math.inf:
            must("input_noise", "be finite and at least 0", self.input_noise)
        if self.backbone not in BACKBONES:
            must("backbone", f"be one of {', '.join(BACKBONES)}", repr(self.backbone))
        if self.hidden_dim % self.n_heads:
            must("n_heads", f"divide hidden_dim, {self.hidden_dim}", self.n_heads)

    def steps(self, n: int) -> int:
        """Gradient steps on a task with ``n`` train samples."""
        return self.epochs * math.ceil(n / self.batch_size)


class Strategy(ABC):
    """A way to learn tasks one after another: ``fit`` each in order, ``predict`` any learned one.

    Args:
        stream: The tasks. Of tasks that are not learned yet, only shapes and classes are read.
        budget: The training budget.
        seed: Seed of the weights and of all random choices.

    Raises:
        ValueError: If the strategy does not support the stream's scenario or the backbone, or the
            budget's device is missing.
    """

    name: ClassVar[str]
    scenarios: ClassVar[tuple[str, ...]] = SCENARIOS
    backbones: ClassVar[tuple[str, ...]] = BACKBONES

    def __init__(self, stream: Stream, budget: Budget, seed: int) -> None:
        check_seed("seed", seed)
        check_device("budget.device", budget.device)
        if stream.scenario not in self.scenarios:
            wanted = f"have scenario {' or '.join(self.scenarios)} for strategy {self.name!r}"
            must("stream", wanted, repr(stream.scenario))
        if budget.backbone not in self.backbones:
            wanted = f"be {' or '.join(self.backbones)} for strategy {self.name!r}"
            must("budget.backbone", wanted, repr(budget.backbone))
        self.stream, self.budget, self.seed = stream, budget, seed
        self.learned = 0

    @torch.enable_grad()
    def fit(self, index: int, task: Task) -> None:
        """Learn the next task.

        Args:
            index: Its index, the number of tasks learned before.
            task: The task, or one with the same name, classes and shape and other samples.

        Raises:
            ValueError: If it is not the next task of the stream.
            FloatingPointError: If the loss is not finite.
        """
        self.stream.check_index(index)
        if index != self.learned:
            must("index", f"be that of the next task, {self.learned}", index)
        wanted, got = (
            f"{t.name!r} with classes {t.classes} and inputs {list(t.train_x.shape[1:])}"
            for t in (self.stream.tasks[index], task)
        )
        if got != wanted:
            must("task", f"be that of the stream, {wanted}", got)
        self.learn_task(index, task)
        self.learned += 1

    @torch.no_grad()
    def predict(self, index: int, x: Tensor) -> Tensor:
        """Logits of samples of a task.

        Args:
            index: Index of the task. It has no effect in scenarios ``"domain"`` and ``"class"``.
            x: Samples, ``[n, ...]``.

        Returns:
            ``[n, n_classes]`` of the task in scenario ``"task"``, else ``[n, stream.n_outputs]``,
            with -inf for classes of tasks that are not learned yet.

        Raises:
            ValueError: If in scenario ``"task"`` the task is not learned yet.
        """
        self.stream.check_index(index)
        if self.stream.scenario == "task" and index >= self.learned:
            must("index", f"be that of one of the {self.learned} tasks learned", index)
        logits = torch.cat([self.forward(part, index) for part in self.inputs(x).split(_EVAL_ROWS)])
        missing = self.stream.n_outputs - logits.shape[1]
        if self.stream.scenario == "class" and missing:
            logits = F.pad(logits, (0, missing), value=-math.inf)
        return logits

    def parameters_stored(self) -> int:
        """Count of values kept for prediction and further training, without stored samples."""
        return self.parameters_to_predict()

    @abstractmethod
    def parameters_to_predict(self) -> int:
        """Count of values needed to predict all tasks."""

    def buffer_numbers(self) -> int:
        """Count of values in stored samples."""
        return 0

    @abstractmethod
    def learn_task(self, index: int, task: Task) -> None:
        """Learn the next task."""

    @abstractmethod
    def forward(self, x: Tensor, index: int) -> Tensor:
        """Logits of samples of a task."""

    def inputs(self, x: Tensor) -> Tensor:
        """Samples in the shape and on the device that the network takes."""
        return x.to(self.budget.device, torch.float32)


def count_parameters(module: nn.Module) -> int:
    """Count of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context with seeded generators; afterwards they are as before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
