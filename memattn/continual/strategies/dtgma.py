"""DTG-MA as a strategy: a column of attention for each task."""

import math

import torch
from torch import Tensor

from memattn.checks import must
from memattn.continual.strategies.base import Budget, Strategy, seeded
from memattn.data.streams import Stream, Task
from memattn.dtgma.train import READS, train_task


class DTGMA(Strategy):
    """``DTGMAModel``, trained as ``train_continual`` trains it.

    It has its own network, whatever the backbone of the budget is. Where the task of a sample is
    not told, it is inferred.

    Args:
        stream: The tasks.
        budget: The training budget.
        seed: Seed of the weights and of all random choices.
        reads: Earlier tasks whose columns a new one reads: ``"none"``, ``"previous"`` or ``"all"``.
        shared: ``"frozen"``: token projection and norms keep their random values.
            ``"first_task"``: the first task trains them.
        rank: Rank of the projections of each task; None for full ones.
        inference: How a task is inferred in scenarios ``"domain"`` and ``"class"``:
            ``"prototype"`` or ``"entropy"``.

    Raises:
        ValueError: If an option is unknown or out of range.
    """

    name = "dtgma"

    def __init__(
        self,
        stream: Stream,
        budget: Budget,
        seed: int,
        *,
        reads: str = "none",
        shared: str = "frozen",
        rank: int | None = None,
        inference: str = "prototype",
    ) -> None:
        from memattn.dtgma import INFERENCE, DTGMAModel

        super().__init__(stream, budget, seed)
        if reads not in READS:
            must("reads", f"be one of {', '.join(READS)}", repr(reads))
        if inference not in INFERENCE:
            must("inference", f"be one of {', '.join(INFERENCE)}", repr(inference))
        self.reads = reads
        shape = stream.input_shape
        with seeded(seed):
            self.model = DTGMAModel(
                shape if len(shape) in (2, 3) else math.prod(shape),
                budget.hidden_dim,
                stream.n_outputs,
                budget.n_layers,
                budget.n_heads,
                rank=rank,
                shared=shared,
                inference=None if stream.scenario == "task" else inference,
            ).to(budget.device)

    def learn_task(self, index: int, task: Task) -> None:
        earlier = {"none": [], "previous": list(range(index))[-1:], "all": list(range(index))}
        with seeded(self.seed + index):
            self.model.register_task(index, len(task.classes), reads=earlier[self.reads])
        train_task(
            self.model,
            index,
            self.inputs(task.train_x),
            task.train_y.to(self.budget.device),
            epochs=self.budget.epochs,
            batch_size=self.budget.batch_size,
            lr=self.budget.lr,
            input_noise=self.budget.input_noise,
            seed=self.seed,
        )
        self.model.freeze_task(index)

    def forward(self, x: Tensor, index: int) -> Tensor:
        if self.stream.scenario == "task":
            return self.model(x, index)
        if not self.learned:  # no column to ask
            return x.new_zeros(len(x), self.stream.n_outputs)
        tasks = self.model.infer_task(x)
        own = self.model(x, tasks)
        if self.stream.scenario == "domain":
            return own
        offsets = torch.tensor([self.stream.offset(int(task)) for task in tasks], device=x.device)
        columns = offsets[:, None] + torch.arange(own.shape[1], device=x.device)
        logits = x.new_full((len(x), self.stream.n_outputs + own.shape[1]), -math.inf)
        # a smaller task's padding is -inf and may fall on what follows it
        return logits.scatter(1, columns, own)[:, : self.stream.n_outputs]

    def inputs(self, x: Tensor) -> Tensor:
        x = super().inputs(x)
        return x if len(self.stream.input_shape) in (2, 3) else x.flatten(1)

    def parameters_to_predict(self) -> int:
        report = self.model.parameter_report()
        return report.total + (0 if self.stream.scenario == "task" else report.prototypes)
