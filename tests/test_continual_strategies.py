"""Strategies: what each promises, on clouds of points."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from continual_streams import SMALL, blobs
from torch.optim.optimizer import register_optimizer_step_post_hook

from memattn.continual import STRATEGIES, make_strategy, run_strategy
from memattn.continual.strategies import hat
from memattn.continual.strategies.distillation import distillation_loss
from memattn.continual.strategies.penalty import PathIntegral
from memattn.continual.strategies.replay import Reservoir
from memattn.data.streams import SCENARIOS

KNOWN = [(name, s) for name, kind in STRATEGIES.items() for s in kind.scenarios]
ISOLATED = ("separate", "packnet", "lora", "adapter", "fcd", "dtgma")


def learn(name, stream, n=None, budget=SMALL, seed=0, **options):
    """A strategy that has learned the first ``n`` tasks, or all."""
    strategy = make_strategy(name, stream, budget, seed, options)
    for index, task in enumerate(stream.tasks[:n]):
        strategy.fit(index, task)
    return strategy


def logits(strategy, stream):
    """Logits of every task learned."""
    return [strategy.predict(i, stream.tasks[i].test_x) for i in range(strategy.learned)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("name", "scenario"), KNOWN)
def test_learns_and_predicts_in_every_scenario_it_names(name, scenario):
    stream = blobs(scenario)
    strategy = make_strategy(name, stream, replace(SMALL, epochs=12), 0)
    right = 0.0
    for index, task in enumerate(stream.tasks):
        strategy.fit(index, task)
        out = strategy.predict(index, task.test_x)
        assert out.shape == (len(task.test_y), stream.n_outputs)
        seen = 2 * (index + 1) if scenario == "class" else 2
        assert (out[:, seen:] == -math.inf).all()
        guess = out.argmax(1)
        right += (guess == stream.labels(index, task.test_y)).float().mean().item() / 3
    assert right > (0.8 if scenario == "task" else 0.6)
    assert strategy.parameters_stored() >= strategy.parameters_to_predict() > 0


@pytest.mark.parametrize("name", ["finetuning", "ewc", "hat", "dtgma"])
def test_divergence_is_an_error(name):
    budget = replace(SMALL, lr=1e30)
    with pytest.raises(FloatingPointError, match=r"must be finite in epoch \d with lr=1e\+30, got"):
        learn(name, blobs(), budget=budget)


@pytest.mark.parametrize("name", ["ewc", "dtgma"])
def test_trains_where_gradients_are_off(name):
    stream = blobs()
    expected = logits(learn(name, stream, 2), stream)
    with torch.no_grad():
        assert same(logits(learn(name, stream, 2), stream), expected)


def test_refuses_a_task_of_another_stream():
    stream = blobs()
    strategy = make_strategy("finetuning", stream, SMALL, 0)
    task = stream.tasks[0]
    for change in (dict(name="x"), dict(classes=("x", "y")), dict(train_x=1, test_x=1)):
        wide = {key: getattr(task, key).repeat(1, 2) for key in change if key.endswith("_x")}
        with pytest.raises(ValueError, match="task must be that of the stream, 'blobs 0' with"):
            strategy.fit(0, replace(task, **change | wide))
    assert strategy.learned == 0
    strategy.fit(0, replace(task, train_x=task.train_x[:8], train_y=task.train_y[:8]))


def test_names_a_wrong_argument():
    with pytest.raises(ValueError, match="inference must be one of prototype, entropy, got 'foo'"):
        make_strategy("dtgma", blobs("task"), SMALL, 0, {"inference": "foo"})
    with pytest.raises(ValueError, match=r"budget.device must be cpu, .*, got foo"):
        make_strategy("ewc", blobs(), replace(SMALL, device="foo"), 0)
    with pytest.raises(ValueError, match=r"seed must be below 2\*\*40, got"):
        make_strategy("ewc", blobs(), SMALL, 2**40)


@pytest.mark.parametrize("name", STRATEGIES)
def test_refuses_other_scenarios(name):
    for scenario in set(SCENARIOS) - set(STRATEGIES[name].scenarios):
        message = f"stream must have scenario task for strategy '{name}', got '{scenario}'"
        with pytest.raises(ValueError, match=message):
            make_strategy(name, blobs(scenario), SMALL, 0)


@pytest.mark.parametrize("name", [n for n in STRATEGIES if n not in ("hat", "dtgma")])
def test_learns_with_the_transformer(name):
    stream = blobs(n_tasks=2)
    budget = replace(SMALL, backbone="transformer", n_heads=2)
    metrics = run_strategy(make_strategy(name, stream, budget, 0), stream).metrics()
    assert metrics["learning_accuracy"] > 0.8
    if name in ISOLATED:
        assert metrics["avg_forgetting"] == 0.0


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_seed_decides_everything(name):
    stream = blobs(n_tasks=2)
    before = torch.get_rng_state()
    first = logits(learn(name, stream, seed=3), stream)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert same(first, logits(learn(name, stream, seed=3), stream))
    assert not same(first, logits(learn(name, stream, seed=4), stream))


@pytest.mark.parametrize("name", STRATEGIES)
def test_noise_comes_to_inputs_in_training(name):
    """Far above what tells the classes apart, it leaves nothing to learn."""
    stream = blobs(n_tasks=2)
    budget = replace(SMALL, epochs=12, input_noise=1e4)
    metrics = run_strategy(make_strategy(name, stream, budget, 0), stream).metrics()
    assert metrics["learning_accuracy"] < 0.8


@pytest.mark.parametrize("name", STRATEGIES)
def test_keeps_to_the_budget(name):
    stream = blobs()
    steps = Counter()
    handle = register_optimizer_step_post_hook(lambda *_: steps.update(n=1))
    try:
        learn(name, stream)
    finally:
        handle.remove()
    one = SMALL.steps(24)
    assert one == 12
    # joint restarts at each task, with as many steps as the others have taken
    assert steps["n"] == (6 if name == "joint" else 3) * one


@pytest.mark.parametrize("name", ISOLATED)
def test_earlier_tasks_stay_bit_for_bit(name):
    stream = blobs()
    strategy = learn(name, stream, 1)
    first = logits(strategy, stream)
    for index in (1, 2):
        strategy.fit(index, stream.tasks[index])
        assert same(first, logits(strategy, stream)[:1])
    assert not same(first, [strategy.predict(1, stream.tasks[0].test_x)])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ewc", {"ewc_lambda": 0.0}),
        ("ewc", {"ewc_lambda": 0.0, "online": True}),
        ("si", {"si_c": 0.0}),
        ("lwf", {"lwf_lambda": 0.0}),
    ],
)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_without_strength_it_is_finetuning(name, options, scenario):
    stream = blobs(scenario)
    plain = logits(learn("finetuning", stream), stream)
    assert same(plain, logits(learn(name, stream, **options), stream))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ewc", {"ewc_lambda": 1e6}),
        ("ewc", {"ewc_lambda": 1e6, "online": True, "gamma": 0.9}),
        ("si", {"si_c": 1e6}),
    ],
)
def test_a_strong_penalty_holds_what_is_important(name, options):
    stream = blobs()
    held, free = learn(name, stream, 1, **options), learn("finetuning", stream, 1)
    importance = {n: value.clone() for n, value in held.importance.items()}
    start = {n: p.detach().clone() for n, p in held.shared().items()}
    moved = []
    for strategy in (held, free):
        strategy.fit(1, stream.tasks[1])
        change = {n: p.detach() - start[n] for n, p in strategy.shared().items()}
        moved.append(sum((importance[n] * change[n].square()).sum() for n in change))
    assert moved[0] < 0.1 * moved[1]


def test_fisher_of_a_bias_is_the_variance_of_its_label():
    stream = blobs("domain")
    strategy = learn("ewc", stream, 1, fisher_samples=1000)
    p = strategy.predict(0, stream.tasks[0].train_x).softmax(1)
    expected = (p * (1.0 - p)).mean(0)
    torch.testing.assert_close(strategy.importance["heads.0.bias"], expected)


def test_the_sum_of_two_penalties_is_one_around_their_mean():
    stream = blobs("domain", n_tasks=2)
    strategy = learn("ewc", stream, 1)
    first = {n: (f.clone(), strategy.anchor[n].clone()) for n, f in strategy.importance.items()}
    strategy.fit(1, stream.tasks[1])
    name = "heads.0.weight"
    weight = dict(strategy.network.named_parameters())[name].detach()
    fisher = strategy.importance[name] - first[name][0]
    probe = torch.linspace(-1.0, 1.0, weight.numel()).view_as(weight)
    apart = first[name][0] * (probe - first[name][1]) + fisher * (probe - weight)
    together = strategy.importance[name] * (probe - strategy.anchor[name])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-6)


def test_si_importance_is_not_negative():
    strategy = learn("si", blobs())
    values = torch.cat([value.flatten() for value in strategy.importance.values()])
    assert (values >= 0.0).all() and (values > 0.0).any()


def test_path_integral_is_the_loss_that_the_path_took_away():
    # of a quadratic, -g . step = drop + step . H step / 2 in every step
    curvature = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    loss = lambda: (curvature * weight.square()).sum() / 2.0
    path, optimizer = PathIntegral({"w": weight}), torch.optim.SGD([weight], lr=1e-3)
    start = loss().item()
    for _ in range(2000):
        optimizer.zero_grad()
        loss().backward()
        path.before_step()
        optimizer.step()
        path.after_step()
    drop = start - loss().item()
    # steps are lr * gradient, so what is too much is at most lr * curvature / 2 of it
    total = path.total["w"].sum().item()
    assert drop <= total <= drop * (1.0 + 1e-3 * 4.0)


def test_distillation_loss():
    old, new = torch.zeros(1, 2), torch.tensor([[2.0 * math.log(3.0), 0.0]])
    # at temperature 2: old (1/2, 1/2), new (3/4, 1/4); 4 * KL = 4 * log(4/3) / 2
    expected = 2.0 * math.log(4.0 / 3.0)
    assert distillation_loss(new, old, 2.0).item() == pytest.approx(expected, rel=1e-6)
    assert distillation_loss(new, new, 2.0).item() == pytest.approx(0.0, abs=1e-7)


def test_lwf_keeps_answers_that_finetuning_loses():
    stream = blobs()
    x = stream.tasks[1].train_x  # where it distils
    change = {}
    for name in ("finetuning", "lwf"):
        strategy = learn(name, stream, 1)
        before = strategy.predict(0, x).softmax(1)
        strategy.fit(1, stream.tasks[1])
        change[name] = (strategy.predict(0, x).softmax(1) - before).abs().mean()
    assert change["lwf"] < change["finetuning"]


def test_reservoir_is_uniform():
    counts = torch.zeros(50)
    for seed in range(500):
        memory = Reservoir(10, torch.Generator().manual_seed(seed))
        for rows in torch.arange(50).split(seed % 7 + 1):
            memory.add(rows, -rows)
        kept, negative = memory.columns
        assert len(kept.unique()) == 10 and torch.equal(kept, -negative)
        counts[kept] += 1
    # 500 draws with probability 1/5: five standard deviations around 100
    assert (counts - 100).abs().max() < 5 * math.sqrt(500 * 0.2 * 0.8)


def test_replay_with_room_for_all_keeps_all_and_is_as_good_as_joint():
    stream = blobs("class")
    budget = replace(SMALL, buffer_size=100, epochs=10)
    replay = learn("replay", stream, budget=budget)
    kept = replay.memory.columns[0][: len(replay.memory)]
    assert torch.equal(kept, torch.cat([task.train_x for task in stream.tasks]))
    accuracy = {}
    for name in ("replay", "joint", "finetuning"):
        strategy = make_strategy(name, stream, budget, 0)
        accuracy[name] = run_strategy(strategy, stream).metrics()["avg_accuracy"]
    assert accuracy["replay"] > accuracy["joint"] - 0.15 > accuracy["finetuning"]


@pytest.mark.parametrize(("name", "columns"), [("replay", 8), ("derpp", 10)])
def test_stored_samples_are_counted(name, columns):
    # x has 6 numbers, label and task 1 each, logits 2
    assert learn(name, blobs()).buffer_numbers() == 10 * columns
    assert learn("joint", blobs()).buffer_numbers() == 3 * 24 * 8
    assert learn("finetuning", blobs()).buffer_numbers() == 0


def test_parameters_are_counted():
    stream = blobs()
    backbone, head = (6 + 1) * 12 + (12 + 1) * 12, (12 + 1) * 2
    weights = 6 * 12 + 12 * 12
    adapter = 2 * (12 * 32 + 32 + 32 * 12 + 12)
    plain = backbone + 3 * head
    tucker = 32 * (12 + 6) + 32 * (12 + 12) + 2 * 32 * 32 * 16
    expected = {
        "finetuning": (plain, plain),
        "joint": (plain, plain),
        "separate": (3 * (backbone + head),) * 2,
        "ewc": (plain, plain + 2 * backbone),
        "si": (plain, plain + 2 * backbone),
        "lwf": (plain, plain),
        "replay": (plain, plain),
        "derpp": (plain, plain),
        "packnet": (plain + weights,) * 2,
        "hat": (plain + 3 * 2 * 12, plain + 4 * 2 * 12),
        "lora": (plain + 2 * 16 * (6 + 12 + 12 + 12),) * 2,
        "adapter": (plain + 2 * adapter,) * 2,
        "fcd": (plain - weights + tucker + 3 * 2 * 16,) * 2,
    }
    for name, numbers in expected.items():
        strategy = learn(name, stream)
        assert (strategy.parameters_to_predict(), strategy.parameters_stored()) == numbers, name


def test_dtgma_trains_shared_parameters_with_the_first_task_if_asked():
    stream = blobs()
    shared = lambda strategy: [p.clone() for p in strategy.model.tokens.parameters()]
    random = shared(learn("dtgma", stream, 0))
    assert same(random, shared(learn("dtgma", stream, 1)))
    strategy = learn("dtgma", stream, 1, shared="first_task")
    trained = shared(strategy)
    assert not same(random, trained)
    strategy.fit(1, stream.tasks[1])
    assert same(trained, shared(strategy))


def test_packnet_shares_the_weights():
    strategy = learn("packnet", blobs())
    for owner in strategy.owner.values():
        counts = owner.flatten().bincount(minlength=4).tolist()
        assert counts[0] == 0 and max(counts[1:]) - min(counts[1:]) <= 1
    half = learn("packnet", blobs(), 1, keep=0.5)
    owner = half.owner["blocks.1.weight"]
    weight = dict(half.network.backbone.named_parameters())["blocks.1.weight"]
    assert (owner == 1).sum() == 72 and (weight[owner == 0] == 0.0).all()


def test_hat_formulas():
    # joansj/hat, src/approaches/hat.py, by hand: s_max / s (cosh(s e) + 1) / (cosh(e) + 1)
    e = torch.tensor([1.0, -0.5], dtype=torch.float64)
    factors = [200 * (3.7621956911 + 1) / (1.5430806348 + 1), 200 * 2.5430806348 / 2.1276259652]
    torch.testing.assert_close(
        hat.compensation(e, 2.0, 400.0),
        torch.tensor(factors, dtype=torch.float64),
        rtol=1e-9,
        atol=0,
    )
    assert hat.annealed_slope(0.0, 400.0) == 1.0 / 400.0
    assert hat.annealed_slope(0.5, 400.0) == pytest.approx(200.00125)
    assert hat.annealed_slope(1.0, 400.0) == pytest.approx(400.0)
    gates = torch.tensor([[0.5, 1.0], [0.25, 0.0]])
    used = torch.tensor([[1.0, 0.0], [0.5, 0.0]])
    # (0.5 * 0 + 1 * 1 + 0.25 * 0.5 + 0 * 1) / (0 + 1 + 0.5 + 1)
    assert hat.capacity(gates, used).item() == pytest.approx(1.125 / 2.5)
    first, first_bias, second, second_bias = hat.mobile_parts(used)
    assert first.tolist() == [[0.0], [1.0]] and first_bias.tolist() == [0.0, 1.0]
    # 1 - min(post, pre): rows are units of the second layer, columns those of the first
    assert second.tolist() == [[0.5, 1.0], [1.0, 1.0]]
    assert second_bias.tolist() == [0.5, 1.0]


def test_hat_with_hard_gates_forgets_nothing_and_else_as_much_as_its_gates_are_soft():
    stream = blobs()
    strategy = learn("hat", stream, 1)
    hard = torch.where(strategy.embeddings[0] > 0.0, 6.0, -6.0)
    strategy.embeddings[0].data.copy_(hard)
    strategy.used = torch.sigmoid(strategy.s_max * hard)
    assert set(strategy.used.unique().tolist()) <= {0.0, 1.0}
    before = logits(strategy, stream)
    weights = [p.detach().clone() for p in strategy.network.backbone.parameters()]
    parts = hat.mobile_parts(strategy.used)
    strategy.fit(1, stream.tasks[1])
    assert same(before, logits(strategy, stream)[:1])
    for p, old, part in zip(strategy.network.backbone.parameters(), weights, parts, strict=True):
        fixed = (part == 0.0).expand_as(p)
        assert torch.equal(p[fixed], old[fixed])
    assert strategy.embeddings[1].abs().max() <= 6.0
