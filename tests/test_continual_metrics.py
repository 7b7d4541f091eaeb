"""continual_metrics: numbers worked out by hand from the formulas of two libraries."""

import math

import pytest
import torch

from memattn.continual import continual_metrics

NAN = math.nan
# above the diagonal only what forward transfer reads
ACCURACY = [
    [0.90, 0.50, NAN, NAN],
    [0.95, 0.80, 0.55, NAN],
    [0.70, 0.85, 0.60, 0.70],
    [0.75, 0.70, 0.50, 0.90],
]
UNTRAINED = [0.50, 0.45, 0.50, 0.50]


def test_the_formulas_of_mammoth_and_avalanche():
    got = continual_metrics(torch.tensor(ACCURACY, dtype=torch.float64), torch.tensor(UNTRAINED))
    expected = {
        "avg_accuracy": (0.75 + 0.70 + 0.50 + 0.90) / 4,
        "learning_accuracy": (0.90 + 0.80 + 0.60 + 0.90) / 4,
        # Mammoth, utils/metrics.py: forgetting
        "avg_forgetting": ((0.95 - 0.75) + (0.85 - 0.70) + (0.60 - 0.50)) / 3,
        # Avalanche, evaluation/metrics/forgetting_bwt.py: first value minus last value
        "avg_forgetting_from_first": ((0.90 - 0.75) + (0.80 - 0.70) + (0.60 - 0.50)) / 3,
        # Mammoth: backward_transfer
        "backward_transfer": ((0.75 - 0.90) + (0.70 - 0.80) + (0.50 - 0.60)) / 3,
        # Mammoth: forward_transfer
        "forward_transfer": ((0.50 - 0.45) + (0.55 - 0.50) + (0.70 - 0.50)) / 3,
    }
    assert got == pytest.approx(expected, abs=1e-7)  # UNTRAINED is float32


def test_a_task_that_ends_better_than_ever_has_negative_forgetting():
    accuracy = torch.tensor([[0.6, NAN], [0.8, 0.9]])
    got = continual_metrics(accuracy)
    assert got["avg_forgetting"] == pytest.approx(-0.2)
    assert "forward_transfer" not in got


def test_what_a_task_got_before_it_was_learned_is_not_forgotten():
    accuracy = torch.tensor([[0.9, 0.8, 0.1], [0.9, 0.7, 0.1], [0.9, 0.7, 0.9]])
    assert continual_metrics(accuracy)["avg_forgetting"] == 0.0


def test_one_task():
    got = continual_metrics(torch.tensor([[0.7]]), torch.tensor([0.5]))
    assert got["avg_accuracy"] == pytest.approx(0.7)
    for name in ("avg_forgetting", "avg_forgetting_from_first", "backward_transfer"):
        assert got[name] == 0.0
    assert got["forward_transfer"] == 0.0


@pytest.mark.parametrize(
    ("accuracy", "untrained", "message"),
    [
        (torch.zeros(2, 3), None, r"accuracy must have shape \[n=2, m=2\], got \[2, 3\]"),
        (torch.zeros(0, 0), None, "accuracy must have at least one task"),
        (torch.tensor([[1.0, NAN], [NAN, 1.0]]), None, "accuracy must be in 0..1 .* got nan"),
        (torch.tensor([[97.0]]), None, "accuracy must be in 0..1 where it is read, got 97"),
        (torch.tensor([[1.0, NAN], [1.0, 1.0]]), torch.ones(2), "accuracy must be in 0..1"),
        (torch.ones(2, 2), torch.ones(3), r"untrained must have shape \[n=2\], got \[3\]"),
        (torch.ones(2, 2), torch.tensor([1.0, NAN]), "untrained must be in 0..1"),
        (torch.ones(2, 2, dtype=torch.int64), None, "accuracy must have dtype"),
    ],
)
def test_names_what_is_wrong(accuracy, untrained, message):
    with pytest.raises(ValueError, match=message):
        continual_metrics(accuracy, untrained)
