"""The losses of one optimizer step and of one held-out epoch, each batch by its targets."""

import inspect
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy

from memattn.data.batches import IGNORE, Batch, Batches
from memattn.train.distributed import reshard, without_sync
from memattn.train.metrics import LOSS_PARTS
from memattn.train.optim import smoothing_loss


@dataclass(frozen=True)
class Counts:
    """Of one step, over all processes."""

    targets: int
    tokens: int
    interrupted: bool
    late: bool


def count_batches(
    accelerator: Accelerator, micro: list[Batch], *, interrupted: bool, late: bool
) -> Counts:
    """Targets and tokens of the step, and whether any process has a reason to stop."""
    targets = sum(map(_num_targets, micro))
    tokens = sum(int(b.get("attention_mask", torch.ones_like(b["input_ids"])).sum()) for b in micro)
    own = torch.tensor([targets, tokens, int(interrupted), int(late)], device=accelerator.device)
    targets, tokens, interrupts, lates = _sum_over_processes(accelerator, own).tolist()
    return Counts(max(targets, 1), tokens, interrupted=interrupts > 0, late=lates > 0)


def accumulate_gradients(
    accelerator: Accelerator,
    model: Any,
    micro: list[Batch],
    num_targets: int,
    label_smoothing: float,
) -> dict[str, float]:
    """Accumulate gradients of the mean over all targets.

    Args:
        accelerator: The process group.
        model: The model, in training mode.
        micro: Batches of this process for one optimizer step.
        num_targets: Targets of all batches of all processes.
        label_smoothing: Share of each target that is spread over the vocabulary.

    Returns:
        ``loss``, and those of ``LOSS_PARTS`` that the model reports, over all processes. Each
        batch counts by its targets in all of them, so that a part is what the loss has of it.
    """
    total = torch.zeros(1 + len(LOSS_PARTS), device=accelerator.device)
    reported: list[str] = []
    for i, batch in enumerate(micro):
        last = i == len(micro) - 1
        with nullcontext() if last else without_sync(accelerator, model):
            output, loss = _loss(model, batch, accelerator.device, label_smoothing)
            share = _num_targets(batch) / num_targets
            loss = loss * share
            # gradients are averaged over processes, the loss is their sum
            accelerator.backward(loss * accelerator.num_processes)
        reported = [name for name in LOSS_PARTS if getattr(output, name, None) is not None]
        total[0] += loss.detach()
        if share:
            for j, name in enumerate(reported, 1):
                total[j] += getattr(output, name).detach() * share
    loss, *parts = _sum_over_processes(accelerator, total).tolist()
    return {"loss": loss, **dict(zip(reported, parts, strict=False))}


@torch.no_grad()
def held_out_losses(accelerator: Accelerator, model: Any, batches: Batches) -> dict[str, float]:
    """Means over the targets of one epoch.

    Returns:
        ``eval_loss``, the cross-entropy without smoothing or other losses, and
        ``eval_future_loss`` where there is a loss of future attention. Batches without a position
        that has such a loss are left out of it.
    """
    model.eval()
    options = {}
    if "output_future_loss" in inspect.signature(_class_of(accelerator, model).forward).parameters:
        options["output_future_loss"] = True
    total = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    for batch in batches.one_epoch():
        inputs = {name: value.to(accelerator.device) for name, value in batch.items()}
        labels = inputs.pop("labels")[:, 1:]
        output = model(**inputs, **options, use_cache=False)
        logits = output.logits[:, :-1]
        losses = cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        count = (labels != IGNORE).sum().double()
        future_loss = getattr(output, "future_loss", None)
        future = (losses.new_zeros(()) if future_loss is None else future_loss).double()
        measured = count * (future != 0.0)  # exactly 0: the mean over no position
        total += torch.stack([losses.double(), count, future * measured, measured])
    reshard(model)
    loss, count, future, measured = _sum_over_processes(accelerator, total).tolist()
    means = {"eval_loss": loss / count if count else math.nan}
    if measured:
        means["eval_future_loss"] = future / measured
    return means


def _class_of(accelerator: Accelerator, model: Any) -> Any:
    """The class of the model inside what accelerate put around it."""
    return type(accelerator.unwrap_model(model))


def _num_targets(batch: Batch) -> int:
    """Targets of a batch, whose first label in a row is always left out."""
    return int((batch["labels"] != IGNORE).sum())


def _loss(
    model: Any, batch: Batch, device: torch.device, label_smoothing: float
) -> tuple[Any, Tensor]:
    """What the model returns for a batch, and the mean loss over its targets."""
    inputs = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    output = model(**inputs, use_cache=False)
    if _num_targets(batch) == 0:
        return output, output.logits.sum() * 0.0  # the mean over nothing is NaN
    if label_smoothing:
        smoothing = smoothing_loss(output.logits, inputs["labels"], label_smoothing)
        return output, output.loss + smoothing
    return output, output.loss


def _sum_over_processes(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    reduced = accelerator.reduce(tensor, "sum")
    assert isinstance(reduced, Tensor)
    return reduced
