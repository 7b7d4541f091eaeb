"""Pictures of the tasks of a DTG-MA model, and of how far a token of a language model reaches."""

import re

import pytest
import torch
from dtgma_factories import make_model, make_x
from hf_attention_factories import make_model as make_decoder

from memattn import DTGMAModel
from memattn.cli import main
from memattn.evaluate import influence
from memattn.nn import task_attention
from memattn.testing import assert_within_budget
from memattn.viz import plot_influence, plot_tasks


def test_weights_of_a_task_are_those_that_its_operator_uses(monkeypatch):
    model, x = make_model(), make_x(1)
    model.remove_task(3)  # nobody reads it: its successor gets a mask of its own
    model.register_task(3, reads=(1, "two"))
    mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[2] = False  # a token that sees nothing of its own column
    model.set_mask(3, mask)
    calls = []

    def record(query, key, value, *args, **options):
        out = operator(query, key, value, *args, **options)
        calls.append((value, out.out))
        return out

    operator = task_attention.task_masked_attention
    monkeypatch.setattr(task_attention, "task_masked_attention", record)
    found = model.attention(3, x)
    assert found.columns == (3, 0, 1, "two") and found.mask.shape == (1, 5, 20)
    assert torch.equal(found.mask[0, :, :5], mask)
    assert found.mask[0, 0].tolist()[5:10] == [False] * 5  # 3 reads 1 and "two", which read 0
    assert found.weights is not None and len(calls) == len(found.weights) == 2
    for weights, (value, out) in zip(found.weights, calls, strict=True):
        high = weights.double() @ value[0].double()
        low = weights @ value[0]
        assert_within_budget("weights", out[0, :, :5], low, high)
    assert not found.weights[
        (~found.mask).expand_as(found.weights[0])[None].expand_as(found.weights)
    ].any()


def test_without_inputs_the_mean_of_each_class_is_drawn():
    model, x = make_model(reads={0: ()}), make_x(6)
    assert model.attention(0, x).weights is not None
    with pytest.raises(ValueError, match="x must be given for task 0, which has neither a mask"):
        model.attention(0)
    model.gather_prototypes(0, x, torch.tensor([0, 0, 0, 1, 1, 1]))
    means = torch.stack([x[:3].mean(0), x[3:].mean(0)])
    expected, actual = model.attention(0, means).weights, model.attention(0).weights
    assert expected is not None and actual is not None
    torch.testing.assert_close(actual, expected)


def test_a_model_of_sequences_has_masks_alone():
    model, x = make_model(reads={0: ()}, frozen=False), torch.randn(4, 6, 12)
    model.gather_prototypes(0, x, torch.tensor([0, 0, 1, 1]))
    model.set_mask(0, torch.eye(7, dtype=torch.bool))
    found = model.attention(0)
    assert found.weights is None and torch.equal(found.mask[0], torch.eye(7, dtype=torch.bool))


def test_tasks_are_drawn_by_a_command(tmp_path, capsys):
    model = DTGMAModel((8, 8), 16, 2)
    for name, reads in (("left", ()), ("right", ("left",))):
        model.register_task(name, reads=reads)
        x = torch.randn(6, 8, 8)
        model.gather_prototypes(name, x, torch.arange(6) % 2)
        model.freeze_task(name)
    model.save(tmp_path / "model.safetensors")
    out = tmp_path / "tasks.svg"
    assert main(["plot", "tasks", str(tmp_path / "model.safetensors"), "--out", str(out)]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    drawn = out.read_text()
    for title in ("left: what it may see", "right: attention, layer 2"):
        assert f"<!-- {title} -->" in drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tasks"], "runs must be tasks and one file, got 0 files"),
        (["tasks", "FOLDER"], "path must be a file that DTGMAModel.save wrote, got"),
        (["tasks", "FOLDER/none"], "path must be a file that DTGMAModel.save wrote"),
        (["tasks", "x", "--text", "a"], "text must be left out to plot tasks, got a text"),
        (["influence", "FOLDER"], "text must be given to plot influence, got None"),
    ],
)
def test_bad_arguments_are_told(arguments, message, tmp_path, capsys):
    arguments = [argument.replace("FOLDER", str(tmp_path)) for argument in arguments]
    assert main(["plot", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_model_without_tasks_is_told(tmp_path):
    with pytest.raises(ValueError, match=re.escape("model must have from 1 to 12 tasks to draw")):
        plot_tasks(DTGMAModel(12, 16, 2), tmp_path / "tasks.png")


@pytest.mark.parametrize("window", [None, 3])
def test_influence_ends_where_the_windows_of_the_layers_do(window, tmp_path):
    model = make_decoder("llama", memattn_window_size=window)
    ids = torch.arange(25)[None] % 20
    found = influence(model, ids, stride=2)
    assert found["changed"] == list(range(0, 24, 2))
    reach = 24 if window is None else 2 * (window - 1)  # of two layers
    for column, row in enumerate(found["log10"]):
        for place, value in enumerate(row):
            apart = 2 * (place - column)
            assert (value is not None) == (0 <= apart <= reach)
    plot_influence(found, tmp_path / "influence.png")
    assert (tmp_path / "influence.png").stat().st_size > 5_000


def test_influence_of_a_text_that_is_too_short_is_told():
    with pytest.raises(ValueError, match="input_ids must have at least 2 tokens, got 1"):
        influence(make_decoder("llama"), torch.zeros(1, 1, dtype=torch.long))
