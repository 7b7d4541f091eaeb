"""DTG-MA: tokens, task files, task inference, and what it says to bad input."""

import numpy as np
import pytest
import torch
from dtgma_factories import make_model, make_x

from memattn import DTGMAModel
from memattn.nn import TokenProjection


def project(tokens: TokenProjection, features: list[int], x: torch.Tensor) -> torch.Tensor:
    """The token of some features of flat inputs, by its definition."""
    weight = tokens.projection.weight[:, features]
    return x[:, features] @ weight.T + tokens.projection.bias


def test_vectors_become_groups_of_features():
    tokens = TokenProjection(10, 6, n_tokens=4).double()
    x = make_x(2, 10, dtype=torch.float64)
    actual = tokens(x)
    groups = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]  # the last one is padded
    torch.testing.assert_close(actual, torch.stack([project(tokens, g, x) for g in groups], 1))
    assert TokenProjection(5, 6)(make_x(2, 5)).shape == (2, 5, 6)


@pytest.mark.parametrize("input_dim", [(2, 5, 4), 40], ids=str)
def test_images_become_patches(input_dim):
    tokens = TokenProjection(input_dim, 6, patch_size=2).double()
    x = make_x(3, 40, dtype=torch.float64)
    pixels = torch.arange(40).view(2, 5, 4)
    patches = [  # rows of patches; the last has one row of pixels only
        pixels[:, i : i + 2, j : j + 2].flatten().tolist() for i in (0, 2, 4) for j in (0, 2)
    ]
    wanted = torch.stack([project(tokens, patch, x) for patch in patches], 1)
    torch.testing.assert_close(tokens(x.view(3, 2, 5, 4)), wanted)
    if input_dim != 40:
        torch.testing.assert_close(tokens(x), wanted)


def test_patches_are_as_many_as_wanted():
    assert TokenProjection((28, 28), 6)(make_x(1, 784)).shape == (1, 16, 6)
    assert TokenProjection((8, 8), 6)(make_x(1, 64).view(1, 8, 8)).shape == (1, 16, 6)
    assert TokenProjection((8, 8), 6, n_tokens=4)(make_x(1, 64)).shape == (1, 4, 6)


def test_tokens_of_a_vector_add_up_to_its_projection():
    tokens, x = TokenProjection(10, 6, n_tokens=5).double(), make_x(2, 10, dtype=torch.float64)
    bias = tokens.projection.bias
    torch.testing.assert_close(tokens(x).sum(1) - 4 * bias, tokens.projection(x))
    whole = TokenProjection(10, 6, n_tokens=1).double()
    torch.testing.assert_close(whole(x), whole.projection(x)[:, None])


def test_sequences_are_tokens():
    x = make_x(2, 3 * 10).view(2, 3, 10)
    tokens = TokenProjection(10, 6)
    torch.testing.assert_close(tokens(x), tokens.projection(x))
    placed = TokenProjection(10, 6, positions=True)
    shift = (placed(x) - placed.projection(x))[0].T  # [E, L]
    at = torch.arange(3.0)
    torch.testing.assert_close(shift[0], at.sin())
    torch.testing.assert_close(shift[1], at.cos())
    torch.testing.assert_close(shift[2], (at * 10_000 ** (-1 / 3)).sin())


def test_a_model_takes_vectors_images_and_sequences():
    model = make_model(reads={0: (), 1: (0,)}, positions=True)
    for x in (make_x(2), make_x(2).view(2, 1, 3, 4), make_x(2, 84).view(2, 7, 12)):
        assert model(x, 1).shape == (2, 3)
    x = make_x(2, 84).view(2, 7, 12)
    assert not torch.allclose(model(x, 0), model(x.flip(1), 0))


# ---- files ----


def saved(model, folder, *tasks) -> list:
    paths = [folder / f"{task}.safetensors" for task in tasks]
    for task, path in zip(tasks, paths, strict=True):
        model.save_task(task, path)
    return paths


def test_tasks_move_to_a_fresh_model(tmp_path):
    model, x = make_model(reads={}), make_x(4)
    for task, reads in {0: (), 1: (0,), "two": (), 3: (1, "two")}.items():
        model.register_task(task, 3, reads=reads)
        if task == 1:
            model.set_mask(1, torch.eye(5, dtype=torch.bool))
        model.freeze_task(task)
    model.gather_prototypes("two", x, torch.tensor([0, 1, 1, 0]))
    other = make_model(reads={}, seed=9)
    for path in saved(model, tmp_path, *model.tasks):
        other.load_task(path)
    assert other.tasks == model.tasks
    assert other.reads(3) == (1, "two")
    assert torch.equal(other.prototypes("two")[:2], model.prototypes("two")[:2])
    for task in model.tasks:
        assert other.is_frozen(task)
        assert torch.equal(other(x, task), model(x, task))


