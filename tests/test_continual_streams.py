"""Streams: digits, splits, tensors, and what is refused."""

import pytest
import torch
from continual_streams import blobs
from torch.utils.data import TensorDataset

from memattn.continual import (
    Stream,
    Task,
    digits_stream,
    split_stream,
    tensor_stream,
)


def make_data(n=40, n_classes=4):
    """Images ``[n, 1, 2, 3]`` whose first pixel is the label, and labels."""
    y = torch.arange(n) % n_classes
    x = torch.rand(n, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    x[:, 0, 0, 0] = y.float()
    return x, y


def split(**options):
    options = dict(n_tasks=2) | options
    return split_stream("data", make_data(), make_data(20), list("abcd"), **options)


def test_digits():
    pytest.importorskip("sklearn")
    stream = digits_stream()
    assert stream.input_shape == (1, 8, 8)
    assert [task.classes for task in stream.tasks[:2]] == [("0", "1"), ("2", "3")]
    assert sum(len(t.train_x) + len(t.test_x) for t in stream.tasks) == 1797
    for task in stream.tasks:
        assert task.train_x.min() >= 0.0 and task.train_x.max() <= 1.0
        assert abs(task.test_y.float().mean() - task.train_y.float().mean()) < 0.02
    assert stream.fingerprint() == digits_stream().fingerprint()
    assert stream.fingerprint() != digits_stream(seed=1).fingerprint()


@pytest.mark.parametrize(("scenario", "n_outputs"), [("task", 2), ("domain", 2), ("class", 4)])
def test_classes_in_groups(scenario, n_outputs):
    stream = split(scenario=scenario)
    assert stream.n_outputs == n_outputs
    second = stream.tasks[1]
    assert second.train_x[:, 0, 0, 0].tolist() == (second.train_y + 2).tolist()
    offset = 2 if scenario == "class" else 0
    assert stream.labels(1, second.train_y).tolist() == (second.train_y + offset).tolist()
    assert (second.classes == stream.tasks[0].classes) == (scenario == "domain")


def test_classes_in_random_order():
    orders = [[t.name for t in split(shuffle_classes=True, seed=s).tasks] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    for task in split(shuffle_classes=True, seed=1).tasks:
        names = ["abcd"[int(pixel)] for pixel in task.train_x[:, 0, 0, 0]]
        assert names == [task.classes[label] for label in task.train_y]


def test_permuted_pixels():
    stream = split(permuted=True, n_tasks=3, scenario="domain")
    plain, *others = (task.train_x.flatten(1) for task in stream.tasks)
    assert torch.equal(plain, make_data()[0].flatten(1))
    for other in others:
        assert not torch.equal(other, plain)
        assert torch.equal(other.sort().values, plain.sort().values)
    # train and test data of a task have the same permutation
    order = [plain[0].tolist().index(value) for value in others[0][0].tolist()]
    test_x = [task.test_x.flatten(1) for task in stream.tasks]
    assert torch.equal(test_x[1], test_x[0][:, order])


def test_validation_holds_train_samples_out_and_knows_no_test_sample():
    stream = blobs()
    held_out = stream.validation(0.25, seed=3)
    for before, after in zip(stream.tasks, held_out.tasks, strict=True):
        both = torch.cat([after.train_x, after.test_x])
        assert torch.equal(both.sort(0).values, before.train_x.sort(0).values)
        assert after.test_y.bincount().tolist() == [3, 3]


def test_tensors_by_name():
    x = torch.arange(8).reshape(4, 2)
    tasks = {7: (x, torch.tensor([0, 1, 0, 1]), x[:2], torch.tensor([1, 0]))}
    stream = tensor_stream(tasks)
    (task,) = stream.tasks
    assert (task.name, task.classes, task.train_x.dtype) == ("7", ("0", "1"), torch.float32)
    (task,) = tensor_stream(list(tasks.values())).tasks
    assert (task.name, task.train_y.tolist()) == ("task 0", [0, 1, 0, 1])


class Experience:
    """As Avalanche has them: samples are (x, y, task)."""

    def __init__(self, labels):
        self.dataset = [(torch.full((2,), float(y)), y, 0) for y in labels]


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_experiences_and_pairs_of_data_sets(scenario):
    pairs = [
        (Experience([5, 3, 5]), Experience([3, 5])),
        (TensorDataset(torch.ones(2, 2), torch.tensor([8, 8])),) * 2,
    ]
    stream = tensor_stream(pairs, scenario)
    assert [task.classes for task in stream.tasks] == [("3", "5"), ("8",)]
    assert stream.tasks[0].train_y.tolist() == [1, 0, 1]
    assert stream.n_outputs == (3 if scenario == "class" else 2)


def test_domains_share_their_classes():
    x = torch.zeros(2, 3)
    tasks = {i: (x, torch.tensor([0, i]), x, torch.tensor([0, 2])) for i in (1, 2)}
    assert {task.classes for task in tensor_stream(tasks, "domain").tasks} == {("0", "1", "2")}
    message = r"test_y of task '1' must have labels among the task's classes, \[0, 1\], got 2"
    with pytest.raises(ValueError, match=message):
        tensor_stream(tasks)


X, Y = torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tensor_stream({}), "tasks must have at least one task, got an empty stream"),
        (lambda: tensor_stream([]), "tasks must have at least one task, got an empty stream"),
        (lambda: Stream("s", "task", ()), "tasks must have at least one task"),
        (lambda: Stream("s", "tasks", ()), "scenario must be one of task, domain, class"),
        (lambda: Task("t", X, Y + 1, X, Y, ("a", "b")), r"train_y of task 't' must be in 0..1.*2"),
        (lambda: Task("t", X, Y, X, Y - 1, ("a", "b")), r"test_y of task 't' must be in 0..1.*-1"),
        (lambda: Task("t", X, Y[:3], X, Y, ("a", "b")), r"must be torch.int64 of shape \[4\]"),
        (lambda: Task("t", X[:0], Y[:0], X, Y, ("a", "b")), "with at least one sample"),
        (lambda: Task("t", X, Y, X[:, :2], Y, ("a", "b")), "test_x of task 't' must have, as"),
        (lambda: Task("t", X.int(), Y, X, Y, ("a", "b")), "train_x of task 't' must have dtype"),
        (lambda: split(n_tasks=3), "n_tasks must divide the number of classes, 4, got 3"),
        (lambda: split(n_tasks=0), "n_tasks must be at least 1, got 0"),
        (lambda: split(permuted=True, shuffle_classes=True), "shuffle_classes must be False"),
        (lambda: blobs().offset(3), "index must be below the number of tasks, 3, got 3"),
        (lambda: blobs().validation(1.0), "fraction must be between 0 and 1, got 1.0"),
        (lambda: tensor_stream({0: (X, Y.float(), X, Y)}), "y must be a vector of integers"),
        (
            lambda: tensor_stream({0: (X, Y, X, Y), "0": (X, Y, X, Y)}),
            "tasks must have different names as text, got '0' twice",
        ),
        (
            lambda: Stream("s", "task", (blobs().tasks[0],) * 2),
            "tasks must have different names",
        ),
    ],
)
def test_names_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "tasks", [{0: (X, Y, X)}, [(X, Y, X)], [5], [(5, 6)], {0: (X.numpy(), Y, X, Y)}]
)
def test_names_a_task_of_another_kind(tasks):
    with pytest.raises(TypeError, match=r"tasks\[0\].* must be .*, got"):
        tensor_stream(tasks)
