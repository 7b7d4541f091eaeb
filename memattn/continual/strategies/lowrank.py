"""Small modules for each task beside frozen weights: LoRA and adapters."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.func import functional_call

from memattn.checks import check_int
from memattn.continual.strategies.base import Budget, count_parameters, seeded
from memattn.continual.strategies.network import Batch, Network, NetworkStrategy
from memattn.data.streams import Stream


class FrozenBase(NetworkStrategy, ABC):
    """Trains the whole backbone on the first task, then freezes it and adds a part for each task.

    Logits of earlier tasks never change.
    """

    scenarios = ("task",)

    def __init__(self, stream: Stream, budget: Budget, seed: int) -> None:
        super().__init__(stream, budget, seed)
        self.parts: list[nn.Module] = []  # of the second task, the third, ...

    @abstractmethod
    def make_part(self, network: Network) -> nn.Module:
        """The part of one task, which changes nothing before it is trained."""

    @abstractmethod
    def features(self, x: Tensor, part: nn.Module) -> Tensor:
        """Features of the backbone with a part."""

    def begin(self, index: int, data: Batch) -> None:
        if index:
            with seeded(self.seed + index):
                self.parts.append(self.make_part(self.network).to(self.budget.device))

    def parameters(self, index: int) -> list[nn.Parameter]:
        if index == 0:
            return super().parameters(index)
        return [*self.parts[-1].parameters(), *self.network.head(index).parameters()]

    def loss(self, index: int, batch: Batch, progress: float) -> Tensor:
        if index == 0:
            return super().loss(index, batch, progress)
        return self.cross_entropy(self.features(batch.x, self.parts[-1]), batch)

    def forward(self, x: Tensor, index: int) -> Tensor:
        if index == 0:
            return super().forward(x, index)
        return self.network.logits(self.features(x, self.parts[index - 1]), index)

    def parameters_to_predict(self) -> int:
        return super().parameters_to_predict() + sum(map(count_parameters, self.parts))


class LoRA(FrozenBase):
    """Low-rank adaptation: adds ``up @ down`` of ``rank`` to every weight matrix, for each task.

    Args:
        stream: The tasks.
        budget: The training budget.
        seed: Seed of the weights and of all random choices.
        rank: Rank of the addition.

    Raises:
        ValueError: If ``rank`` is below 1.

    Note:
        Source: Hu et al. (2021), https://arxiv.org/abs/2106.09685, section 4.1, with ``alpha``
        equal to the rank. Differs: the base is what the first task has trained, not a pretrained
        model, and every matrix is adapted.
    """

    name = "lora"

    def __init__(self, stream: Stream, budget: Budget, seed: int, *, rank: int = 16) -> None:
        check_int("rank", rank, 1)
        super().__init__(stream, budget, seed)
        self.rank = rank

    def make_part(self, network: Network) -> nn.Module:
        return LowRank(network.backbone, self.rank)

    def features(self, x: Tensor, part: nn.Module) -> Tensor:
        assert isinstance(part, LowRank)
        named = dict(self.network.backbone.named_parameters())
        weights = {name: named[name] + delta for name, delta in part.deltas().items()}
        return functional_call(self.network.backbone, weights, (x,))


class LowRank(nn.Module):
    """A low-rank addition to every weight matrix of a module, 0 at first."""

    def __init__(self, module: nn.Module, rank: int) -> None:
        super().__init__()
        matrices = {name: p for name, p in module.named_parameters() if p.dim() == 2}
        self.names = list(matrices)
        self.down = nn.ParameterList()
        self.up = nn.ParameterList()
        for matrix in matrices.values():
            n_out, n_in = matrix.shape
            self.down.append(torch.empty(rank, n_in).uniform_(-(n_in**-0.5), n_in**-0.5))
            self.up.append(torch.zeros(n_out, rank))

    def deltas(self) -> dict[str, Tensor]:
        """What is added, by the name of the matrix."""
        pairs = zip(self.names, self.up, self.down, strict=True)
        return {name: up @ down for name, up, down in pairs}


class Adapter(FrozenBase):
    """Adapters: after every layer ``h + up(relu(down(h)))`` through a bottleneck, for each task.

    Args:
        stream: The tasks.
        budget: The training budget.
        seed: Seed of the weights and of all random choices.
        bottleneck: Width of the bottleneck.

    Raises:
        ValueError: If ``bottleneck`` is below 1.

    Note:
        Source: Houlsby et al. (2019), https://arxiv.org/abs/1902.00751, section 2. Differs: the
        base is what the first task has trained, not a pretrained model; one adapter for a layer;
        norms are not trained anew.
    """

    name = "adapter"

    def __init__(self, stream: Stream, budget: Budget, seed: int, *, bottleneck: int = 32) -> None:
        check_int("bottleneck", bottleneck, 1)
        super().__init__(stream, budget, seed)
        self.bottleneck = bottleneck

    def make_part(self, network: Network) -> nn.Module:
        width = self.budget.hidden_dim
        return nn.ModuleList(
            Bottleneck(width, self.bottleneck) for _ in range(self.budget.n_layers)
        )

    def features(self, x: Tensor, part: nn.Module) -> Tensor:
        assert isinstance(part, nn.ModuleList)
        return self.network.backbone(x, lambda i, hidden: part[i](hidden))


class Bottleneck(nn.Module):
    """``h + up(relu(down(h)))``, the identity at first."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.up(torch.relu(self.down(hidden)))
