"""Streams of tasks: what a continual learner sees, one task after another."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from memattn.checks import check_floating, check_int, check_tensor, must

Scenario = Literal["task", "domain", "class"]
SCENARIOS: tuple[str, ...] = get_args(Scenario)


@dataclass(frozen=True, eq=False)
class Task:
    """One task of a stream.

    Attributes:
        name: Its name in tables.
        train_x: Inputs, ``[n, ...]``, floating dtype.
        train_y: Labels, ``[n]``, int64, each the index of one of ``classes``.
        test_x: Inputs to test on, ``[m, ...]`` with the shape and dtype of ``train_x`` but for m.
        test_y: Their labels, ``[m]``.
        classes: Names of the classes.

    Raises:
        TypeError: If a field that must be a tensor is none.
        ValueError: If shapes or dtypes do not match, a part is empty, or a label is outside the
            classes.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            x, y = getattr(self, f"{part}_x"), getattr(self, f"{part}_y")
            x_name, y_name = (f"{part}_{c} of task {self.name!r}" for c in "xy")
            check_tensor(x_name, x)
            check_tensor(y_name, y)
            check_floating(x_name, x)
            if x.dim() < 2 or x.shape[0] == 0 or x[0].numel() == 0:
                must(x_name, "have shape [n, ...] with at least one sample", list(x.shape))
            if x.shape[1:] != self.train_x.shape[1:] or x.dtype != self.train_x.dtype:
                wanted = f"{self.train_x.dtype} samples of shape {list(self.train_x.shape[1:])}"
                must(x_name, f"have, as train_x, {wanted}", f"{x.dtype} {list(x.shape[1:])}")
            if y.dtype != torch.int64 or y.shape != x.shape[:1]:
                got = f"{y.dtype} of shape {list(y.shape)}"
                must(y_name, f"be torch.int64 of shape [{len(x)}]", got)
            outside = y[(y < 0) | (y >= len(self.classes))]
            if len(outside):
                wanted = f"be in 0..{len(self.classes) - 1}, the task's classes"
                must(y_name, wanted, outside[0].item())

    def __repr__(self) -> str:
        sizes = f"{len(self.train_x)} train, {len(self.test_x)} test"
        return f"Task({self.name!r}, {sizes}, classes={self.classes})"


