"""The loss of prepared batches, optionally with given gates of specialists."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from memattn.data.batches import IGNORE

Inputs = dict[str, Tensor]


@torch.no_grad()
def mean_loss(
    model: Any, batches: Any, more: Callable[[Inputs], Inputs] = lambda batch: {}
) -> float:
    """Cross-entropy of all targets; ``more`` gives further inputs of the model for a batch."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs, **more(inputs), use_cache=False).logits[:, :-1]
        total += cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum"
        ).item()
        count += int((labels != IGNORE).sum())
    return total / count


def base_alone(model: Any, batch: Inputs) -> Inputs:
    """Gates of 1 for the base in every row."""
    rows = batch["input_ids"].shape[0]
    weights = torch.zeros(rows, 1 + num_specialists(model), device=model.device)
    weights[:, 0] = 1.0
    return {"domain_weights": weights}


def num_specialists(model: Any) -> int:
    """Specialists of a model, the same in all of its layers."""
    (part,) = (part for part in model.config.parts if part.kind == "specialists")
    return part.num_specialists
