"""train_continual: results, isolation, transfer, reproducibility, errors."""

import math

import numpy as np
import pytest
import torch
from dtgma_factories import make_model
from torch.utils.data import TensorDataset

from memattn import DTGMAModel, train_continual
from memattn.continual import Stream, Task, digits_stream

KEYS = {
    "accuracy_matrix",
    "avg_accuracy",
    "avg_forgetting",
    "avg_forgetting_from_first",
    "backward_transfer",
    "forward_transfer",
    "learning_accuracy",
    "parameter_report",
    "parameters",
    "task_accuracy",
    "time",
    "untrained_accuracy",
}


def make_tasks(n: int = 2, rows: int = 24) -> dict:
    """Tasks told by the sign of one feature each: samples of task t lie around t."""
    generator = torch.Generator().manual_seed(0)
    tasks = {}
    for task in range(n):
        x = torch.randn(rows, 12, generator=generator)
        y = (x[:, task] > 0).long()
        x[:, 6:] = 4.0 * task + 0.1 * x[:, 6:]
        half = rows // 2
        tasks[task] = (x[:half], y[:half], x[half:], y[half:])
    return tasks


def run(tasks=None, *, epochs=2, model=None, **options) -> tuple[DTGMAModel, dict]:
    model = make_model(reads={}) if model is None else model
    results = train_continual(model, tasks or make_tasks(), epochs=epochs, batch_size=8, **options)
    return model, results


def as_stream(tasks: dict, scenario: str) -> Stream:
    named = (Task(f"t{i}", *data, ("no", "yes")) for i, data in tasks.items())
    return Stream("signs", scenario, tuple(named))


def test_results():
    model, results = run(make_tasks(3))
    assert set(results) == KEYS
    matrix = results["accuracy_matrix"]
    assert matrix.shape == (3, 3)
    assert matrix.isnan().tolist() == [[False, False, True], [False] * 3, [False] * 3]
    assert results["avg_accuracy"] == matrix[-1].mean().item()
    assert results["task_accuracy"] == dict(enumerate(matrix[-1].tolist()))
    assert results["avg_forgetting"] == results["avg_forgetting_from_first"] == 0.0
    assert results["backward_transfer"] == 0.0
    assert torch.equal(matrix.tril(), torch.where(matrix.isnan(), 0, matrix.diagonal()).tril())
    # nobody reads: a new column starts where it would in an untrained model
    assert torch.equal(matrix.diagonal(1), results["untrained_accuracy"][1:])
    assert results["forward_transfer"] == 0.0
    assert results["parameters"] == sum(p.numel() for p in model.parameters())
    assert results["time"] > 0.0
    assert all(map(model.is_frozen, range(3)))
    assert not model.training


def test_tasks_are_learned():
    _, results = run(make_tasks(2, rows=128), epochs=15, lr=5e-3)
    assert results["learning_accuracy"] > 0.8