@dataclass(frozen=True, eq=False)
class Stream:
    """Tasks that come one after another.

    Attributes:
        name: Its name in tables.
        scenario: What a learner is told. ``"task"``: the task of every sample, in testing too.
            ``"domain"``: never, all tasks have the same classes. ``"class"``: never in testing, and
            it must tell the classes of all tasks apart.
        tasks: The tasks in order.

    Raises:
        ValueError: If there is no task, the scenario is unknown, two tasks have the same name, the
            inputs of two tasks differ in shape or dtype, or in ``"domain"`` two tasks differ in
            their classes.
    """

    name: str
    scenario: Scenario
    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        check_scenario(self.scenario)
        if not self.tasks:
            must("tasks", "have at least one task", "an empty stream")
        first = self.tasks[0]
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            must("tasks", "have different names", names)
        for task in self.tasks[1:]:
            x, wanted = task.train_x, first.train_x
            if x.shape[1:] != wanted.shape[1:] or x.dtype != wanted.dtype:
                inputs = f"{wanted.dtype} {list(wanted.shape[1:])}"
                got = f"{x.dtype} {list(x.shape[1:])} in {task.name!r}"
                must("tasks", f"all have inputs as the first, {inputs}", got)
            if self.scenario == "domain" and task.classes != first.classes:
                got = f"{task.classes} in {task.name!r}"
                must("tasks", f"have the same classes in domain scenario, {first.classes}", got)

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.tasks[0].train_x.shape[1:])

    @property
    def n_outputs(self) -> int:
        """Outputs that a learner needs at a time: by scenario, the classes of the largest task,
        those that all tasks share, or those of all tasks together.
        """
        sizes = [len(task.classes) for task in self.tasks]
        return sum(sizes) if self.scenario == "class" else max(sizes)

    def offset(self, index: int) -> int:
        """First output of a task: in scenario ``"class"`` the number of classes before it, else 0.

        Args:
            index: Index of the task.

        Raises:
            ValueError: If there is no such task.
        """
        self.check_index(index)
        if self.scenario != "class":
            return 0
        return sum(len(task.classes) for task in self.tasks[:index])

    def labels(self, index: int, y: Tensor) -> Tensor:
        """Labels among the learner's outputs, from labels of a task.

        Args:
            index: Index of the task.
            y: Labels of the task, ``[n]``.

        Returns:
            ``y`` plus ``offset(index)``.

        Raises:
            ValueError: If there is no such task.
        """
        return y + self.offset(index)

    def check_index(self, index: int) -> None:
        """Raise unless there is a task with this index."""
        check_int("index", index, 0)
        if index >= len(self.tasks):
            must("index", f"be below the number of tasks, {len(self.tasks)}", index)

    def validation(self, fraction: float = 0.2, seed: int = 0) -> "Stream":
        """The same tasks, tested on a part of their train data that is held out of training.

        Options such as a learning rate can be chosen on it without reading test data.

        Args:
            fraction: Part of each class of each task that is held out.
            seed: Seed of the choice.

        Returns:
            A stream without any of this one's test samples.

        Raises:
            ValueError: If ``fraction`` is not between 0 and 1, or leaves a class without samples.
        """
        tasks = []
        for task in self.tasks:
            train, held = stratified_split(task.train_y, fraction, seed)
            x, y = task.train_x, task.train_y
            tasks.append(
                replace(task, train_x=x[train], train_y=y[train], test_x=x[held], test_y=y[held])
            )
        return Stream(f"{self.name}, validation", self.scenario, tuple(tasks))

    def fingerprint(self) -> str:
        """SHA-256 of all data of the stream, as hexadecimal."""
        digest = hashlib.sha256(f"{self.scenario}".encode())
        for task in self.tasks:
            digest.update(repr((task.name, task.classes)).encode())
            for tensor in (task.train_x, task.train_y, task.test_x, task.test_y):
                digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def check_scenario(scenario: str) -> None:
    """Raise ValueError unless there is such a scenario."""
    if scenario not in SCENARIOS:
        must("scenario", f"be one of {', '.join(SCENARIOS)}", repr(scenario))


