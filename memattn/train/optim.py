"""Optimizer and schedule: parameter groups by what a parameter is."""

from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from memattn.parts import Role
from memattn.train.config import TrainingConfig

_MEMORY = ("memory", "persistent")


def is_memory_parameter(name: str) -> bool:
    """Whether a parameter belongs to a memory: a part of its name says so."""
    return any(word in part for part in name.split(".") for word in _MEMORY)


def is_lora_parameter(name: str) -> bool:
    """Whether a parameter is one that PEFT's LoRA adds."""
    return any(part.startswith("lora_") for part in name.split("."))


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and weight decay.

    Both follow from a parameter's role: only a weight decays, a memory has ``memory_lr``, what
    LoRA adds has ``lora_lr``, and a part may give a role a rate of its own. Parameters that no part
    speaks for are memories by name, tables where they are rows of an embedding of any class,
    weights where they have two axes or more, such as the stacked matrices of experts, and else
    norms. Empty groups are left out.

    Args:
        model: Its parameters with ``requires_grad``.
        config: The rates.

    Returns:
        Groups for AdamW, the base ones first.
    """
    parameter_roles: Any = getattr(model, "parameter_roles", dict)
    roles = parameter_roles()
    tables = table_parameters(model)
    rates = {
        "base": config.base_model_lr,
        "memory": config.memory_lr or config.base_model_lr,
        "lora": config.lora_lr or config.base_model_lr,
    }
    members: dict[tuple[str, float, bool], list[nn.Parameter]] = {
        (*rate, decays): [] for rate in rates.items() for decays in (True, False)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            role = roles.get(name) or _default_role(name, parameter, tables)
            whose = "base"
            if is_lora_parameter(name):
                whose = "lora"
            elif role.kind == "memory" or is_memory_parameter(name):
                whose = "memory"
            rate = rates[whose]
            if role.learning_rate is not None:
                whose, rate = "own", role.learning_rate
            members.setdefault((whose, rate, role.kind == "weight"), []).append(parameter)
    return [
        {"params": params, "lr": rate, "weight_decay": config.weight_decay * decays}
        for (_, rate, decays), params in members.items()
        if params
    ]


def _default_role(name: str, parameter: nn.Parameter, tables: set[nn.Parameter]) -> Role:
    """The role of a parameter that no part speaks for."""
    if "persistent" in name:
        return Role("memory")
    if parameter in tables:
        return Role("table")
    return Role("weight" if parameter.dim() >= 2 else "norm")


def table_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Embeddings of any class: rows that are looked up."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    tables = (module for module in model.modules() if isinstance(module, kinds))
    return {parameter for table in tables for parameter in table.parameters(recurse=False)}


def make_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """AdamW over ``parameter_groups``."""
    betas = (config.adam_beta1, config.adam_beta2)
    return AdamW(parameter_groups(model, config), lr=config.base_model_lr, betas=betas)


def make_scheduler(optimizer: Optimizer, config: TrainingConfig, max_steps: int) -> LRScheduler:
    """The schedule of all groups over so many steps, one of it for one of the optimizer."""
    from transformers import get_scheduler

    name = config.lr_scheduler
    if name == "constant":
        name = "constant_with_warmup"
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=max_steps,
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
