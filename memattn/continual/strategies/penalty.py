"""Strategies that pull important weights back to their values: EWC and SI."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memattn.checks import check_bool, check_int, must
from memattn.continual.strategies.base import Budget
from memattn.continual.strategies.network import Batch, NetworkStrategy
from memattn.data.streams import Stream

Named = dict[str, Tensor]


class QuadraticPenalty(NetworkStrategy):
    """Adds ``strength / 2 * sum importance * (weight - anchor)^2`` to the loss.

    It applies to the weights that later tasks train too: the backbone, and a shared head. The
    gradient of the penalty is computed by formula, without autograd.
    """

    def __init__(self, stream: Stream, budget: Budget, seed: int, strength: float) -> None:
        super().__init__(stream, budget, seed)
        self.strength = strength
        self.importance = {n: torch.zeros_like(p) for n, p in self.shared().items()}
        self.anchor = {n: p.detach().clone() for n, p in self.shared().items()}

    def before_step(self, index: int) -> None:
        for name, parameter in self.shared().items():
            assert parameter.grad is not None
            distance = parameter.detach() - self.anchor[name]
            parameter.grad += self.strength * self.importance[name] * distance

    def kept(self) -> Iterable[Tensor]:
        return [*self.importance.values(), *self.anchor.values()]


class EWC(QuadraticPenalty):
    """Elastic weight consolidation: importance is the diagonal of the Fisher information.

    The Fisher of a task is taken at the weights it ends with, over ``fisher_samples`` of its train
    samples, with the exact expectation over the labels that the network itself predicts (it is not
    the empirical Fisher, which takes the true labels).

    Args:
        stream: The tasks.
        budget: The training budget.
        seed: Seed of the weights and of all random choices.
        ewc_lambda: Strength of the penalty.
        online: Keep one decaying Fisher around the latest weights instead of the sum of the
            penalties of all tasks. That sum is one quadratic too, so both store two numbers for
            each weight.
        gamma: Decay of the earlier Fisher at each task; online only.
        fisher_samples: Largest number of samples for the Fisher.

    Raises:
        ValueError: If an argument is out of range.

    Note:
        Sources: Kirkpatrick et al. (2017), https://arxiv.org/abs/1612.00796, equation 3; online:
        Schwarz et al. (2018), https://arxiv.org/abs/1805.06370, section 3. Differs from both: the
        expectation over labels is exact.
    """

    name = "ewc"

    def __init__(
        self,
        stream: Stream,
        budget: Budget,
        seed: int,
        *,
        ewc_lambda: float = 100.0,
        online: bool = False,
        gamma: float = 1.0,
        fisher_samples: int = 200,
    ) -> None:
        check_non_negative("ewc_lambda", ewc_lambda)
        check_bool("online", online)
        check_int("fisher_samples", fisher_samples, 1)
        if not 0.0 <= gamma <= 1.0:
            must("gamma", "be in 0..1", gamma)
        super().__init__(stream, budget, seed, ewc_lambda)
        self.online, self.gamma, self.fisher_samples = online, gamma, fisher_samples

    def finish(self, index: int, data: Batch) -> None:
        fisher = self.fisher(index, data)
        for name, parameter in self.shared().items():
            weight = parameter.detach()
            before, new = self.importance[name], fisher[name]
            if self.online:
                self.importance[name] = self.gamma * before + new
                self.anchor[name] = weight.clone()
            else:
                # the sum of two quadratics is one around their weighted mean, plus a constant
                total = before + new
                mean = (before * self.anchor[name] + new * weight) / total
                self.importance[name] = total
                self.anchor[name] = torch.where(total > 0.0, mean, weight)

    def fisher(self, index: int, data: Batch) -> Named:
        """Mean over samples of the squared gradients of log-likelihoods, by name."""
        shared = self.shared()
        fisher = {name: torch.zeros_like(p) for name, p in shared.items()}
        order = torch.randperm(len(data.y), generator=self.generator)[: self.fisher_samples]
        for row in order.split(1):
            logits = self.network(data.x[row.to(data.y.device)], index)
            log_p = F.log_softmax(logits, dim=1)[0]
            for i in range(len(log_p)):
                more = i + 1 < len(log_p)
                gradients = torch.autograd.grad(log_p[i], list(shared.values()), retain_graph=more)
                p = log_p[i].detach().exp()
                for total, gradient in zip(fisher.values(), gradients, strict=True):
                    total += p * gradient.square()
        return {name: total / len(order) for name, total in fisher.items()}


class SI(QuadraticPenalty):
    """Synaptic intelligence: importance is how much a weight's updates have reduced the loss.

    ``importance += max(path, 0) / (change^2 + damping)`` at the end of a task, where ``path`` sums
    ``-gradient * step`` over its steps and ``change`` is from its first to its last weights. The
    penalty is ``si_c * importance * (weight - anchor)^2``.

    Args:
        stream: The tasks.
        budget: The training budget.
        seed: Seed of the weights and of all random choices.
        si_c: Strength of the penalty.
        damping: Keeps the importance of weights that hardly moved finite.

    Raises:
        ValueError: If an argument is out of range.

    Note:
        Source: Zenke et al. (2017), https://arxiv.org/abs/1703.04200, equations 3 to 5. Differs:
        a path along which the loss rose counts as 0, since a negative importance would push weights
        away.
    """

    name = "si"

    def __init__(
        self,
        stream: Stream,
        budget: Budget,
        seed: int,
        *,
        si_c: float = 10.0,
        damping: float = 0.1,
    ) -> None:
        check_non_negative("si_c", si_c)
        if not damping > 0.0:
            must("damping", "be above 0", damping)
        super().__init__(stream, budget, seed, 2.0 * si_c)
        self.damping = damping

    def begin(self, index: int, data: Batch) -> None:
        self._path = PathIntegral(self.shared())

    def before_step(self, index: int) -> None:
        self._path.before_step()  # the gradient of the task's loss, without the penalty
        super().before_step(index)

    def after_step(self, index: int) -> None:
        self._path.after_step()

    def finish(self, index: int, data: Batch) -> None:
        for name, parameter in self.shared().items():
            change = parameter.detach() - self._path.start[name]
            gain = self._path.total[name].clamp_min(0.0)
            self.importance[name] += gain / (change.square() + self.damping)
            self.anchor[name] = parameter.detach().clone()
        del self._path


class PathIntegral:
    """Sums ``-gradient * step`` of each weight: how much its updates have reduced the loss.

    Args:
        parameters: The weights by name, whose ``grad`` is read.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.start = {name: p.detach().clone() for name, p in parameters.items()}
        self.total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self._before: dict[str, tuple[Tensor, Tensor]] = {}

    def before_step(self) -> None:
        """Record gradients and weights before a step."""
        for name, p in self.parameters.items():
            assert p.grad is not None
            self._before[name] = p.grad.clone(), p.detach().clone()

    def after_step(self) -> None:
        """Add the product of gradient and step."""
        for name, (gradient, weight) in self._before.items():
            self.total[name] -= gradient * (self.parameters[name].detach() - weight)


def check_non_negative(name: str, value: float) -> None:
    """Raise ValueError unless a strength is finite and at least 0."""
    if not 0.0 <= value < float("inf"):
        must(name, "be at least 0 and finite", value)
