"""Train a DTG-MA model on tasks that come one after the other."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from memattn.models.dtgma import DTGMAModel

_READS = ("none", "previous", "all")


def train_continual(
    model: "DTGMAModel",
    tasks: Any,
    epochs: int = 100,
    batch_size: int = 64,
    lr: float = 1e-3,
    *,
    device: torch.device | str | None = None,
    verbose: bool = False,
    freeze_after_training: bool = True,
    reads: str = "none",
    seed: int = 0,
) -> dict[str, Any]:
    """Train on one task after the other."""
    data = _as_dict(tasks)
    names = list(data)
    started = time.perf_counter()
    if device is not None:
        model.to(device)
    generator = torch.Generator().manual_seed(seed)
    accuracy = torch.full((len(names), len(names)), torch.nan, dtype=torch.float64)
    for i, name in enumerate(names):
        x, y, _, _ = data[name]
        if name not in model.tasks:
            earlier = {"none": [], "previous": names[max(i - 1, 0) : i], "all": names[:i]}[reads]
            with _seeded(seed + i):
                model.register_task(name, reads=earlier)
        _train_task(model, name, x, y, epochs, batch_size, lr, generator)
        if freeze_after_training:
            model.freeze_task(name)
        for j in range(i + 1):
            accuracy[i, j] = evaluate_task(model, names[j], *data[names[j]][2:])
    return {
        "accuracy_matrix": accuracy,
        "avg_accuracy": accuracy[-1].mean().item(),
        "time": time.perf_counter() - started,
    }


def _train_task(model, name, x, y, epochs, batch_size, lr, generator) -> None:
    optimizer = torch.optim.Adam(model.trainable_parameters(name), lr=lr)
    steps = epochs * -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            loss = F.cross_entropy(model(x[rows], name), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def evaluate_task(model, name, x, y, batch_size: int = 1024) -> float:
    model.eval()
    right = sum(
        int((model(a, name).argmax(-1) == b).sum())
        for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True)
    )
    return right / len(y)


def _as_dict(tasks):
    return tasks


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