def stratified_split(y: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to keep and rows to hold out, each class in the same proportion.

    Args:
        y: Labels, ``[n]``.
        fraction: Part of each class to hold out, rounded, and at least one sample of it.
        seed: Seed of the choice.

    Returns:
        Two vectors of row indices in ascending order.

    Raises:
        ValueError: If ``fraction`` is not between 0 and 1, or a class has fewer than two samples.
    """
    if not 0.0 < fraction < 1.0:
        must("fraction", "be between 0 and 1", fraction)
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique():
        rows = (y == label).nonzero().flatten()
        if len(rows) < 2:
            must("y", "have at least two samples of each class", f"{len(rows)} of {label.item()}")
        n = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        held_out[rows[torch.randperm(len(rows), generator=generator)[:n]]] = True
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def split_stream(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: Sequence[str],
    *,
    n_tasks: int = 5,
    scenario: Scenario = "task",
    seed: int = 0,
    shuffle_classes: bool = False,
    permuted: bool = False,
) -> Stream:
    """A stream from one labelled data set: its classes in groups, or its pixels permuted.

    Split by classes, each task has as many of them. In scenario ``"domain"`` a sample's label is
    then its class's place in the group: with ten digits in five tasks, whether it is even or odd.
    Permuted, every task has all classes, and from the second task on each has its own permutation
    of all input values.

    Args:
        name: Name of the data set.
        train: Inputs ``[n, ...]`` of floating dtype and labels ``[n]`` to train on.
        test: The same to test on.
        classes: Names of all classes, which the labels count.
        n_tasks: Number of tasks; divides the number of classes unless ``permuted``.
        scenario: ``"task"``, ``"domain"`` or ``"class"``, see ``Stream``.
        seed: Seed of ``shuffle_classes`` and of the permutations.
        shuffle_classes: Whether classes are grouped in a random order rather than in their own.
        permuted: Whether tasks differ by a permutation of the input values.

    Returns:
        The stream.

    Raises:
        ValueError: If ``n_tasks`` does not divide the classes, a label has no class, ``permuted``
            comes with ``shuffle_classes``, or what ``Task`` and ``Stream`` raise.
    """
    check_int("n_tasks", n_tasks, 1)
    check_scenario(scenario)
    whole = Task(name, *train, *test, tuple(classes))  # checks labels and shapes
    generator = torch.Generator().manual_seed(seed)
    if permuted:
        if shuffle_classes:
            must("shuffle_classes", "be False with permuted", True)
        tasks = [replace(whole, name="as is")]
        for i in range(1, n_tasks):
            order = torch.randperm(whole.train_x[0].numel(), generator=generator)
            x = (
                part.flatten(1)[:, order].reshape(part.shape)
                for part in (whole.train_x, whole.test_x)
            )
            tasks.append(replace(whole, name=f"permutation {i}", train_x=next(x), test_x=next(x)))
        return Stream(f"permuted {name}", scenario, tuple(tasks))
    if len(classes) % n_tasks:
        must("n_tasks", f"divide the number of classes, {len(classes)}", n_tasks)
    order = list(range(len(classes)))
    if shuffle_classes:
        order = torch.randperm(len(classes), generator=generator).tolist()
    size = len(classes) // n_tasks
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    places = tuple(f"place {i}" for i in range(size))
    tasks = []
    for group in groups:
        names = tuple(classes[c] for c in group)
        tasks.append(
            Task(
                "/".join(names),
                *_pick(*train, group),
                *_pick(*test, group),
                places if scenario == "domain" else names,
            )
        )
    return Stream(f"split {name}", scenario, tuple(tasks))


def _pick(x: Tensor, y: Tensor, group: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The samples of some classes, labelled by their place in the group."""
    rows = torch.isin(y, torch.tensor(group)).nonzero().flatten()
    place = torch.zeros(max(group) + 1, dtype=torch.int64)
    place[torch.tensor(group)] = torch.arange(len(group))
    return x[rows], place[y[rows]]


def digits_stream(
    n_tasks: int = 5,
    scenario: Scenario = "task",
    seed: int = 0,
    *,
    shuffle_classes: bool = False,
    permuted: bool = False,
    test_fraction: float = 0.2,
) -> Stream:
    """The 1,797 digits of scikit-learn, grey images ``[1, 8, 8]`` in 0..1.

    Args:
        n_tasks: Number of tasks; divides 10 unless ``permuted``.
        scenario: ``"task"``, ``"domain"`` or ``"class"``, see ``Stream``.
        seed: Seed of the split in train and test data, of the order and of the permutations.
        shuffle_classes: Whether classes are grouped in a random order, see ``split_stream``.
        permuted: Whether tasks differ by a permutation of the pixels, see ``split_stream``.
        test_fraction: Part of each digit's images that is tested on.

    Returns:
        The stream.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If an argument is out of range, see ``split_stream``.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits need scikit-learn: pip install 'memattn[digits]'") from error

    data: Any = load_digits()
    x = torch.from_numpy(data["images"]).float().unsqueeze(1) / 16.0
    y = torch.from_numpy(data["target"]).long()
    train, test = stratified_split(y, test_fraction, seed)
    return split_stream(
        "digits",
        (x[train], y[train]),
        (x[test], y[test]),
        [str(digit) for digit in range(10)],
        n_tasks=n_tasks,
        scenario=scenario,
        seed=seed,
        shuffle_classes=shuffle_classes,
        permuted=permuted,
    )
