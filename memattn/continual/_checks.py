"""Argument checks that training and strategies share."""

import math
from typing import Any

import torch

from memattn.checks import check_int, must

_SEED_BITS = 40  # the seed of a task is a product that torch's generators must still take


def check_seed(name: str, seed: Any) -> None:
    """Raise unless ``seed`` is an integer from 0 to below 2**40."""
    check_int(name, seed, 0)
    if seed >= 2**_SEED_BITS:
        must(name, f"be below 2**{_SEED_BITS}", seed)


def check_device(name: str, device: torch.device | str) -> None:
    """Raise ValueError unless tensors can be made on the device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ValueError(f"{name} must be cpu, or a GPU that is here, got {device}") from error


def check_loss(what: str, loss: float, epoch: int, lr: float) -> None:
    """Raise FloatingPointError unless a loss is finite; ``epoch`` counts from 0."""
    if not math.isfinite(loss):
        where = f"in epoch {epoch + 1} with lr={lr}"
        must(what, f"be finite {where}", loss, FloatingPointError)
