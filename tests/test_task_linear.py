"""TaskLinear: a grouped product against one weight gathered for each row, in float64."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import memattn.nn.task_linear as module
from memattn import TaskLinear
from memattn.nn import group_by_task
from memattn.testing import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16]
# sizes that PyTorch's grouped product takes, and sizes that it does not
SIZES = {"aligned": dict(d_in=16, d_out=8), "odd": dict(d_in=13, d_out=7)}
TASKS = torch.tensor([2, 0, 2, 3, 0, 2])


def make_layer(d_in, d_out, n_tasks=4, **options) -> TaskLinear:
    torch.manual_seed(0)
    return TaskLinear(n_tasks, d_in, d_out, **options)


def make_input(d_in: int) -> torch.Tensor:
    return torch.randn(len(TASKS), 3, d_in, generator=torch.Generator().manual_seed(1))


def run(layer, x, dtype, call) -> list:
    """Output, gradient of the input and of all parameters; None for absent tasks."""
    layer = copy.deepcopy(layer).to(dtype)
    x = x.detach().to(dtype, copy=True).requires_grad_()
    out = call(layer, x)
    weights = torch.linspace(-1, 1, out.numel()).bfloat16().to(dtype).view(out.shape)
    (out * weights).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters())]


def gather_weights(layer, x, task_id=TASKS):
    """The definition: a weight for each row."""
    out = torch.einsum("bli,boi->blo", x, layer.weight[task_id])
    if layer.bias is None:
        return out
    return out + torch.stack([*layer.bias.values()])[task_id][:, None]


def rounded(layer, dtype):
    """Parameters that every dtype of the comparison represents."""
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(dtype).to(torch.float32)
    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("options", [{}, dict(rank=8), dict(bias=False), dict(rank=8, bias=False)])
def test_matches_a_weight_for_each_row(dtype, sizes, options):
    layer = rounded(make_layer(**SIZES[sizes], **options), dtype)
    x = make_input(layer.in_features).to(dtype).float()
    actual = run(layer, x, dtype, lambda layer, x: layer(x, TASKS))
    low = run(layer, x, dtype, gather_weights)
    high = run(layer, x, torch.float64, gather_weights)
    for i, results in enumerate(zip(actual, low, high, strict=True)):
        if results[0] is None:  # an absent task; its gradient is 0 where weights were stacked
            assert not results[2].any()
            continue
        assert_within_budget(f"result {i}", *results)


def test_the_grouped_product_is_used_and_gives_what_slices_give(monkeypatch):
    layer, x = make_layer(**SIZES["aligned"], bias=False), make_input(16)
    calls = []
    grouped_mm = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: calls.append(1) or grouped_mm(*a, **k))
    grouped = run(layer, x, torch.float32, lambda layer, x: layer(x, TASKS))
    assert calls
    monkeypatch.setattr(module, "_takes_grouped_mm", lambda rows, weight: False)
    sliced = run(layer, x, torch.float32, lambda layer, x: layer(x, TASKS))
    assert len(calls) == 1
    for a, b in zip(grouped, sliced, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b)


def test_expanded_gradients_pass_through_the_grouped_product():
    layer, x = make_layer(**SIZES["aligned"], bias=False), make_input(16).requires_grad_()
    layer(x, TASKS).sum().backward()
    assert torch.allclose(x.grad, layer.weight[TASKS].sum(1)[:, None].expand_as(x))


def test_an_absent_task_gets_no_gradient():
    layer = make_layer(**SIZES["aligned"])
    layer(make_input(16), TASKS).sum().backward()
    absent = {task for task in layer.tasks if layer.task_parameters(task)["weight"].grad is None}
    assert absent == {1}
    assert layer.task_parameters(1)["bias"].grad is None


@pytest.mark.parametrize("rank", [None, 3])
def test_gradcheck(rank):
    layer = make_layer(5, 4, n_tasks=3, rank=rank).double()
    x = make_input(5)[:, :2].double().requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, given, (x, TASKS.clamp(max=2)))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))


def test_one_task_is_a_linear_layer():
    layer, x = make_layer(**SIZES["odd"]), make_input(13)
    own = layer.task_parameters(3)
    assert torch.equal(layer(x, 3), F.linear(x, own["weight"], own["bias"]))
    assert torch.equal(layer(x, torch.full((6,), 3)), layer(x, 3))


def test_sorted_rows_are_taken_as_they_are():
    layer, x = make_layer(**SIZES["odd"]), make_input(13)
    groups = group_by_task(TASKS, 6)
    assert groups.tasks == (0, 2, 3)
    assert groups.sizes == (2, 3, 1)
    out = groups.unsort(layer(groups.sort(x), groups))
    assert torch.equal(out, layer(x, TASKS))
    assert group_by_task(TASKS.sort().values, 6).order is None


def test_a_shared_weight_is_where_tasks_start():
    shared = torch.randn(8, 16)
    layer = make_layer(**SIZES["aligned"], rank=2, bias=False, shared_weight=shared)
    x = make_input(16)
    assert torch.allclose(layer(x, TASKS), F.linear(x, shared), atol=1e-6)
    assert torch.allclose(layer.weight, shared.expand(4, -1, -1))
    layer(x, TASKS).square().sum().backward()
    assert layer.task_parameters(0)["up"].grad.any()
    assert not layer.shared_weight.requires_grad


def test_tasks_come_and_go():
    layer = TaskLinear(0, 5, 3, rank=2).double()
    assert layer.tasks == ()
    assert layer.add_task() == 0
    assert layer.add_task(7) == 7
    assert layer.add_task(init_from=7) == 8
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    x = torch.randn(2, 5, dtype=torch.float64)
    assert torch.equal(layer(x, 7), layer(x, 8))
    assert not torch.equal(layer(x, 7), layer(x, 0))
    layer.remove_task(7)
    assert layer.tasks == (0, 8)
    assert layer.weight.shape == (2, 3, 5)
    with pytest.raises(ValueError, match=r"task_id must be one of the tasks \[0, 8\], got 7"):
        layer(x, 7)


def test_steps_of_one_task_leave_the_others_alone():
    layer = make_layer(**SIZES["aligned"])
    before = layer.weight.detach().clone()
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.1)
    optimizer = torch.optim.SGD(layer.task_parameters(2).values(), **options)
    for _ in range(2):
        layer(make_input(16), TASKS).sum().backward()
        optimizer.step()
    changed = (layer.weight != before).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TaskLinear(-1, 4, 4), "n_tasks must be at least 0, got -1"),
        (lambda: TaskLinear(1, 0, 4), "in_features must be at least 1, got 0"),
        (lambda: TaskLinear(1, 4, 4, rank=0), "rank must be at least 1, got 0"),
        (
            lambda: TaskLinear(1, 4, 3, shared_weight=torch.zeros(3, 4)),
            "shared_weight must come with a rank",
        ),
        (
            lambda: TaskLinear(1, 4, 3, rank=1, shared_weight=torch.zeros(4, 3)),
            r"shared_weight must have shape \[out=3, d_in=4\], got \[4, 3\]",
        ),
        (lambda: TaskLinear(2, 4, 3).add_task(1), "task must be a new one, got 1"),
        (lambda: TaskLinear(2, 4, 3).add_task(init_from=2), r"init_from must be one of .*, got 2"),
        (lambda: TaskLinear(2, 4, 3).remove_task(2), r"task must be one of the tasks \[0, 1\]"),
        (
            lambda: TaskLinear(2, 4, 3)(torch.zeros(2, 5), 0),
            r"x must have shape \[B, ..., 4\], got \[2, 5\]",
        ),
        (
            lambda: TaskLinear(2, 4, 3)(torch.zeros(2, 4), torch.tensor([0])),
            r"task_id must be an integer or have shape \[B=2\], got \[1\]",
        ),
        (
            lambda: TaskLinear(2, 4, 3)(torch.zeros(2, 4), torch.tensor([0.0, 1.0])),
            "task_id must have dtype torch.int32 or torch.int64",
        ),
        (
            lambda: TaskLinear(2, 4, 3)(torch.zeros(1, 4), group_by_task(0, 2)),
            "task_id must have B=1 rows, got 2",
        ),
    ],
)
def test_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("rank", [None, 2])
def test_empty_batches(rank):
    layer = TaskLinear(3, 16, 8, rank=rank)
    x = torch.randn(0, 5, 16, requires_grad=True)
    for task in (1, torch.zeros(0, dtype=torch.long)):
        out = layer(x, task)
        assert out.shape == (0, 5, 8)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert grad.shape == x.shape
    assert TaskLinear(0, 16, 8, rank=rank).double().weight.shape == (0, 8, 16)


def test_one_task_for_all_rows():
    layer, x = make_layer(**SIZES["odd"]), make_input(13)
    for task in (np.int64(2), np.uint8(2), torch.tensor(2), torch.tensor(2).int()):
        assert torch.equal(layer(x, task), layer(x, 2))


def test_x_has_the_dtype_of_the_weights():
    layer, x = make_layer(16, 8), make_input(16)
    for task in (0, TASKS):
        with pytest.raises(ValueError, match="x must have the dtype of the weights, torch.float32"):
            layer(x.double(), task)
    with pytest.raises(TypeError, match="x must be a tensor, got ndarray"):
        layer(x.numpy(), 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16(), TASKS).dtype == layer(x, TASKS).dtype == torch.bfloat16


@pytest.mark.usefixtures("new_programs")
def test_compiles():
    layer, x = make_layer(**SIZES["aligned"]), make_input(16)
    whole = torch.compile(layer, fullgraph=True, backend="eager")
    for task in (2, 1, 0):  # the second one makes the number of the task a symbol
        torch.testing.assert_close(whole(x, task), layer(x, task))
    mixed = torch.compile(layer, backend="eager")
    torch.testing.assert_close(mixed(x, TASKS), layer(x, TASKS))


def test_task_id_must_be_an_integer_or_a_tensor():
    with pytest.raises(TypeError, match="task_id must be an integer or a tensor, got str"):
        make_layer(4, 3)(torch.zeros(1, 4), "0")
