"""Strategies that store samples: experience replay and DER++."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from memattn.continual.strategies.base import Budget
from memattn.continual.strategies.network import Batch, NetworkStrategy
from memattn.continual.strategies.penalty import check_non_negative
from memattn.data.streams import Stream


class Reservoir:
    """A uniform random sample of at most ``size`` of all rows offered so far.

    Args:
        size: Rows that are kept.
        generator: Source of the choices.

    Note:
        Source: Vitter (1985), algorithm R.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size, self.generator = size, generator
        self.offered = 0
        self.columns: list[Tensor] = []

    def __len__(self) -> int:
        return min(self.offered, self.size)

    def add(self, *columns: Tensor) -> None:
        """Offer rows: tensors of the same length, the same number of them at every call."""
        if not self.columns:
            self.columns = [c.new_zeros(self.size, *c.shape[1:]) for c in columns]
        n = len(columns[0])
        seen = torch.arange(self.offered, self.offered + n, dtype=torch.float64)
        drawn = (torch.rand(n, generator=self.generator, dtype=torch.float64) * (seen + 1)).long()
        place = torch.where(seen < self.size, seen.long(), drawn)
        # of several rows for one place the last one stays
        latest = {slot: row for row, slot in enumerate(place.tolist()) if slot < self.size}
        if latest:
            slots, rows = (torch.tensor(list(i)) for i in (latest.keys(), latest.values()))
            for own, new in zip(self.columns, columns, strict=True):
                own[slots.to(own.device)] = new[rows.to(new.device)]
        self.offered += n

    def draw(self, n: int) -> list[Tensor]:
        """``n`` random rows, with replacement."""
        rows = torch.randint(len(self), (n,), generator=self.generator)
        return [column[rows.to(column.device)] for column in self.columns]

    def numel(self) -> int:
        """Numbers in the rows that are kept."""
        return sum(column[: len(self)].numel() for column in self.columns)


class Replay(NetworkStrategy):
    """Experience replay: from the second task on, half of every batch comes from a reservoir.

    The samples of a task are offered to the reservoir once, after it was learned.

    Args:
        stream: The tasks.
        budget: The training budget; ``buffer_size`` samples are kept.
        seed: Seed of the weights and of all random choices.

    Note:
        Source: Chaudhry et al. (2019), https://arxiv.org/abs/1902.10486, with reservoir sampling.
        Differs: stored samples are half of the batch instead of being added to it, so that a step
        costs the same. The new task is then seen for half as many epochs.
    """

    name = "replay"

    def __init__(self, stream: Stream, budget: Budget, seed: int) -> None:
        super().__init__(stream, budget, seed)
        self.memory = Reservoir(budget.buffer_size, self.generator)

    def parameters(self, index: int) -> list[torch.nn.Parameter]:
        return list(self.network.parameters())

    def batches(self, index: int, data: Batch) -> Iterator[Batch]:
        size = self.budget.batch_size
        if not len(self.memory):
            yield from self.shuffled(data, size)
        for new in self.shuffled(data, size // 2):
            yield Batch.cat([new, Batch(*self.memory.draw(size - size // 2))])

    def finish(self, index: int, data: Batch) -> None:
        self.memory.add(*data)

    def buffer_numbers(self) -> int:
        return self.memory.numel()


class DERPlusPlus(NetworkStrategy):
    """DER++: replays stored samples with the logits that they had when they were stored.

    From the second task on, half of every batch is new samples. A quarter comes from the reservoir
    and adds ``der_alpha`` times the mean squared distance to the stored logits. The last quarter,
    also from the reservoir, adds ``der_beta`` times the cross-entropy with the stored labels. Every
    batch of new samples is offered to the reservoir, with its current logits and with the noise on
    its inputs, if the budget has any.

    Args:
        stream: The tasks.
        budget: The training budget; ``buffer_size`` samples are kept.
        seed: Seed of the weights and of all random choices.
        der_alpha: Strength of the logits.
        der_beta: Strength of the labels.

    Raises:
        ValueError: If an argument is out of range.

    Note:
        Source: Buzzega et al. (2020), https://arxiv.org/abs/2004.07211, algorithm 2. Differs: the
        stored samples are part of the batch (see ``Replay``); in scenario ``"task"`` logits are
        those of the sample's own head.
    """

    name = "derpp"

    def __init__(
        self,
        stream: Stream,
        budget: Budget,
        seed: int,
        *,
        der_alpha: float = 0.5,
        der_beta: float = 1.0,
    ) -> None:
        check_non_negative("der_alpha", der_alpha)
        check_non_negative("der_beta", der_beta)
        super().__init__(stream, budget, seed)
        self.der_alpha, self.der_beta = der_alpha, der_beta
        self.memory = Reservoir(budget.buffer_size, self.generator)

    def parameters(self, index: int) -> list[torch.nn.Parameter]:
        return list(self.network.parameters())

    def batches(self, index: int, data: Batch) -> Iterator[Batch]:
        size = self.budget.batch_size
        return self.shuffled(data, size // 2 if index else size)

    def loss(self, index: int, batch: Batch, progress: float) -> Tensor:
        features = self.network.backbone(batch.x)
        loss = self.cross_entropy(features, batch)
        # drawn before the new samples are offered, so that they are not replayed at once
        if index:
            quarter = self.budget.batch_size // 4
            x, _, task, stored = self.memory.draw(quarter)
            now = self.raw_logits(self.network.backbone(x), task)
            loss = loss + self.der_alpha * F.mse_loss(now, stored)
            x, y, task, _ = self.memory.draw(quarter)
            labelled = Batch(x, y, task)
            loss = loss + self.der_beta * self.cross_entropy(self.network.backbone(x), labelled)
        with torch.no_grad():
            logits = self.raw_logits(features, batch.task)
        self.memory.add(*batch, logits)
        return loss

    def raw_logits(self, features: Tensor, task: Tensor) -> Tensor:
        """``[n, stream.n_outputs]``; 0 for outputs that a task's head lacks."""
        logits = features.new_zeros(len(features), self.stream.n_outputs)
        for index in task.unique().tolist():
            rows = task == index
            own = self.network.head(index)(features[rows])
            logits[rows, : own.shape[1]] = own
        return logits

    def buffer_numbers(self) -> int:
        return self.memory.numel()