def test_a_file_must_fit_the_model(tmp_path):
    model = make_model(reads={0: (), 1: (0,)})
    first, second = saved(model, tmp_path, 0, 1)
    with pytest.raises(ValueError, match="path must hold a task with a new name, got 0"):
        model.load_task(first)
    with pytest.raises(ValueError, match="tasks that 1 reads must name registered tasks"):
        make_model(reads={}).load_task(second)
    with pytest.raises(ValueError, match="path must hold a task of a model of {'input_dim': 12"):
        make_model(reads={}, n_layers=1).load_task(first)
    with pytest.raises(ValueError, match="with the same shared parameters"):
        make_model(reads={5: ()}, seed=4).load_task(first)
    other = make_model(reads={0: ()}, seed=4)  # its task 0 is another one
    with pytest.raises(ValueError, match="path must hold a task that reads this model's task 0"):
        other.load_task(second)
    assert other.tasks == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_comes_back_whole(tmp_path, dtype):
    model, x = make_model(reads={}, shared="first_task", n_nodes=2, rank=3), make_x(4, dtype=dtype)
    model.to(dtype)
    for task, reads in {0: (), "gone": (), 1: (0,), "a/b.c": (1,)}.items():
        model.register_task(task, 3, reads=reads)
        if task == 1:
            model.set_mask(1, torch.eye(6, dtype=torch.bool))
        if task != "a/b.c":
            model.freeze_task(task)
    model.remove_task("gone")
    model.gather_prototypes(0, x, torch.tensor([0, 1, 1, 0]))
    model.inference = "entropy"
    model.save(tmp_path / "model.safetensors")
    drawn = torch.random.get_rng_state()
    other = DTGMAModel.load(tmp_path / "model.safetensors")
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert repr(other) == repr(model)
    assert not other.training
    assert other.parameter_report() == model.parameter_report()
    assert torch.equal(other.prototypes(0).nan_to_num(), model.prototypes(0).nan_to_num())
    for task in model.tasks:
        assert other.is_frozen(task) == model.is_frozen(task)
        assert torch.equal(other(x, task), model(x, task))
    assert other.infer_task(x) == model.infer_task(x)
    other.register_task("new", reads=(1,))  # and goes on


def test_a_model_without_tasks_comes_back(tmp_path):
    model = make_model(reads={}, input_dim=(1, 3, 4), shared="first_task", dropout=0.3)
    model.save(tmp_path / "model")
    other = DTGMAModel.load(tmp_path / "model")
    assert other.parameter_report() == model.parameter_report()
    assert other.options == model.options
    with pytest.raises(ValueError, match="path must hold what has format memattn.DTGMATask/1"):
        other.load_task(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="path must be a file that DTGMAModel.save wrote"):
        DTGMAModel.load(tmp_path / "none")


def test_shared_parameters_are_frozen_on_demand(tmp_path):
    model = make_model(reads={0: ()}, frozen=False, shared="first_task")
    assert model.parameter_report().trainable == model.parameter_report().total
    model.freeze_shared()
    assert not model.tokens.projection.weight.requires_grad
    assert model.requires_grad_().parameter_report().trainable == model.parameter_report().tasks[0]
    model.save(tmp_path / "model")
    assert DTGMAModel.load(tmp_path / "model").shared_frozen and not model.is_frozen(0)


