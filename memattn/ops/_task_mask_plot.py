"""Drawing of task masks; loads matplotlib."""

# matplotlib's own types are partly unknown
# pyright: reportUnknownMemberType=false

from typing import Protocol

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from torch import Tensor

from memattn.checks import check_int, must

MAX_CELLS = 256  # along each axis of the picture
MAX_NAMED = 10  # tasks in the legend
_COLOURS = tuple(f"C{i}" for i in range(10))


class DrawnMask(Protocol):
    """What the picture needs of a ``TaskMask``."""

    @property
    def n_tasks(self) -> int: ...

    @property
    def n_heads(self) -> int: ...

    @property
    def n_queries(self) -> int: ...

    @property
    def n_keys(self) -> int: ...

    def dense(self, task: int) -> Tensor: ...


def plot_task_mask(mask: DrawnMask, task: int | None, head: int, ax: Axes | None) -> Axes:
    """See ``TaskMask.plot``."""
    check_int("head", head, 0)
    if head >= mask.n_heads:
        must("head", f"be below n_heads={mask.n_heads}", head)
    tasks = range(mask.n_tasks) if task is None else [task]
    shares = torch.stack([_shares(mask.dense(t)[head].cpu()) for t in tasks])  # [tasks, y, x]
    lowest = shares.gt(0).to(torch.int8).argmax(0)
    colours = torch.tensor([to_rgb(_COLOURS[t % len(_COLOURS)]) for t in tasks])
    share = shares.gather(0, lowest[None])[0, ..., None]
    picture = 1 - share * (1 - colours[lowest])
    ax = plt.gca() if ax is None else ax
    extent = (-0.5, mask.n_keys - 0.5, mask.n_queries - 0.5, -0.5)
    ax.imshow(picture.numpy(), extent=extent, interpolation="nearest", aspect="auto")
    ax.set(xlabel="key", ylabel="query")
    if task is None and mask.n_tasks <= MAX_NAMED:
        ax.legend(
            handles=[Patch(color=_COLOURS[t % len(_COLOURS)], label=f"task {t}") for t in tasks],
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            frameon=False,
        )
    elif task is not None:
        ax.set_title(f"task {task}")
    return ax


def _shares(allowed: Tensor) -> Tensor:
    """The share of allowed pairs in each cell of the picture."""
    height, width = (min(n, MAX_CELLS) for n in allowed.shape)
    pooled = torch.nn.functional.adaptive_avg_pool2d(allowed[None, None].float(), (height, width))
    return pooled[0, 0]
