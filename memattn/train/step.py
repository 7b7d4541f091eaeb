"""The losses of one optimizer step and of one held-out epoch, weighted by targets."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy

from memattn.checks import must
from memattn.data.batches import IGNORE, Batch, Batches
from memattn.models import MemAttnForCausalLM
from memattn.train.distributed import reshard, without_sync
from memattn.train.optim import smoothing_loss


@dataclass(frozen=True)
class Counts:
    """Counts of one step over all processes."""

    targets: int
    tokens: int
    interrupted: bool
    late: bool


def count_batches(
    accelerator: Accelerator, micro: list[Batch], *, interrupted: bool, late: bool
) -> Counts:
    """Targets and tokens of the step, and whether any process must stop."""
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
        ``loss``, ``lm_loss`` if the model reports it, and the losses of its parts, over all
        processes, all weighted by the targets of the batches.

    Raises:
        ValueError: If the loss depends on no trainable parameter.
    """
    own = accelerator.unwrap_model(model)
    names = part_losses(own)
    # only the smoothing needs logits
    skips = isinstance(own, MemAttnForCausalLM) and not label_smoothing
    options = {"skip_logits": True} if skips else {}
    total = torch.zeros(2 + len(names), device=accelerator.device)
    has_lm_loss = False
    for i, batch in enumerate(micro):
        last = i == len(micro) - 1
        with nullcontext() if last else without_sync(accelerator, model):
            output, loss = _loss(model, batch, accelerator.device, label_smoothing, options)
            if not loss.requires_grad:
                has = "have weights that learn and count (of specialists, a prior above 0)"
                must("model", has, "a loss that depends on none")
            share = _num_targets(batch) / num_targets
            loss = loss * share
            # gradients are averaged over processes, but the loss is a sum over them
            accelerator.backward(loss * accelerator.num_processes)
        lm_loss = getattr(output, "lm_loss", None)
        has_lm_loss = lm_loss is not None
        total[0] += loss.detach()
        if share:
            if lm_loss is not None:
                total[1] += lm_loss.detach() * share
            for j, name in enumerate(names, 2):
                total[j] += output.losses[name].detach() * share
    loss, lm_loss, *parts = _sum_over_processes(accelerator, total).tolist()
    own_loss = {"lm_loss": lm_loss} if has_lm_loss else {}
    return {"loss": loss, **own_loss, **dict(zip(names, parts, strict=True))}


def part_losses(model: Any) -> tuple[str, ...]:
    """Names of the losses of a model's parts."""
    attached = getattr(model, "losses", None)
    return tuple(getattr(model.config, "losses", ()) if attached is None else attached)


@torch.no_grad()
def held_out_losses(
    accelerator: Accelerator, model: Any, batches: Batches, max_batches: int | None = None
) -> dict[str, float]:
    """Means over the targets of one epoch, or of its first batches.

    Returns:
        ``eval_loss``, the cross-entropy without smoothing or other losses, and ``eval_<name>`` for
        each loss of a part, over the batches that have this loss.
    """
    model.eval()
    names = part_losses(accelerator.unwrap_model(model))
    options = {"output_losses": True} if names else {}
    # of the cross-entropy and of each part: sum over targets, and number of targets
    total = torch.zeros(1 + len(names), 2, dtype=torch.float64, device=accelerator.device)
    for batch in islice(batches.one_epoch(), max_batches):
        inputs = {name: value.to(accelerator.device) for name, value in batch.items()}
        labels = inputs.pop("labels")[:, 1:]
        output = model(**inputs, **options, use_cache=False)
        logits = output.logits[:, :-1]
        losses = cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        count = (labels != IGNORE).sum().double()
        total[0] += torch.stack([losses.double(), count])
        for j, name in enumerate(names, 1):
            measured = count * (output.loss_counts[name] > 0)
            total[j] += torch.stack([output.losses[name].double() * measured, measured])
    reshard(model)
    (loss, count), *parts = _sum_over_processes(accelerator, total).tolist()
    means = {"eval_loss": loss / count if count else math.nan}
    return means | {
        f"eval_{name}": mean / n for name, (mean, n) in zip(names, parts, strict=True) if n
    }


def _num_targets(batch: Batch) -> int:
    """Number of targets of a batch; the first label of a row is never one."""
    return int((batch["labels"] != IGNORE).sum())


def _loss(
    model: Any,
    batch: Batch,
    device: torch.device,
    label_smoothing: float,
    options: dict[str, bool],
) -> tuple[Any, Tensor]:
    """The model's output for a batch, and the mean loss over its targets."""
    inputs = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    if _num_targets(batch) == 0:
        output = model(**inputs, use_cache=False)
        return output, output.logits.sum() * 0.0  # the mean over no targets is NaN
    output = model(**inputs, **options, use_cache=False)
    if label_smoothing:
        smoothing = smoothing_loss(output.logits, inputs["labels"], label_smoothing)
        return output, output.loss + smoothing
    return output, output.loss


def _sum_over_processes(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    reduced = accelerator.reduce(tensor, "sum")
    assert isinstance(reduced, Tensor)
    return reduced