def test_only_whole_files_are_read(tmp_path):
    model = make_model(reads={0: ()})
    (path,) = saved(model, tmp_path, 0)
    with pytest.raises(FileNotFoundError, match="a file that DTGMAModel.save_task wrote"):
        model.load_task(tmp_path / "none")
    broken = tmp_path / "broken"
    broken.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="path must be a whole safetensors file"):
        model.load_task(broken)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="path must hold what has format memattn.DTGMATask/1"):
        model.load_task(tmp_path / "other")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model = make_model(reads={0: ()})
    (path,) = saved(model, tmp_path, 0)
    before = path.read_bytes()

    def fill_the_disk(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        model.save_task(0, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


# ---- inference ----


def test_prototypes_tell_tasks_apart():
    model = make_model(reads={"a": (), "b": ()}, inference="prototype")
    far = make_x(6) + 5.0
    model.gather_prototypes("a", make_x(6), torch.zeros(6, dtype=torch.long))  # no second class
    model.gather_prototypes("b", far, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert torch.allclose(model.prototypes("b")[1], model.tokens(far[3:]).flatten(1).mean(0))
    assert model.prototypes("a")[1].isnan().all()
    x = torch.cat([far[:2], make_x(2, seed=5)])
    assert model.infer_task(x) == ["b", "b", "a", "a"]
    assert torch.equal(model(x), model(x, ["b", "b", "a", "a"]))
    assert model.parameter_report().prototypes == 4 * 4 * 16
    sequence = make_x(2, 36).view(2, 3, 12)
    with pytest.raises(ValueError, match="x must give the 64 features of the prototypes"):
        model.infer_task(sequence)


def test_entropy_takes_the_most_certain_task():
    model = make_model(reads={"a": (), "b": ()})
    model.register_task("c", 1)
    with torch.no_grad():
        model.columns["1"].head.bias[0] = 50.0
    assert model.infer_task(make_x(3), "entropy") == ["b"] * 3


def test_inference_must_be_possible():
    model = make_model(reads={0: ()})
    with pytest.raises(ValueError, match="task_id must be given to a model without inference"):
        model(make_x(1))
    with pytest.raises(ValueError, match="method must be one of prototype, entropy, got None"):
        model.infer_task(make_x(1))
    with pytest.raises(ValueError, match="method must not be 'prototype' while task 0 has none"):
        model.infer_task(make_x(1), "prototype")
    with pytest.raises(ValueError, match="infer_task must have registered tasks"):
        make_model(reads={}).infer_task(make_x(1), "entropy")


# ---- errors ----

TASKLESS = torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(make_x(2), 9), r"task_id must name registered tasks \(0, 1\), got 9"),
        (lambda m: m(make_x(2), True), r"task_id must name registered tasks \(0, 1\), got True"),
        (lambda m: m(make_x(2), [0, 9]), r"task_id must name registered tasks \(0, 1\), got 9"),
        (lambda m: m(make_x(2), [0]), "task_id must name one task, or one for each of B=2"),
        (lambda m: m(make_x(2, 11), 0), r"x must have shape \[B, 12\] or \[B, L, 12\], got"),
        (lambda m: m(make_x(2).double(), 0), "x must have the dtype of the projection"),
        (
            lambda m: m(make_x(2, 36).view(2, 3, 12), 1),
            "x must give the 4 tokens that the mask of task 1",
        ),
        (lambda m: m.register_task(0), "task must be a new name, got 0"),
        (lambda m: m.gather_prototypes(0, make_x(2), torch.tensor([0, 2])), "y must be from 0 to"),
        (lambda m: m.gather_prototypes(0, make_x(2), torch.tensor([0, -1])), "y must be from 0"),
        (
            lambda m: m.gather_prototypes(0, make_x(2), torch.tensor([0])),
            "y must have shape",
        ),
        (
            lambda m: m.gather_prototypes(0, make_x(2), torch.zeros(2)),
            "y must have dtype",
        ),
        (lambda m: m.gather_prototypes(0, make_x(0), TASKLESS), "y must have at least one label"),
        (lambda m: m.register_task(2, 0), "num_classes must be at least 1, got 0"),
        (lambda m: m.register_task(2, reads=(7,)), "reads must name registered tasks"),
        (lambda m: m.register_task(2, reads=(1,)), r"reads must name frozen tasks .*, got 1"),
        (lambda m: m.register_task(2, init_from=7), "init_from must name registered tasks"),
        (lambda m: m.trainable_parameters(0), "task must not be frozen to be trained, got 0"),
        (lambda m: m.freeze_task(7), "task must name registered tasks"),
        (lambda m: m.set_mask(0, torch.ones(5, 5).bool()), "task must not be frozen to get"),
        (lambda m: m.set_mask(1, torch.ones(5, 5)), "mask must have dtype torch.bool"),
        (lambda m: m.set_mask(1, torch.ones(5, 4).bool()), r"mask must have shape \[L, L\] or"),
        (lambda m: m.set_mask(1, torch.ones(3, 5, 5).bool()), r"or \[n_heads=2, L, L\]"),
        (lambda m: m.set_mask(1, torch.ones(1, 1).bool()), "with L > n_nodes=1"),
        (lambda m: DTGMAModel(4, 8, 2, dropout=1.0), "dropout must be at least 0 and below 1"),
        (lambda m: DTGMAModel(4, 8, 2, backend="no"), "backend must be one of auto, .*, got 'no'"),
        (lambda m: DTGMAModel(4, 8, 2, shared="no"), "shared must be one of frozen, first_task"),
        (lambda m: DTGMAModel(4, 8, 2, inference="no"), "inference must be None or one of"),
        (lambda m: DTGMAModel(4, 9, 2), "hidden_dim must be divisible by n_heads=4, got 9"),
        (lambda m: DTGMAModel((4, 4, 4, 4), 8, 2), "input_dim must be an integer"),
        (lambda m: DTGMAModel((4, 0), 8, 2), "input_dim must be at least 1, got 0"),
        (lambda m: DTGMAModel(4, 8, 2, n_tokens=0), "n_tokens must be at least 1, got 0"),
    ],
)
def test_names_the_argument(call, message):
    model = make_model(reads={0: (), 1: ()}, frozen=False)
    model.set_mask(1, torch.ones(5, 5, dtype=torch.bool))
    model.freeze_task(0)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert model.tasks == (0, 1)


