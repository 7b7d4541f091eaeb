"""Small streams for the tests of continual learning."""

import torch

from memattn.continual import Budget, Stream, Task
from memattn.data.streams import Scenario

SMALL = Budget(epochs=4, batch_size=8, lr=2e-2, hidden_dim=12, n_layers=2, buffer_size=10)


def blobs(scenario: Scenario = "task", n_tasks: int = 3, n: int = 24, seed: int = 0) -> Stream:
    """Tasks of two classes, clouds on opposite sides of the origin in six dimensions."""
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for i in range(n_tasks):
        centre = torch.nn.functional.normalize(torch.randn(6, generator=generator), dim=0)
        centres = 2.0 * torch.stack([centre, -centre])
        y = torch.arange(n + n // 2) % 2
        x = centres[y] + 0.5 * torch.randn(len(y), 6, generator=generator)
        names = ("a", "b") if scenario == "domain" else (f"a{i}", f"b{i}")
        tasks.append(Task(f"blobs {i}", x[:n], y[:n], x[n:], y[n:], names))
    return Stream("blobs", scenario, tuple(tasks))
