"""DTG-MA: its function, the published one, the task graph, isolation."""

import hashlib

import pytest
import torch
from dtgma_factories import READS, define, make_model, make_x
from torch.nn import functional as F

from memattn import DTGMAModel, TaskMask
from memattn.nn.task_attention import ColumnLayout, TaskGraphAttention
from memattn.nn.task_linear import group_by_task
from memattn.testing import assert_within_budget

TASKS = list(READS)


def random_mask(length: int, heads: int | None = None, seed: int = 3) -> torch.Tensor:
    shape = (length, length) if heads is None else (heads, length, length)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return mask | torch.eye(length, dtype=torch.bool)


def test_parameters_are_as_many_as_published():
    model = DTGMAModel(
        input_dim=784, hidden_dim=256, num_classes=2, n_layers=2, n_heads=4, n_tokens=1
    )
    assert model.parameter_report().total == 203_008
    assert model.parameter_report().trainable == 0
    for task in range(2):
        model.register_task(task)
    report = model.parameter_report()
    assert report.tasks == {0: 1_577_986, 1: 1_577_986}
    assert report.total == report.shared + 2 * 1_577_986 == 203_008 + report.trainable
    assert sum(p.numel() for p in model.parameters()) == report.total


def test_the_published_function():
    """One token: ``x + Out(V(LN x))``, then the feed-forward; queries and keys have no say."""
    model = make_model(n_tokens=1, reads={5: ()}).double()
    x = make_x(6, dtype=torch.float64)
    p = dict(model.named_parameters())
    h = F.linear(x, p["tokens.projection.weight"], p["tokens.projection.bias"])

    def linear(name, h):
        return F.linear(h, p[f"{name}.full.0"], p[f"{name}.bias.0"])

    def norm(name, h):
        return F.layer_norm(h, (16,), p[f"{name}.weight"], p[f"{name}.bias"])

    for layer in ("layers.0", "layers.1"):
        value = linear(f"{layer}.attention.v_proj", norm(f"{layer}.attention_norm", h))
        h = h + linear(f"{layer}.attention.o_proj", value)
        inner = linear(f"{layer}.ffn.up", norm(f"{layer}.ffn_norm", h)).relu()
        h = h + linear(f"{layer}.ffn.down", inner)
    logits = F.linear(h, p["columns.0.head.weight"], p["columns.0.head.bias"])
    torch.testing.assert_close(model(x, 5), logits)


@pytest.mark.usefixtures("new_programs")
def test_compiles():
    model, x = make_model(n_layers=1, reads={0: (), 1: ()}), make_x(4)
    tasks = [1, 0, 1, 0]
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x, tasks), model(x, tasks))


def test_attention_over_one_token_is_its_value():
    torch.manual_seed(0)
    attention = TaskGraphAttention(8, 2).double()
    for proj in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        proj.add_task()
    none = torch.empty(0, dtype=torch.long)
    mask = TaskMask.from_dense(torch.ones(1, 1, 1, dtype=torch.bool))
    row = torch.zeros(3, dtype=torch.int32)
    layout = ColumnLayout(group_by_task(0, 3), None, none, none, none.view(3, 0), mask, row)
    x = torch.randn(3, 1, 8, dtype=torch.float64)
    out, read = attention(x, None, layout)
    assert read is None
    torch.testing.assert_close(out, attention.o_proj(attention.v_proj(x, 0), 0))


@pytest.mark.parametrize("n_nodes", [0, 2])
@pytest.mark.parametrize("task", TASKS, ids=str)
@pytest.mark.parametrize("form", ["whole", "pairs", "heads"])
def test_matches_the_definition(task, n_nodes, form):
    model = make_model(n_nodes=n_nodes, frozen=False)
    masks = {}
    if form != "whole":  # the mask of a task that is read, and that of a reader
        model = make_model(n_nodes=n_nodes, reads={})
        for name, reads in READS.items():
            model.register_task(name, reads=reads)
            if name in (1, 3):
                masks[name] = random_mask(4 + n_nodes, 2 if form == "heads" else None)
                model.set_mask(name, masks[name])
            model.freeze_task(name)
    x = make_x(5)
    actual = model(x, task)
    low = define(model, x, task, masks)
    high = define(model.double(), x.double(), task, masks)
    assert_within_budget("logits", actual, low, high)