def test_names_the_argument_of_a_wrong_type():
    model = make_model(reads={0: ()})
    with pytest.raises(TypeError, match="task must be an integer or a string, got float"):
        model.register_task(1.0)
    with pytest.raises(TypeError, match="task_id must be a name, names or a tensor, got float"):
        model(make_x(1), 0.0)
    with pytest.raises(TypeError, match="dropout must be a number, got str"):
        DTGMAModel(4, 8, 2, dropout="x")
    with pytest.raises(TypeError, match="input_dim must be an integer, .*, got float"):
        DTGMAModel(16.0, 8, 2)
    with pytest.raises(TypeError, match="backend must be one of auto, .*, got NoneType"):
        DTGMAModel(4, 8, 2, backend=None)
    with pytest.raises(TypeError, match="y must be a tensor, got list"):
        model.gather_prototypes(0, make_x(1), [0])
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        model([1.0], 0)


@pytest.mark.parametrize(
    ("options", "length"),
    [({}, 5), (dict(n_tokens=1), 1), (dict(patch_size=2), 7), (dict(n_nodes=2), 6)],
)
def test_masks_of_images_are_as_long_as_their_columns(options, length):
    model = make_model(input_dim=(2, 5, 4), reads={0: ()}, frozen=False, **options)
    model.set_mask(0, torch.ones(length, length, dtype=torch.bool))
    assert model(make_x(1, 40), 0).shape == (1, 2)
    with pytest.raises(ValueError, match=f"mask must have L={length} .*, got 99"):
        model.set_mask(0, torch.ones(99, 99, dtype=torch.bool))


def test_names_of_other_integer_types():
    model, x = make_model(reads={0: (), np.int64(1): (np.int8(0),), np.str_("a"): ()}), make_x(2)
    assert [type(task) for task in model.tasks] == [int, int, str]
    expected = model(x, 1)
    for task in (np.int64(1), [np.int64(1)] * 2, torch.tensor(1), torch.tensor(1).int()):
        assert torch.equal(model(x, task), expected)
    with pytest.raises(TypeError, match="task must be an integer or a string, got bool"):
        model.register_task(np.bool_(True))
    with pytest.raises(ValueError, match="task_id must name registered tasks"):
        model(x, torch.tensor(True))


@pytest.mark.parametrize("input_dim", [12, (3, 4)], ids=str)
def test_empty_batches(input_dim):
    model = make_model(input_dim=input_dim, inference="entropy")
    x = make_x(0).requires_grad_()
    for task, classes in {0: 2, 1: 3, 3: 2}.items():  # 3 reads 1, which reads 0
        assert model(x, task).shape == (0, classes)
    for task in ([], torch.zeros(0, dtype=torch.int64), None):
        out = model(x, task)
        assert out.shape == (0, model.num_classes)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert grad.shape == x.shape
    model(x, 3).sum().backward()
    assert x.grad.shape == x.shape
    with pytest.raises(ValueError, match=r"x must have shape \[B, "):
        model(make_x(0, 11), [])
