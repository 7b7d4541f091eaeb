"""Baselines: fine-tuning, joint training, and separate networks."""

from collections.abc import Iterator

from torch import Tensor, nn

from memattn.continual.strategies.base import Budget, count_parameters, seeded
from memattn.continual.strategies.network import Batch, Network, NetworkStrategy
from memattn.data.streams import Stream


class FineTuning(NetworkStrategy):
    """One network, trained on one task after another without protection against forgetting.

    In scenario ``"task"`` with a head for each task, of which only the current one is trained.
    """

    name = "finetuning"


class Joint(NetworkStrategy):
    """One network trained on the data of all tasks so far: an upper bound that keeps all data.

    At each task it starts from new weights and takes as many steps as the other strategies have
    taken for all tasks so far. So its last network has had the same budget; over the whole stream
    it computes more.
    """

    name = "joint"

    def __init__(self, stream: Stream, budget: Budget, seed: int) -> None:
        super().__init__(stream, budget, seed)
        self._data: list[Batch] = []

    def begin(self, index: int, data: Batch) -> None:
        self._data.append(data)
        n_active = self.network.n_active
        with seeded(self.seed):
            self.network = self.build().to(self.budget.device)
        self.network.n_active = n_active

    def learn(self, index: int, data: Batch) -> None:
        n_steps = sum(self.budget.steps(len(part.y)) for part in self._data)
        parameters = list(self.network.parameters())
        self.train(index, parameters, self.batches(index, data), n_steps)

    def batches(self, index: int, data: Batch) -> Iterator[Batch]:
        return self.shuffled(Batch.cat(self._data), self.budget.batch_size)

    def buffer_numbers(self) -> int:
        return sum(tensor.numel() for part in self._data for tensor in part)


class Separate(NetworkStrategy):
    """A network of its own for each task: nothing is shared, nothing forgotten or transferred."""

    name = "separate"
    scenarios = ("task",)

    def build(self) -> Network:
        # all at once, so that each has other random weights
        self._networks = [Network(self.stream, self.budget) for _ in self.stream.tasks]
        for index, network in enumerate(self._networks):
            # a network needs no other task's head
            network.heads = nn.ModuleList([network.head(index)])
            network.to(self.budget.device)
        return self._networks[0]

    def begin(self, index: int, data: Batch) -> None:
        self.network = self._networks[index].train()

    def forward(self, x: Tensor, index: int) -> Tensor:
        return self._networks[index].eval()(x, index)

    def parameters_to_predict(self) -> int:
        return sum(count_parameters(network) for network in self._networks)
