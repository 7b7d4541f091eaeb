"""DTG-MA: a classifier that learns tasks one after the other, each in a column of a task graph."""

from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.checks import check_bool, check_int, check_tensor, must
from memattn.dtgma.attention import TaskAttention, recorded_weights
from memattn.dtgma.inference import class_means, lowest_entropy, nearest_prototype
from memattn.dtgma.layers import DTGMALayer, TaskColumn, TaskName
from memattn.dtgma.storage import StoredTaskModel
from memattn.dtgma.tasks import ParameterReport, listed
from memattn.nn.task_attention import ColumnLayout
from memattn.nn.task_linear import TaskGroups, group_by_task
from memattn.nn.task_tokens import TokenProjection

__all__ = ["DTGMAModel", "ParameterReport", "TaskName"]

SHARED = ("frozen", "first_task")
INFERENCE = ("prototype", "entropy")


class DTGMAModel(StoredTaskModel):
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
        n_tokens: Tokens wanted of a vector or an image. 1 makes the whole input one token, as in
            the published code, where attention has nothing to choose from.
        patch_size: Side of an image patch; None means what gives ``n_tokens``.
        n_nodes: Node tokens of each task, learned; None means 1, and 0 where the whole input is one
            token.
        positions: Whether tokens of sequences get positions.
        dropout: Probability of dropping a feature of what attention and feed-forward add.
        rank: Rank of each task's weights in the layers; None for full weights.
        shared: ``"frozen"``: the shared parameters stay as they were drawn, as in the published
            code. ``"first_task"``: they are trained with the first task, and frozen as soon as it
            is frozen or a second one is registered.
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
        Source: Kirichenko, DTG-MA, https://github.com/infosave2007/dtgma. With ``n_tokens=1`` its
        function and its parameters. Differs: inputs are split into tokens, so that masks act; tasks
        may read earlier ones; and ``get_task_parameters`` counts what is registered.
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
        check_int("hidden_dim", hidden_dim, 1)
        check_int("n_layers", n_layers, 1)
        check_int("n_heads", n_heads, 1)
        if hidden_dim % n_heads:
            must("hidden_dim", f"be divisible by n_heads={n_heads}", hidden_dim)
        if n_nodes is None:
            n_nodes = 0 if n_tokens == 1 and patch_size is None else 1
        check_int("n_nodes", n_nodes, 0)
        check_int("num_classes", num_classes, 1)
        check_bool("positions", positions)
        if isinstance(dropout, bool) or not isinstance(dropout, Real):
            must("dropout", "be a number", type(dropout).__name__, TypeError)
        dropout = float(dropout)
        if not 0.0 <= dropout < 1.0:
            must("dropout", "be at least 0 and below 1", dropout)
        if shared not in SHARED:
            must("shared", f"be one of {', '.join(SHARED)}", repr(shared))
        if inference is not None and inference not in INFERENCE:
            must("inference", f"be None or one of {', '.join(INFERENCE)}", repr(inference))
        super().__init__(
            TokenProjection(
                input_dim, hidden_dim, n_tokens=n_tokens, patch_size=patch_size, positions=positions
            ),
            nn.ModuleList(
                DTGMALayer(hidden_dim, n_heads, dropout, rank, backend) for _ in range(n_layers)
            ),
            num_classes=num_classes,
            n_heads=n_heads,
            n_nodes=n_nodes,
            train_shared=shared == "first_task",
        )
        self.rank = rank
        self.inference = inference
        self._training = dict(dropout=dropout, shared=shared, backend=backend)

    def forward(
        self, x: Tensor, task_id: TaskName | Sequence[TaskName] | Tensor | None = None
    ) -> Tensor:
        """Logits of each sample over the classes of its task.

        Args:
            x: Inputs, ``[B, ...]``.
            task_id: The task of all samples: a name, or an integer tensor without axes; or of
                each: names, or an integer tensor ``[B]``. None infers them, if the model has an
                ``inference``.

        Returns:
            ``[B, classes]``; where a batch mixes tasks of more and fewer classes, minus infinity
            for classes that a sample's task does not have. An empty batch gives the classes of its
            task, and ``[0, num_classes]`` where it names none.

        Raises:
            TypeError: If an argument has the wrong Python type.
            ValueError: If a task is unknown or missing, or a shape does not fit.

        Note:
            A batch that mixes tasks gives each sample what a batch of its task alone does, up to
            rounding: matrix products may add in another order for another number of rows.
            Cross-entropy of a padded row is that of its task alone, but infinite with label
            smoothing, which asks for some of every class: smooth tasks of unlike classes apart.
        """
        check_tensor("x", x)
        groups = self._groups(task_id, x)
        return self._classify(self.tokens(x), groups)

    def _classify(self, tokens: Tensor, groups: TaskGroups) -> Tensor:
        """Logits ``[B, classes]`` of tokens ``[B, L, E]``, whose tasks ``groups`` says."""
        own = groups.sort(tokens)
        if not groups.tasks:  # an empty batch, of which nobody said the task
            return F.linear(own.mean(1), own.new_zeros(self.num_classes, own.shape[-1]))
        groups, order = groups._replace(order=None), groups
        layout = self._layout(groups, own.shape[1] + self.n_nodes, own.device)
        read = None
        if layout.read is not None:
            with torch.no_grad():
                read = self._with_nodes(own.index_select(0, layout.read_sample), layout.read)
        own = self._with_nodes(own, groups)
        for i, layer in enumerate(self.layers):
            own, read = layer(own, read, layout, is_last=i == len(self.layers) - 1)
        logits = [column.classify(part) for column, part in self._parts(own, groups)]
        width = max(part.shape[1] for part in logits)
        padded = [F.pad(part, (0, width - part.shape[1]), value=-torch.inf) for part in logits]
        return order.unsort(torch.cat(padded))

    def _layout(self, groups: TaskGroups, length: int, device: torch.device) -> ColumnLayout:
        """How the columns of a batch, each of ``length`` tokens, stand in its sequences."""
        return self._graph.layout(groups, length, lambda n: self._mask(n, length), device)

    @torch.no_grad()
    def attention(self, task: TaskName, x: Tensor | None = None) -> TaskAttention:
        """The mask of a task, and what its column attends to.

        Args:
            task: A registered task.
            x: Inputs, ``[B, ...]``, over which the weights are averaged. None means the mean input
                of each class of the task, which the model keeps as prototypes; then ``weights`` is
                None where the task has no prototypes or its inputs are sequences.

        Raises:
            ValueError: If there is no such task, a shape does not fit, or ``x`` is missing for a
                task of which neither a mask, prototypes nor ``input_dim`` says how many tokens it
                has.
        """
        number = self._number("task", task)
        tokens = self._class_tokens(number) if x is None else self.tokens(x)
        groups = group_by_task(number, 1 if tokens is None else tokens.shape[0])
        columns = tuple(self._column(n).name for n in self._graph.columns(number))
        length = self._length(number) if tokens is None else tokens.shape[1] + self.n_nodes
        mask = self._layout(groups, length, self.tokens.projection.weight.device).mask.dense(0)
        mask = mask[:, :length]
        weights = None
        if tokens is not None:
            with recorded_weights(self, mask) as layers:
                self._classify(tokens, groups)
            weights = torch.stack(layers)
        return TaskAttention(columns, self.n_nodes, mask, weights)

    def _class_tokens(self, number: int) -> Tensor | None:
        """Tokens ``[classes, L, E]`` of the mean input of each class; None where none are kept."""
        prototypes = self._column(number).prototypes
        if prototypes is None:
            return None
        tokens = prototypes[~prototypes.isnan().any(1)]
        tokens = tokens.unflatten(1, (-1, self.tokens.projection.out_features))
        if self.tokens.image is None and self.tokens.n_tokens > 1 and tokens.shape[1] == 1:
            return None  # of sequences the mean over their tokens is kept
        return tokens

    def _length(self, number: int) -> int:
        """Tokens of a task's column, where no input says it."""
        mask, n_tokens = self._column(number).mask, self.tokens.n_image_tokens
        if mask is None and n_tokens is None:
            task = repr(self._column(number).name)
            must("x", f"be given for task {task}, which has neither a mask nor prototypes", None)
        return mask.shape[-1] if mask is not None else (n_tokens or 0) + self.n_nodes

    def infer_task(self, x: Tensor, method: str | None = None) -> list[TaskName]:
        """Name the task that each sample seems to belong to.

        Args:
            x: Inputs, ``[B, ...]``.
            method: ``"prototype"``: the task of the nearest class mean of token features, which
                ``gather_prototypes`` stored. ``"entropy"``: the task whose column is the most
                certain, which computes all columns. None means the model's ``inference``.

        Raises:
            ValueError: If ``method`` is unknown, or no task is registered, or one has no
                prototypes.
        """
        method = self.inference if method is None else method
        if method not in INFERENCE:
            must("method", f"be one of {', '.join(INFERENCE)}", repr(method))
        if not self._numbers:
            must("infer_task", "have registered tasks to choose from", "none")
        infer = nearest_prototype if method == "prototype" else lowest_entropy
        return [self.tasks[place] for place in infer(self, x).tolist()]

    def gather_prototypes(self, task: TaskName, x: Tensor, y: Tensor) -> None:
        """Store the mean token features of each class, for ``infer_task``.

        Args:
            task: A registered task; it may be frozen.
            x: Its training inputs, ``[n, ...]``.
            y: Their labels, int64 ``[n]``, from 0 on.

        Raises:
            TypeError: If ``x`` or ``y`` is no tensor.
            ValueError: If there is no such task or no sample, or a shape, dtype, device or label
                does not fit.
        """
        column = self._column(self._number("task", task))
        column.prototypes = class_means(self.prototype_features(x), y, column.num_classes)

    def prototypes(self, task: TaskName) -> Tensor | None:
        """The stored class means of a task, ``[classes, F]``, or None."""
        return self._column(self._number("task", task)).prototypes

    @torch.no_grad()
    def prototype_features(self, x: Tensor) -> Tensor:
        """Token features ``[B, F]``: all of a vector or an image, the mean of a sequence."""
        tokens = self.tokens(x)
        return tokens.mean(1) if self.tokens.is_sequence(x) else tokens.flatten(1)

    def __repr__(self) -> str:
        about = ", ".join(f"{name}={value}" for name, value in self._config().items())
        lines = [f"DTGMAModel({about}"]
        for task in self.tasks:
            reads = f", reads {listed(self.reads(task))}" if self.reads(task) else ""
            state = "frozen" if self.is_frozen(task) else "trainable"
            lines.append(f"  task {task!r}: {self.num_classes_of(task)} classes, {state}{reads}")
        return "\n".join(lines) + ")"

    def _groups(
        self, task_id: TaskName | Sequence[TaskName] | Tensor | None, x: Tensor
    ) -> TaskGroups:
        """The samples of a batch by the number of their task."""
        if task_id is None:
            if self.inference is None:
                must("task_id", "be given to a model without inference", None)
            task_id = self.infer_task(x)
        names = task_id.tolist() if isinstance(task_id, Tensor) else task_id
        if isinstance(names, int | str | Integral):
            return group_by_task(self._number("task_id", names), x.shape[0])
        if not isinstance(names, list | tuple):
            must("task_id", "be a name, names or a tensor", type(task_id).__name__, TypeError)
        if len(names) != x.shape[0]:
            must("task_id", f"name one task, or one for each of B={x.shape[0]} samples", len(names))
        numbers = [self._number("task_id", name) for name in names]
        task_numbers = torch.tensor(numbers, dtype=torch.int64, device=x.device)
        return group_by_task(task_numbers, x.shape[0])

    def _parts(self, x: Tensor, groups: TaskGroups) -> Iterator[tuple[TaskColumn, Tensor]]:
        """The rows of each task, sorted as ``groups`` says."""
        columns = (self._column(number) for number in groups.tasks)
        return zip(columns, x.split(list(groups.sizes)), strict=True)

    def _with_nodes(self, tokens: Tensor, groups: TaskGroups) -> Tensor:
        """Columns ``[n, L, E]``: tokens with the node tokens of their task after them."""
        if not self.n_nodes:
            return tokens
        return torch.cat([column.with_nodes(part) for column, part in self._parts(tokens, groups)])

    def _mask(self, number: int, length: int) -> Tensor | None:
        """The mask of a task's column of ``length`` tokens."""
        column = self._column(number)
        if column.mask is not None and column.mask.shape[-1] != length:
            n_tokens = column.mask.shape[-1] - self.n_nodes
            wanted = f"give the {n_tokens} tokens that the mask of task {column.name!r} is for"
            must("x", f"{wanted} (see set_mask)", length - self.n_nodes)
        return column.mask

    def _config(self) -> dict[str, Any]:
        """What two models must agree on to exchange tasks."""
        tokens = self.tokens
        return dict(
            input_dim=tokens.input_dim if tokens.image is None else list(tokens.image),
            hidden_dim=tokens.projection.out_features,
            n_layers=len(self.layers),
            n_heads=self.n_heads,
            n_tokens=tokens.n_tokens,
            patch_size=tokens.patch_size,
            n_nodes=self.n_nodes,
            positions=tokens.positions,
            rank=self.rank,
        )

    def _options(self) -> dict[str, Any]:
        own = dict(num_classes=self.num_classes, inference=self.inference)
        return self._config() | own | self._training