def test_a_batch_mixes_tasks():
    model = make_model()
    names = ["two", 3, 0, 1, 3, 0, "two", 1, 1]
    x = make_x(len(names))
    mixed = model(x, names)
    assert mixed.shape == (9, 3)
    for task in TASKS:
        rows = [i for i, name in enumerate(names) if name == task]
        alone, exact = model(x[rows], task), define(model, x[rows], task, {})
        width = alone.shape[1]
        assert (mixed[rows][:, width:] == -torch.inf).all()
        exact = define(model.double(), x[rows].double(), task, {})
        assert_within_budget(f"task {task}", mixed[rows][:, :width], alone, exact)
        model.float()


def test_integer_tensors_name_tasks():
    model, x = make_model(reads={0: (), 7: ()}), make_x(3)
    assert torch.equal(model(x, torch.tensor([7, 0, 7])), model(x, [7, 0, 7]))
    assert not torch.equal(model(x, torch.tensor([7, 0, 7])), model(x, [0, 0, 0]))


def test_a_batch_gives_each_task_its_gradient():
    model = make_model(reads={0: (), 1: (0,), 2: (0,), 3: ()}, frozen=False)
    model(make_x(6), [1, 2, 1, 2, 1, 2]).square().sum().backward()
    got = {t: [p.grad is not None for p in model.get_task_parameters(t)] for t in model.tasks}
    assert all(got[1])
    assert all(got[2])
    assert not any(got[0] + got[3])  # frozen and read; not in the batch


def test_gradients_match_the_definition():
    model = make_model(frozen=False, n_nodes=1).double()
    x = make_x(4, dtype=torch.float64)
    own = model.get_task_parameters(3)
    actual = torch.autograd.grad(model(x, 3).square().sum(), own)
    wanted = torch.autograd.grad(define(model, x, 3, {}).square().sum(), own)
    torch.testing.assert_close(actual, wanted)


def test_masks_act():
    """A token that nobody sees has no effect, on a task with that mask."""
    model, x = make_model(reads={0: (), 1: ()}, frozen=False, n_nodes=1), make_x(3)
    changed = x.clone()
    changed[:, 3:6] += 1.0  # token 1 of 4
    assert not torch.allclose(model(x, 0), model(changed, 0))
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[:, 1] = False
    mask[1, 1] = True
    model.set_mask(0, mask)
    assert torch.equal(model(x, 0), model(changed, 0))
    assert not torch.allclose(model(x, 1), model(changed, 1))
    model.set_mask(0, None)
    assert not torch.allclose(model(x, 0), model(changed, 0))


def test_a_token_that_sees_nothing_is_finite():
    model = make_model(reads={0: ()}, frozen=False, n_nodes=1)
    model.set_mask(0, torch.zeros(5, 5, dtype=torch.bool))
    logits = model(make_x(3), 0)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.get_task_parameters(0))


def test_readers_see_what_they_read_and_are_not_seen():
    model, x = make_model(), make_x(3)
    before = {task: model(x, task) for task in TASKS}
    with torch.no_grad():
        for parameter in model.get_task_parameters(1):
            parameter += 0.1
    changed = {task for task in TASKS if not torch.equal(before[task], model(x, task))}
    assert changed == {1, 3}


def fingerprint(model, task) -> str:
    tensors = [p.detach().numpy().tobytes() for p in model.get_task_parameters(task)]
    return hashlib.sha256(b"".join(tensors)).hexdigest()