def test_a_seed_decides_everything():
    """The model's columns, the order of samples and dropout; the global generator is left alone."""
    models = [make_model(reads={}, dropout=0.2) for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        run(model=model, seed=seed, reads="previous")
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_noise_comes_to_inputs_in_training():
    """Far above what tells the classes apart, it leaves nothing to learn."""
    tasks = make_tasks(1, rows=256)
    seeds = (3, 3, 4)
    models = [run(tasks, input_noise=0.5, seed=s, model=make_model(reads={}))[0] for s in seeds]
    first, same, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    learned = [run(tasks, epochs=15, lr=5e-3, input_noise=s)[1]["avg_accuracy"] for s in (0.0, 1e4)]
    assert learned[0] > 0.8 > learned[1]


@pytest.mark.parametrize("reads", ["none", "previous", "all"])
def test_who_reads_whom(reads):
    model, results = run(make_tasks(3), reads=reads, epochs=1)
    wanted = {"none": (), "previous": (1,), "all": (0, 1)}[reads]
    assert model.reads(2) == wanted
    assert results["avg_forgetting"] == 0.0


@pytest.mark.parametrize("reads", ["none", "previous", "all"])
def test_a_later_call_reads_tasks_of_an_earlier_one(reads):
    tasks = make_tasks(3)
    model, _ = run({0: tasks[0], 1: tasks[1]}, reads=reads, epochs=1)
    model.register_task("other")  # not frozen, so nobody reads it
    run({2: tasks[2]}, model=model, reads=reads, epochs=1)
    assert model.reads(2) == {"none": (), "previous": (1,), "all": (0, 1)}[reads]


def parameters(model: DTGMAModel) -> torch.Tensor:
    return torch.cat([p.flatten() for p in model.parameters()])


def test_tasks_in_a_list():
    """Numbered, with the classes that occur, whatever their labels and integer dtype."""
    tasks = make_tasks()
    data = [(x, y.int() + 5, u, (v + 5).to(torch.uint8)) for x, y, u, v in tasks.values()]
    pairs = [(TensorDataset(x, y), TensorDataset(u, v)) for x, y, u, v in data]
    expected, _ = run(tasks)
    for given in (data, pairs):
        model, results = run(given)
        assert results["task_accuracy"].keys() == {0, 1}
        assert [model.num_classes_of(task) for task in model.tasks] == [2, 2]
        assert torch.equal(parameters(model), parameters(expected))


def test_integers_of_any_type_are_names_and_labels():
    tasks = make_tasks()
    expected, _ = run(tasks)
    model, _ = run({np.int64(k): (x, y.int(), u, v.byte()) for k, (x, y, u, v) in tasks.items()})
    assert model.tasks == (0, 1) and all(type(task) is int for task in model.tasks)
    assert torch.equal(parameters(model), parameters(expected))


def test_trains_where_gradients_are_off():
    expected, _ = run()
    with torch.no_grad():
        model, _ = run()
    assert torch.equal(parameters(model), parameters(expected))
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"training must be outside of torch.inference_mode"),
    ):
        run()


def test_divergence_is_an_error_and_freezes_nothing():
    tasks = make_tasks()
    cases = (
        (tasks, dict(lr=1e30), r"loss of task 0 must be finite in epoch 1 with lr=1e\+30, got nan"),
        (broken(1, train_x=torch.full((12, 12), math.nan)), {}, "loss of task 1 .* in epoch 1 .*"),
    )
    for given, options, message in cases:
        model = make_model(reads={})
        with pytest.raises(FloatingPointError, match=message):
            run(given, model=model, **options)
        assert not model.is_frozen(model.tasks[-1])
    # one step alone, whose loss was taken before it
    with pytest.raises(FloatingPointError, match="loss of task 0 must be finite in epoch 1"):
        train_continual(make_model(reads={}), tasks, epochs=1, lr=1e30)


def test_registered_tasks_are_trained_as_they_are():
    model = make_model(reads={})
    model.register_task(1, 4)
    model.register_task(0, init_from=1)
    model, results = run(model=model, freeze_after_training=False)
    assert model.num_classes_of(1) == 4
    assert not model.is_frozen(0)
    assert results["avg_forgetting"] == 0.0


def test_a_stream_names_tasks_and_classes():
    model, results = run(as_stream(make_tasks(), "task"))
    assert model.tasks == ("t0", "t1")
    assert set(results["task_accuracy"]) == {"t0", "t1"}


@pytest.mark.parametrize("scenario", ["domain", "class"])
def test_tasks_that_are_not_told_are_inferred(scenario):
    model = make_model(reads={}, inference="prototype")
    _, results = run(as_stream(make_tasks(2, rows=64), scenario), epochs=12, lr=5e-3, model=model)
    assert "forward_transfer" not in results
    data = make_tasks(2, rows=64)
    assert model.infer_task(data[1][2]) == ["t1"] * 32  # tasks lie far apart
    assert results["avg_accuracy"] > 0.6


def test_in_class_scenario_the_task_must_be_right():
    model = make_model(reads={}, inference="prototype")
    tasks = make_tasks(2)
    stream = {s: as_stream({0: tasks[0], 1: tasks[0]}, s) for s in ("domain", "class")}
    # both tasks hold the same data, so every sample is taken for one of the first
    _, results = run(stream["class"], model=model)
    assert results["accuracy_matrix"][1, 1] == 0.0
    _, results = run(stream["domain"], model=make_model(reads={}, inference="prototype"))
    matrix = results["accuracy_matrix"]
    assert matrix[1, 1] == matrix[1, 0] == matrix[0, 0]


