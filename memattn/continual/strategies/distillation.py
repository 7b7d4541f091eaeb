"""Learning without forgetting: the old network's answers to new samples are kept."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from memattn.checks import must
from memattn.continual.strategies.base import Budget
from memattn.continual.strategies.network import Batch, Network, NetworkStrategy
from memattn.continual.strategies.penalty import check_non_negative
from memattn.data.streams import Stream


class LwF(NetworkStrategy):
    """Learning without forgetting: distils from a copy of the network as it was before the task.

    To the cross-entropy on the new samples it adds ``lwf_lambda`` times, for every earlier head,
    ``temperature^2 * KL(old || new)`` of the softened answers to the same samples. In scenario
    ``"domain"`` the one head is distilled, in ``"class"`` its outputs for earlier classes.

    Args:
        stream: The tasks.
        budget: The training budget.
        seed: Seed of the weights and of all random choices.
        lwf_lambda: Strength of distillation.
        temperature: What logits are divided by.

    Raises:
        ValueError: If an argument is out of range.

    Note:
        Source: Li and Hoiem (2016), https://arxiv.org/abs/1606.09282, section 3. Differs: no
        warm-up in which only the new head is trained; the divergence instead of the cross-entropy,
        which has the same gradient and is 0 where nothing changed; and the factor
        ``temperature^2`` of Hinton et al. (2015), https://arxiv.org/abs/1503.02531.
    """

    name = "lwf"

    def __init__(
        self,
        stream: Stream,
        budget: Budget,
        seed: int,
        *,
        lwf_lambda: float = 1.0,
        temperature: float = 2.0,
    ) -> None:
        check_non_negative("lwf_lambda", lwf_lambda)
        if not temperature > 0.0:
            must("temperature", "be above 0", temperature)
        super().__init__(stream, budget, seed)
        self.lwf_lambda, self.temperature = lwf_lambda, temperature
        self._teacher: Network | None = None

    def begin(self, index: int, data: Batch) -> None:
        if index:
            self._teacher = copy.deepcopy(self.network).requires_grad_(False).eval()
            self._teacher.n_active = self.stream.offset(index) or self.stream.n_outputs

    def parameters(self, index: int) -> list[torch.nn.Parameter]:
        # earlier heads follow the backbone, so they are trained too
        heads = [p for i in range(index + 1) for p in self.network.head(i).parameters()]
        return [*self.network.backbone.parameters(), *dict.fromkeys(heads)]

    def loss(self, index: int, batch: Batch, progress: float) -> Tensor:
        features = self.network.backbone(batch.x)
        loss = self.cross_entropy(features, batch)
        if self._teacher is None:
            return loss
        with torch.no_grad():
            old_features = self._teacher.backbone(batch.x)
        for head in range(index if len(self.network.heads) > 1 else 1):
            old = self._teacher.logits(old_features, head)
            new = self.network.logits(features, head)[:, : old.shape[1]]
            loss = loss + self.lwf_lambda * distillation_loss(new, old, self.temperature)
        return loss

    def finish(self, index: int, data: Batch) -> None:
        self._teacher = None


def distillation_loss(new: Tensor, old: Tensor, temperature: float) -> Tensor:
    """``temperature^2 * KL(old || new)`` of softened logits, the mean over samples.

    Args:
        new: Logits that are trained, ``[n, n_classes]``.
        old: Logits to keep, of the same shape.
        temperature: What both are divided by.
    """
    log_new, log_old = (F.log_softmax(logits / temperature, dim=1) for logits in (new, old))
    divergence = F.kl_div(log_new, log_old, reduction="batchmean", log_target=True)
    return temperature**2 * divergence
