"""Inference of the task of a sample, by class means or by entropy."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from memattn.checks import check_shape, check_tensor, must
from memattn.dtgma.columns import TaskName


@torch.no_grad()
def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Means of features ``[n, F]`` by class, ``[classes, F]``; NaN for a class without samples."""
    check_tensor("y", labels)
    if labels.dtype != torch.int64:
        must("y", "have dtype torch.int64", labels.dtype)
    check_shape("y", labels, n=features.shape[0])
    if labels.device != features.device:
        must("y", f"be on the device of x, {features.device}", labels.device)
    if labels.numel() == 0:
        must("y", "have at least one label", 0)
    low, high = (int(label) for label in labels.aminmax())
    if low < 0 or high >= num_classes:
        must("y", f"be from 0 to classes - 1 = {num_classes - 1}", f"labels from {low} to {high}")
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    return sums / torch.bincount(labels, minlength=num_classes)[:, None]


@torch.no_grad()
def nearest_prototype(features: Tensor, prototypes: Mapping[TaskName, Tensor | None]) -> Tensor:
    """The place of the task that has the nearest prototype, int64 ``[B]``.

    Args:
        features: ``[B, F]``.
        prototypes: Class means ``[classes, F]`` of each task; NaN for a class without samples.

    Raises:
        ValueError: If a task has no prototypes, or they have another number of features.
    """
    nearest: list[Tensor] = []
    for task, means in prototypes.items():
        if means is None:
            must("method", f"not be 'prototype' while task {task!r} has none", "'prototype'")
        known = means[~means.isnan().any(1)]
        if features.shape[1] != known.shape[1]:
            wanted = f"give the {known.shape[1]} features of the prototypes of task {task!r}"
            must("x", wanted, features.shape[1])
        nearest.append(torch.cdist(features, known).amin(1))
    return torch.stack(nearest).argmin(0)


@torch.no_grad()
def lowest_entropy(logits: Sequence[Tensor]) -> Tensor:
    """The place of the task whose classifier is the most certain, int64 ``[B]``.

    The entropy is divided by that of a uniform guess, so that tasks of few classes are not
    preferred; a task of one class is never uncertain and counts as uniform.

    Args:
        logits: ``[B, classes]`` of each task.
    """
    entropies: list[Tensor] = []
    for own in logits:
        log_probs = own.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        classes = log_probs.shape[-1]
        uniform = math.log(classes)
        entropies.append(entropy / uniform if classes > 1 else torch.ones_like(entropy))
    return torch.stack(entropies).argmin(0)
