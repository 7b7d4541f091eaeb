"""Strategies: what wrong budgets, options and orders are told."""

import math
from dataclasses import replace

import pytest
from continual_streams import SMALL, blobs

from memattn.continual import Budget, make_strategy


def test_tasks_come_in_order():
    stream = blobs()
    strategy = make_strategy("finetuning", stream, SMALL, 0)
    strategy.fit(0, stream.tasks[0])
    with pytest.raises(ValueError, match="index must be that of the next task, 1, got 0"):
        strategy.fit(0, stream.tasks[0])
    with pytest.raises(ValueError, match="index must be that of one of the 1 tasks learned, got 2"):
        strategy.predict(2, stream.tasks[2].test_x)
    with pytest.raises(ValueError, match="index must be below the number of tasks, 3, got 3"):
        strategy.predict(3, stream.tasks[2].test_x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(epochs=0), "epochs must be at least 1, got 0"),
        (dict(batch_size=3), "batch_size must be at least 4, got 3"),
        (dict(lr=0.0), "lr must be positive and finite, got 0.0"),
        (dict(input_noise=math.inf), "input_noise must be finite and at least 0, got inf"),
        (dict(backbone="cnn"), "backbone must be one of mlp, transformer, got 'cnn'"),
        (dict(hidden_dim=10), "n_heads must divide hidden_dim, 10, got 4"),
    ],
)
def test_names_what_is_wrong_in_a_budget(options, message):
    with pytest.raises(ValueError, match=message):
        Budget(**options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("none", {}, "strategy must be one of joint, separate, finetuning"),
        ("ewc", {"ewc_lambda": -1.0}, "ewc_lambda must be at least 0 and finite, got -1.0"),
        ("ewc", {"gamma": 2.0}, "gamma must be in 0..1, got 2.0"),
        ("si", {"damping": 0.0}, "damping must be above 0, got 0.0"),
        ("lwf", {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ("derpp", {"der_beta": math.inf}, "der_beta must be at least 0 and finite, got inf"),
        ("packnet", {"keep": 1.0}, "keep must be None or between 0 and 1, got 1.0"),
        ("hat", {"s_max": 1.0}, "s_max must be above 1 and finite, got 1.0"),
        ("hat", {"embedding_lr": 0.0}, "embedding_lr must be positive and finite, got 0.0"),
        ("lora", {"rank": 0}, "rank must be at least 1, got 0"),
        ("adapter", {"bottleneck": 0}, "bottleneck must be at least 1, got 0"),
        ("fcd", {"rank": 0}, "rank must be at least 1, got 0"),
        ("fcd", {"vector_size": 0}, "vector_size must be at least 1, got 0"),
        ("fcd", {"vector_lr": 0.0}, "vector_lr must be positive and finite, got 0.0"),
        ("fcd", {"separation": -1.0}, "separation must be at least 0 and finite, got -1.0"),
        ("dtgma", {"shared": "all"}, "shared must be one of frozen, first_task, got 'all'"),
        ("dtgma", {"reads": "some"}, "reads must be one of none, previous, all, got 'some'"),
    ],
)
def test_names_what_is_wrong_in_an_option(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_strategy(name, blobs(), SMALL, 0, options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ewc", {"ewc_lambda": "strong"}, "ewc_lambda must be a number, got 'strong'"),
        ("lora", {"rank": True}, "rank must be a number, got True"),
        ("ewc", {"online": 1}, "online must be True or False"),
        ("packnet", {"keep": "half"}, "keep must be a number, got 'half'"),
    ],
)
def test_names_an_option_of_another_kind(name, options, message):
    with pytest.raises(TypeError, match=message):
        make_strategy(name, blobs(), SMALL, 0, options)


def test_hat_needs_the_mlp():
    with pytest.raises(ValueError, match="budget.backbone must be mlp for strategy 'hat'"):
        make_strategy("hat", blobs(), replace(SMALL, backbone="transformer"), 0)