@pytest.mark.parametrize("reads", [(), (0, 1)], ids=["alone", "reads"])
@pytest.mark.parametrize("shared", ["frozen", "first_task"])
def test_training_leaves_earlier_tasks_as_they_were(reads, shared):
    model, x = make_model(reads={}, shared=shared), make_x(8)
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.1)

    def train(task):
        # an optimizer of everything: what does not belong to the task gets no gradient
        optimizer = torch.optim.SGD(model.parameters(), **options)
        model.train()
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(x, task), torch.arange(8) % 2).backward()
            optimizer.step()
        model.eval()

    tasks_before = []
    for task in range(3):
        model.register_task(task, reads=reads if task == 2 else ())
        before = fingerprint(model, task)
        train(task)
        assert fingerprint(model, task) != before
        model.freeze_task(task)
        for earlier, known, logits in tasks_before:
            assert fingerprint(model, earlier) == known
            assert torch.equal(model(x, earlier), logits)
        assert all(p.grad is None for p in model.parameters())
        tasks_before.append((task, fingerprint(model, task), model(x, task)))


def test_shared_parts_are_trained_with_the_first_task_only():
    model, x = make_model(reads={}, shared="first_task"), make_x(4)
    model.register_task(0)
    shared = set(model.trainable_parameters(0)) - set(model.get_task_parameters(0))
    assert sum(p.numel() for p in shared) == model.parameter_report().shared
    model(x, 0).square().sum().backward()
    assert all(p.grad is not None for p in shared)
    model.register_task(1)
    assert model.trainable_parameters(1) == model.get_task_parameters(1)
    assert all(p.grad is None and not p.requires_grad for p in shared)

    model = make_model(reads={0: ()}, frozen=False)
    model(x, 0).square().sum().backward()
    assert {p for p in model.parameters() if p.grad is not None} == set(
        model.get_task_parameters(0)
    )


@pytest.mark.parametrize("options", [dict(rank=2), dict(dropout=0.5), dict(n_layers=1)], ids=str)
def test_options_train(options):
    model = make_model(reads={0: (), 1: (0,)}, frozen=False, **options).train()
    x = make_x(4)
    first, second = model(x, 1), model(x, 1)
    assert torch.equal(first, second) == ("dropout" not in options)
    first.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.get_task_parameters(1))


def test_reads_know_no_dropout():
    """In training mode a reader sees what it sees in evaluation mode."""
    model = make_model(reads={0: (), 1: (0,)}, frozen=False, dropout=0.9, n_layers=2)
    seen = []
    for layer in model.layers:
        layer.attention.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    x = make_x(4)
    model.train()(x, 1)
    model.eval()(x, 1)
    for training, evaluation in zip(seen[:2], seen[2:], strict=True):
        assert torch.equal(training, evaluation)


def test_a_task_starts_from_another():
    model, x = make_model(reads={0: (), 1: (0,)}, frozen=False), make_x(4)
    model.register_task("same", init_from=0)
    assert torch.equal(model(x, "same"), model(x, 0))
    model.register_task("more", 5, init_from=0)
    assert model(x, "more").shape == (4, 5)


def test_tasks_are_removed_unless_they_are_read():
    model, x = make_model(), make_x(3)
    logits = model(x, 0)
    with pytest.raises(ValueError, match="task must not be read by other tasks \\(3\\), got 'two'"):
        model.remove_task("two")
    model.remove_task(3)
    model.remove_task("two")
    assert model.tasks == (0, 1)
    assert set(model.parameter_report().tasks) == {0, 1}
    assert torch.equal(model(x, 0), logits)
    model.register_task("two", reads=(1,))
    assert model.reads("two") == (1,)
    assert torch.equal(model(x, 0), logits)


def test_it_says_what_it_is():
    text = repr(make_model(frozen=False))
    assert "input_dim=12, hidden_dim=16" in text
    assert "task 1: 3 classes, frozen, reads 0\n" in text
    assert text.endswith("task 3: 2 classes, trainable, reads 1, 'two')")


def test_moves_to_another_dtype():
    model = make_model(reads={0: ()}).double()
    model.register_task(1, reads=(0,))
    assert model(make_x(2, dtype=torch.float64), [0, 1]).dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.float64}
