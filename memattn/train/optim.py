"""Optimizer and schedule: parameter groups by what a parameter is."""

from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from memattn.nn import FutureTable
from memattn.train.config import TrainingConfig

_MEMORY = ("memory", "persistent")


def is_memory_parameter(name: str) -> bool:
    """Whether a parameter belongs to a memory: a part of its name says so."""
    return any(word in part for part in name.split(".") for word in _MEMORY)


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and weight decay.

    Memory parameters have ``memory_lr``. Weights of two axes or more, such as the stacked matrices
    of experts, decay; norms, biases, embeddings and tables of learned tokens do not. Empty groups
    are left out.

    Args:
        model: Its parameters with ``requires_grad``.
        config: The rates.

    Returns:
        Groups for AdamW, the base ones first.
    """
    tables = table_parameters(model)
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {
        (memory, decays): [] for memory in (False, True) for decays in (True, False)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() >= 2 and parameter not in tables and "persistent" not in name
            members[is_memory_parameter(name), decays].append(parameter)
    rates = {False: config.base_model_lr, True: config.memory_lr or config.base_model_lr}
    return [
        {"params": params, "lr": rates[memory], "weight_decay": config.weight_decay * decays}
        for (memory, decays), params in members.items()
        if params
    ]


def table_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Embeddings of any class, and tables of learned keys: rows that are looked up."""
    kinds = (nn.Embedding, nn.EmbeddingBag, FutureTable)
    tables = (module for module in model.modules() if isinstance(module, kinds))
    return {parameter for table in tables for parameter in table.parameters(recurse=False)}


def make_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """AdamW over ``parameter_groups``."""
    betas = (config.adam_beta1, config.adam_beta2)
    return AdamW(parameter_groups(model, config), lr=config.base_model_lr, betas=betas)


def make_scheduler(optimizer: Optimizer, config: TrainingConfig) -> LRScheduler:
    """The schedule of all groups, one step of it for one of the optimizer."""
    from transformers import get_scheduler

    name = config.lr_scheduler
    if name == "constant":
        name = "constant_with_warmup"
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.max_steps,
    )


def smoothing_loss(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float):
    """What label smoothing adds to the mean cross-entropy of ``labels``, shifted inside.

    ``label_smoothing * mean(logits[label] - mean(logits))``: cross-entropy with the uniform
    distribution in place of that share of the target. The log-sum-exps cancel, so that the loss
    of the model, with whatever it adds to it, stays as it is.
    """
    logits, labels = logits[..., :-1, :].float(), labels[..., 1:]
    rows = labels != -100
    picked = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return label_smoothing * (picked - logits.mean(-1))[rows].mean()
