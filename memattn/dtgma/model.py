"""DTG-MA: a classifier that learns tasks one after the other, each in a column of a task graph."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from memattn.checks import check_int, check_tensor, must
from memattn.dtgma import inference as infer
from memattn.dtgma import parameters, storage
from memattn.dtgma.attention import TaskAttention, task_attention
from memattn.dtgma.columns import TaskColumn, TaskColumns, TaskName, check_mask
from memattn.dtgma.layers import DTGMALayer, DTGMALayers
from memattn.dtgma.options import INFERENCE, check_choices, check_sizes, exchanged_options
from memattn.dtgma.parameters import ParameterReport
from memattn.nn.task_linear import TaskGroups
from memattn.nn.task_tokens import TokenProjection

__all__ = ["DTGMAModel", "ParameterReport", "TaskName"]

_Model = TypeVar("_Model", bound="DTGMAModel")


class DTGMAModel(nn.Module):
    """DTG-MA: a classifier that learns tasks one after the other and forgets none.

    Every task has a *column*: the tokens of the input, and ``n_nodes`` node tokens of its own, go
    through ``n_layers`` of

    ``x = x + Attention_t(LayerNorm(x)); x = x + FFN_t(LayerNorm(x))``

    and a head, with projections, feed-forward (``E -> 4E -> E``, ReLU) and head of the task ``t``.
    The column is read out by the mean of its node tokens, or of all tokens where ``n_nodes`` is 0.
    Token projection and norms are shared. In the task graph, a column may *read* columns of
    earlier, frozen tasks: its tokens also attend to theirs, which are computed from the same input
    by the earlier tasks' parameters and never see the reader. Nothing a later task does changes
    what an earlier one computes.

    A batch may mix tasks. See ``docs/dtgma.md``.

    Args:
        input_dim: Features of an input, or the axes of an image, ``(H, W)`` or ``(C, H, W)``; see
            ``memattn.nn.TokenProjection`` for how inputs become tokens.
        hidden_dim: Features of a token, ``E``.
        num_classes: Classes of a task that is registered without a number of its own.
        n_layers: Layers.
        n_heads: Attention heads, a divisor of ``hidden_dim``.
        n_tokens: Desired tokens of a vector or an image. 1 makes the whole input one token, as in
            the published code; attention then has a single key.
        patch_size: Side of an image patch; None means what gives ``n_tokens``.
        n_nodes: Learned node tokens of each task; None means 1, or 0 where the input is one token.
        positions: Whether tokens of sequences get positions.
        dropout: Probability of dropping a feature of an attention or feed-forward output.
        rank: Rank of each task's weights in the layers; None for full weights.
        shared: ``"frozen"``: the shared parameters keep their initial values, as in the published
            code. ``"first_task"``: they are trained with the first task. They are frozen when it is
            frozen or a second one is registered.
        inference: How ``forward`` finds the task of a sample if it is not told: ``"prototype"`` or
            ``"entropy"``, see ``infer_task``; None makes that an error.
        backend: Backend of ``memattn.task_masked_attention``.

    Raises:
        TypeError: If an argument has the wrong Python type.
        ValueError: If a size is below its minimum, ``n_heads`` does not divide ``hidden_dim``, or
            an option is unknown.

    Example:
        >>> model = DTGMAModel(input_dim=784, hidden_dim=32, num_classes=2)
        >>> model.register_task("even or odd")
        >>> model(torch.randn(5, 784), "even or odd").shape
        torch.Size([5, 2])

    Note:
        Source: Kirichenko, DTG-MA, https://github.com/infosave2007/dtgma; the same function and
        parameters with ``n_tokens=1``. Differs: inputs are split into tokens, so that masks have an
        effect; tasks may read earlier ones; ``get_task_parameters`` counts all that is registered.
    """

    def __init__(
        self,
        input_dim: int | Sequence[int],
        hidden_dim: int,
        num_classes: int,
        n_layers: int = 2,
        n_heads: int = 4,
        *,
        n_tokens: int = 16,
        patch_size: int | None = None,
        n_nodes: int | None = None,
        positions: bool = False,
        dropout: float = 0.0,
        rank: int | None = None,
        shared: str = "frozen",
        inference: str | None = None,
        backend: str = "auto",
    ) -> None:
        if n_nodes is None:
            n_nodes = 0 if n_tokens == 1 and patch_size is None else 1
        check_sizes(hidden_dim, num_classes, n_layers, n_heads, n_nodes)
        check_choices(positions, dropout, shared, inference)
        super().__init__()
        self.tokens = TokenProjection(
            input_dim, hidden_dim, n_tokens=n_tokens, patch_size=patch_size, positions=positions
        )
        self.layers = DTGMALayers(
            DTGMALayer(hidden_dim, n_heads, float(dropout), rank, backend) for _ in range(n_layers)
        )
        self.columns = TaskColumns()
        self.num_classes = num_classes
        self.n_heads = n_heads
        self.n_nodes = n_nodes
        self.rank = rank
        self.inference = inference
        self.shared_frozen = False
        self._training = dict(dropout=float(dropout), shared=shared, backend=backend)
        if shared == "frozen":
            self.freeze_shared()

    def forward(
        self, x: Tensor, task_id: TaskName | Sequence[TaskName] | Tensor | None = None
    ) -> Tensor:
        """Logits of each sample over the classes of its task.

        Args:
            x: Inputs, ``[B, ...]``.
            task_id: The task of all samples: a name, or an integer tensor without axes; or of
                each: names, or an integer tensor ``[B]``. None: inferred, see ``inference``.

        Returns:
            ``[B, classes]``. If tasks of the batch have different numbers of classes, logits of
            classes that a sample's task does not have are minus infinity. An empty batch has the
            classes of its task, and ``num_classes`` where ``task_id`` names none.

        Raises:
            TypeError: If an argument has the wrong Python type.
            ValueError: If a task is unknown or missing, or a shape does not fit.

        Note:
            A sample's logits do not depend on the other tasks of the batch, up to rounding. With
            label smoothing, the cross-entropy of a row with minus infinity is infinite: smooth the
            labels of tasks with different numbers of classes separately.
        """
        check_tensor("x", x)
        if task_id is None:
            if self.inference is None:
                must("task_id", "be given to a model without inference", None)
            task_id = self.infer_task(x)
        return self._classify(self.tokens(x), self.columns.groups(task_id, x))

    def _classify(self, tokens: Tensor, groups: TaskGroups) -> Tensor:
        """Logits ``[B, classes]`` of tokens ``[B, L, E]``, whose tasks ``groups`` says."""
        own = groups.sort(tokens)
        if not groups.tasks:  # an empty batch, of which nobody said the task
            return own.mean(1) @ own.new_zeros(own.shape[-1], self.num_classes)
        by_task = groups._replace(order=None)
        layout = self.columns.layout(by_task, own.shape[1] + self.n_nodes, own.device)
        own = self.layers(*self.columns.assemble(own, by_task, layout), layout)
        return groups.unsort(self.columns.classify(own, by_task))

    @property
    def tasks(self) -> tuple[TaskName, ...]:
        """Names of the tasks, in the order of registration."""
        return self.columns.names

    def register_task(
        self,
        task: TaskName,
        num_classes: int | None = None,
        *,
        reads: Sequence[TaskName] = (),
        init_from: TaskName | None = None,
    ) -> None:
        """Give a new task its column.

        Args:
            task: Its name, an integer or a string.
            num_classes: Its classes; None means the model's ``num_classes``.
            reads: Earlier, frozen tasks whose columns it reads. The columns that they read
                themselves are then part of its sequence too.
            init_from: A task whose parameters it starts with, copied; the head only if both have as
                many classes. None draws new ones.

        Raises:
            TypeError: If ``task`` is neither an integer nor a string.
            ValueError: If ``task`` exists, ``reads`` or ``init_from`` names one that does not, or
                ``reads`` one that is not frozen.
        """
        name = self.columns.new_name(task)
        num_classes = self.num_classes if num_classes is None else num_classes
        check_int("num_classes", num_classes, 1)
        read = self.columns.frozen_numbers("reads", reads)
        source = None if init_from is None else self.columns.number("init_from", init_from)
        weight = self.tokens.projection.weight
        column = TaskColumn(name, weight.shape[0], num_classes, self.n_nodes).to(weight)
        if source is not None:
            column.copy_from(self.columns.at(source))
        if self.tasks:
            self.freeze_shared()
        number = self.columns.next_number
        self.layers.add_task(number, source)
        self.columns.add(number, column, read)

    def remove_task(self, task: TaskName) -> None:
        """Drop a task and its parameters.

        Raises:
            ValueError: If there is no such task, or another one reads it.
        """
        number = self.columns.number("task", task)
        self.columns.remove(number)
        self.layers.remove_task(number)

    def freeze_task(self, task: TaskName) -> None:
        """Freeze a task and the shared parameters: they require no gradient any more."""
        number = self.columns.number("task", task)
        self.columns.at(number).frozen = True
        parameters.freeze(parameters.of_task(self.columns, self.layers, number))
        self.freeze_shared()

    def freeze_shared(self) -> None:
        """Freeze the shared parameters: they require no gradient any more."""
        self.shared_frozen = True
        parameters.freeze(parameters.shared(self.tokens, self.layers))

    def is_frozen(self, task: TaskName) -> bool:
        """Whether a task is frozen."""
        return self.columns.of(task).frozen

    def reads(self, task: TaskName) -> tuple[TaskName, ...]:
        """Tasks whose columns a task reads itself."""
        number = self.columns.number("task", task)
        return self.columns.names_of(self.columns.graph.reads(number))

    def num_classes_of(self, task: TaskName) -> int:
        """Classes of a task."""
        return self.columns.of(task).num_classes

    def set_mask(self, task: TaskName, mask: Tensor | None) -> None:
        """Say which tokens of a task's column see which.

        Args:
            task: A task that is not frozen.
            mask: bool ``[L, L]``, or ``[n_heads, L, L]`` for a mask of each head; True is allowed.
                ``L`` counts the tokens of the input and, after them, the node tokens. A token that
                sees nothing adds only the bias of the output projection. None allows everything.

        Raises:
            TypeError: If ``mask`` is no tensor.
            ValueError: If there is no such task, it is frozen, or the mask's dtype or shape does
                not fit. Where ``input_dim`` is an integer, inputs decide what ``L`` is, and
                ``forward`` raises.
        """
        column = self.columns.of(task)
        if column.frozen:
            must("task", "not be frozen to get another mask", repr(task))
        if mask is not None:
            check_mask(mask, self.n_heads, self.n_nodes, self.tokens.n_image_tokens)
            mask = mask.detach().to(self.tokens.projection.weight.device, copy=True)
        column.mask = mask
        self.columns.graph.forget_masks()

    @torch.no_grad()
    def attention(self, task: TaskName, x: Tensor | None = None) -> TaskAttention:
        """The mask of a task, and what its column attends to.

        Args:
            task: A registered task.
            x: Inputs, ``[B, ...]``, over which the weights are averaged. None means the mean input
                of each class, which the model keeps as prototypes; ``weights`` is then None where
                the task has no prototypes or its inputs are sequences.

        Raises:
            ValueError: If there is no such task, a shape does not fit, or ``x`` is missing where
                neither a mask, prototypes nor ``input_dim`` says how many tokens there are.
        """
        return task_attention(self, self.columns, self.tokens, task, x, self._classify)

    def infer_task(self, x: Tensor, method: str | None = None) -> list[TaskName]:
        """Name the task that each sample seems to belong to.

        Args:
            x: Inputs, ``[B, ...]``.
            method: ``"prototype"``: the task of the nearest class mean of token features, see
                ``gather_prototypes``. ``"entropy"``: the task whose column is the most certain; all
                columns are computed. None means the model's ``inference``.

        Raises:
            ValueError: If ``method`` is unknown, or no task is registered or has no prototypes.
        """
        method = self.inference if method is None else method
        if method not in INFERENCE:
            must("method", f"be one of {', '.join(INFERENCE)}", repr(method))
        if not self.tasks:
            must("infer_task", "have registered tasks to choose from", "none")
        if method == "entropy":
            places = infer.lowest_entropy([self(x, task) for task in self.tasks])
        else:
            means = {task: self.prototypes(task) for task in self.tasks}
            places = infer.nearest_prototype(self.prototype_features(x), means)
        return [self.tasks[place] for place in places.tolist()]

    def gather_prototypes(self, task: TaskName, x: Tensor, y: Tensor) -> None:
        """Store the mean token features of each class, for ``infer_task``.

        Args:
            task: A registered task; it may be frozen.
            x: Its training inputs, ``[n, ...]``.
            y: Their labels, int64 ``[n]``, from 0 on.

        Raises:
            TypeError: If ``x`` or ``y`` is no tensor.
            ValueError: If there is no such task or no sample, or ``y`` does not fit.
        """
        column = self.columns.of(task)
        column.prototypes = infer.class_means(self.prototype_features(x), y, column.num_classes)

    def prototypes(self, task: TaskName) -> Tensor | None:
        """The stored class means of a task, ``[classes, F]``, or None."""
        return self.columns.of(task).prototypes

    @torch.no_grad()
    def prototype_features(self, x: Tensor) -> Tensor:
        """Token features ``[B, F]``: all of a vector or an image, the mean of a sequence."""
        tokens = self.tokens(x)
        return tokens.mean(1) if self.tokens.is_sequence(x) else tokens.flatten(1)

    def get_task_parameters(self, task: TaskName) -> list[nn.Parameter]:
        """All parameters of a task, and none that it shares."""
        number = self.columns.number("task", task)
        return list(parameters.of_task(self.columns, self.layers, number).values())

    def trainable_parameters(self, task: TaskName) -> list[nn.Parameter]:
        """What an optimizer is given to train a task: its own, and shared ones not yet frozen.

        Raises:
            ValueError: If there is no such task, or it is frozen.
        """
        if self.is_frozen(task):
            must("task", "not be frozen to be trained", repr(task))
        shared = parameters.shared(self.tokens, self.layers).values()
        return [*self.get_task_parameters(task), *(p for p in shared if p.requires_grad)]

    def requires_grad_(self: _Model, requires_grad: bool = True) -> _Model:
        """As in ``torch.nn.Module``, but for frozen parameters, which never require a gradient."""
        super().requires_grad_(requires_grad)
        for number in self.columns.numbers:
            if self.columns.at(number).frozen:
                parameters.freeze(parameters.of_task(self.columns, self.layers, number))
        if self.shared_frozen:
            parameters.freeze(parameters.shared(self.tokens, self.layers))
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take over parameters, masks and prototypes of a model with the same tasks.

        They must have been registered in the same order, after the same removals, with as many
        classes. A state dict does not hold the names of tasks, what they read and which are frozen;
        ``save`` and ``load`` do.

        Raises:
            ValueError: If ``strict``, and the tasks differ.
            RuntimeError: As in ``torch.nn.Module``, for other keys and shapes that do not fit.
        """
        if strict:
            self.columns.check_classes(state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def parameter_report(self) -> ParameterReport:
        """Count the parameters that there are now."""
        return parameters.count(self.tokens, self.layers, self.columns)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that build the model without its tasks."""
        own = dict(num_classes=self.num_classes, inference=self.inference, **self._training)
        return exchanged_options(self.tokens, self.layers, self.n_nodes) | own

    @classmethod
    def load(cls: type[_Model], path: str | PathLike[str]) -> _Model:
        """Read a model that ``save`` wrote, on the CPU and in evaluation mode.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds something else.
        """
        return storage.load_model(lambda options: cls(**options), path)

    # tasks and whole models in files
    save = storage.save
    save_task = storage.save_task
    load_task = storage.load_task

    def __repr__(self) -> str:
        options = exchanged_options(self.tokens, self.layers, self.n_nodes)
        about = ", ".join(f"{name}={value}" for name, value in options.items())
        return "\n".join([f"DTGMAModel({about}", *self.columns.described()]) + ")"