def test_verbose_shows_each_task(capsys):
    run(verbose=True)
    shown = capsys.readouterr().out
    assert "task 0: loss" in shown
    assert "task 1: loss" in shown
    run()
    assert capsys.readouterr().out == ""


def test_inputs_take_the_dtype_of_the_model():
    tasks = {k: (x.double(), y, u.double(), v) for k, (x, y, u, v) in make_tasks().items()}
    assert run(tasks, epochs=1)[1]["avg_forgetting"] == 0.0


def test_digits_are_learned_and_none_forgotten():
    """As in docs/dtgma.md, but smaller and shorter."""
    torch.manual_seed(0)
    model = DTGMAModel(input_dim=(8, 8), hidden_dim=32, num_classes=2, n_tokens=4)
    results = train_continual(model, digits_stream(), epochs=16, lr=3e-3)
    assert results["avg_forgetting"] == results["avg_forgetting_from_first"] == 0.0
    assert results["avg_accuracy"] >= 0.97


def broken(task: int, **parts) -> dict:
    names = ("train_x", "train_y", "test_x", "test_y")
    tasks = make_tasks()
    tasks[task] = tuple(parts.get(n, t) for n, t in zip(names, tasks[task], strict=True))
    return tasks


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ({}, {}, "tasks must have at least one task, got none"),
        (broken(1, train_y=torch.full((12,), 2)), {}, "train_y of task '1' must be in 0..1"),
        (broken(1, test_y=torch.full((12,), -1)), {}, "test_y of task '1' must be in 0..1"),
        (broken(0, train_x=torch.zeros(0, 12), train_y=torch.zeros(0).long()), {}, "train_x of"),
        (
            broken(0, train_y=torch.zeros(12)),
            {},
            r"tasks\[0\] train y must be a vector",
        ),
        (None, dict(epochs=0), "epochs must be at least 1, got 0"),
        (None, dict(lr=0.0), "lr must be positive and finite, got 0.0"),
        (None, dict(lr=math.inf), "lr must be positive and finite, got inf"),
        (None, dict(input_noise=-1.0), "input_noise must be finite and at least 0, got -1.0"),
        (None, dict(seed=-1), "seed must be at least 0, got -1"),
        (None, dict(seed=2**40), r"seed must be below 2\*\*40, got 1099511627776"),
        (None, dict(device="foo"), "device must be cpu, or a GPU that is here, got foo"),
        (None, dict(reads="some"), "reads must be one of none, previous, all, got 'some'"),
        (
            None,
            dict(reads="all", freeze_after_training=False),
            "freeze_after_training must be True with reads='all', got False",
        ),
        (as_stream(make_tasks(), "class"), {}, "model must have an inference"),
    ],
)
def test_names_the_argument(tasks, options, message):
    model = make_model(reads={})
    tasks = make_tasks() if tasks is None else tasks
    with pytest.raises(ValueError, match=message):
        train_continual(model, tasks, **{"epochs": 1} | options)
    assert model.tasks == ()


def test_a_frozen_task_is_not_trained():
    model = make_model(reads={1: ()})
    with pytest.raises(ValueError, match="tasks must not have a task that is frozen, got 1"):
        run(model=model)
    assert model.tasks == (1,)


def test_a_stream_must_have_the_classes_of_the_model():
    model = make_model(reads={})
    model.register_task("t1", 3)
    with pytest.raises(ValueError, match="tasks must have the 3 classes of the model's task 't1'"):
        run(as_stream(make_tasks(), "task"), model=model)


def test_names_the_argument_of_a_wrong_type():
    model = make_model(reads={})
    with pytest.raises(TypeError, match="tasks must be a dict, a list or a Stream, got int"):
        train_continual(model, 1)
    with pytest.raises(TypeError, match=r"tasks\[0\] must be a pair .*, got int"):
        train_continual(model, [1])
    with pytest.raises(TypeError, match=r"tasks\[0\] must be \(train_x, .*\), got int"):
        train_continual(model, {0: 1})
    with pytest.raises(TypeError, match="seed must be an integer, got NoneType"):
        train_continual(model, make_tasks(), seed=None)
