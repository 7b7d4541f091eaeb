"""Metrics of continual learning, from the matrix of accuracies."""

import torch
from torch import Tensor

from memattn.checks import check_floating, check_shape, check_tensor, must


def continual_metrics(accuracy: Tensor, untrained: Tensor | None = None) -> dict[str, float]:
    """Average accuracy, forgetting by both conventions, and transfer.

    With ``a[i, j]`` the accuracy on task ``j`` after training on task ``i`` of ``n`` tasks:

    - ``avg_accuracy``: mean of the last row.
    - ``learning_accuracy``: mean of the diagonal, each task just after it was learned.
    - ``avg_forgetting``: mean over the first ``n - 1`` tasks of the best ``a[i, j]`` with
      ``j <= i < n - 1``, minus ``a[n-1, j]``. Negative where a task ends better than it ever was.
    - ``avg_forgetting_from_first``: mean over the first ``n - 1`` tasks of ``a[j, j] - a[n-1, j]``.
    - ``backward_transfer``: mean over the first ``n - 1`` tasks of ``a[n-1, j] - a[j, j]``.
    - ``forward_transfer``: mean over ``j >= 1`` of ``a[j-1, j] - untrained[j]``; only with
      ``untrained``.

    With one task, forgetting and transfer are 0.

    Args:
        accuracy: ``[n, n]``, any floating dtype, values in 0..1. Entries above the diagonal may be
            NaN where they were not measured; without ``untrained`` they are not read.
        untrained: Accuracy on each task before any training, ``[n]``, or None.

    Returns:
        The metrics by name, as Python floats.

    Raises:
        TypeError: If an argument is no tensor.
        ValueError: If a shape is wrong, ``n`` is 0, or an entry that is needed is not in 0..1.

    Note:
        Computed in float64. Sources: Lopez-Paz and Ranzato (2017), https://arxiv.org/abs/1706.08840,
        equations 2 to 4, and Chaudhry et al. (2018), https://arxiv.org/abs/1801.10112, section 3.
        ``avg_forgetting_from_first`` is the forgetting of the library Avalanche. The library
        Mammoth also counts the last row among the earlier ones, so that its forgetting of a task is
        never below 0.
    """
    check_tensor("accuracy", accuracy)
    check_floating("accuracy", accuracy)
    n = accuracy.shape[0] if accuracy.dim() else 0
    check_shape("accuracy", accuracy, n=n, m=n)
    if n == 0:
        must("accuracy", "have at least one task", "shape [0, 0]")
    a = accuracy.detach().to("cpu", torch.float64)
    learned = torch.ones(n, n, dtype=torch.bool).tril()
    _check_measured("accuracy", a[learned])
    diagonal, last = a.diagonal(), a[-1]
    before, first, final = a[: n - 1, : n - 1], diagonal[: n - 1], last[: n - 1]
    best = before.masked_fill(~learned[: n - 1, : n - 1], -1.0).max(0).values if n > 1 else first
    metrics = {
        "avg_accuracy": last.mean(),
        "learning_accuracy": diagonal.mean(),
        "avg_forgetting": _mean(best - final),
        "avg_forgetting_from_first": _mean(first - final),
        "backward_transfer": _mean(final - first),
    }
    if untrained is not None:
        check_tensor("untrained", untrained)
        check_floating("untrained", untrained)
        check_shape("untrained", untrained, n=n)
        start = untrained.detach().to("cpu", torch.float64)
        _check_measured("untrained", start)
        ahead = a.diagonal(1)  # task j after training on task j-1
        _check_measured("accuracy", ahead)
        metrics["forward_transfer"] = _mean(ahead - start[1:])
    return {name: float(value) for name, value in metrics.items()}


def _check_measured(name: str, values: Tensor) -> None:
    wrong = values[~((values >= 0.0) & (values <= 1.0))]
    if len(wrong):
        must(name, "be in 0..1 where it is read", wrong[0].item())


def _mean(values: Tensor) -> Tensor:
    """The mean, 0 where there is nothing, and never -0."""
    return values.mean() + 0.0 if len(values) else torch.zeros(())
