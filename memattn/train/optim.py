"""Optimizer and schedule; parameter groups by the role of a parameter."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from memattn.checks import must
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

    Both follow from a parameter's role: only weights decay, memories have ``memory_lr``, LoRA's
    parameters ``lora_lr``, embedding and output layer ``embedding_lr``, and a part may set its own
    rate. Parameters without a role from a part are memories by name, tables if they are an
    embedding of any class, weights if they have at least two axes (such as stacked matrices of
    experts), and else norms. Empty groups are left out.

    Args:
        model: Its parameters with ``requires_grad``.
        config: The rates.

    Returns:
        Groups for the optimizer, the base ones first.
    """
    return [
        _group(params, rate, config.weight_decay * decays)
        for (_, rate, decays), params in _by_rate(model, config).items()
        if params
    ]


def _group(params: list[nn.Parameter], rate: float, weight_decay: float) -> dict[str, Any]:
    return {"params": params, "lr": rate, "weight_decay": weight_decay}


def _by_rate(
    model: nn.Module, config: TrainingConfig
) -> dict[tuple[str, float, bool], list[nn.Parameter]]:
    """Parameters grouped by rate, with the rate and whether they decay."""
    parameter_roles: Any = getattr(model, "parameter_roles", dict)
    roles = parameter_roles()
    tables = table_parameters(model)
    # without a rate of their own they stay in the groups that earlier checkpoints have
    ends = set() if config.embedding_lr is None else _end_parameters(model)
    rates = {
        "base": config.base_model_lr,
        "embedding": config.embedding_lr or config.base_model_lr,
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
            elif parameter in ends:
                whose = "embedding"
            rate = rates[whose]
            if role.learning_rate is not None:
                whose, rate = "own", role.learning_rate
            members.setdefault((whose, rate, role.kind == "weight"), []).append(parameter)
    return members


def _default_role(name: str, parameter: nn.Parameter, tables: set[nn.Parameter]) -> Role:
    """The role of a parameter for which no part defines one."""
    if "persistent" in name:
        return Role("memory")
    if parameter in tables:
        return Role("table")
    return Role("weight" if parameter.dim() >= 2 else "norm")


def table_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters of embeddings of any class."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    tables = (module for module in model.modules() if isinstance(module, kinds))
    return {parameter for table in tables for parameter in table.parameters(recurse=False)}


def _end_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters of a language model's embedding and output layer, where it says which they are."""
    found: set[nn.Parameter] = set()
    for name in ("get_input_embeddings", "get_output_embeddings"):
        layer: nn.Module | None = getattr(model, name, lambda: None)()
        found |= set() if layer is None else set(layer.parameters())
    return found


class MuonAdamW(Optimizer):
    """Muon for the weight matrices and AdamW for the rest, as one optimizer.

    Both are torch's. Muon's step is scaled to the root mean square of AdamW's, so that one learning
    rate suits both. A group's ``"optimizer"`` names the one that it belongs to.

    Source: Jordan et al. (2024), https://kellerjordan.github.io/posts/muon/, and Liu et al. (2025),
    https://arxiv.org/abs/2502.16982, for the scale.

    Args:
        muon_groups: Groups of parameters ``[M, N]``.
        adamw_groups: The other groups.
        lr: Learning rate of groups without their own.
        betas: Decays of AdamW's moments.
    """

    def __init__(
        self,
        muon_groups: list[dict[str, Any]],
        adamw_groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
    ) -> None:
        self._parts: dict[str, Optimizer] = {}
        if muon_groups:
            self._parts["muon"] = Muon(muon_groups, lr=lr, adjust_lr_fn="match_rms_adamw")  # pyright: ignore[reportArgumentType]  # groups are taken too
        if adamw_groups:
            self._parts["adamw"] = AdamW(adamw_groups, lr=lr, betas=betas)
        groups = [
            group | {"optimizer": name}
            for name, part in self._parts.items()
            for group in part.param_groups
        ]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step with each of the two."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, part in self._parts.items():
            # set each time: loading a state replaces groups and state of this optimizer
            part.param_groups = [g for g in self.param_groups if g["optimizer"] == name]
            part.state = self.state
            part.step()
        return loss


def make_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """The configured optimizer, with the groups of ``parameter_groups``.

    ``muon`` updates the matrices between embedding and output layer. Embedding, output layer,
    memories, norms, stacked matrices, LoRA and parameters with their own rate use AdamW.

    Raises:
        NotImplementedError: For Muon with sharded parameters.
    """
    lr, betas = config.base_model_lr, (config.adam_beta1, config.adam_beta2)
    if config.optimizer == "adamw":
        return AdamW(parameter_groups(model, config), lr=lr, betas=betas)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        must("training.optimizer", "be adamw with fsdp", "muon", NotImplementedError)
    outputs = _end_parameters(model)
    muon_groups, adamw_groups = [], []
    for (whose, rate, decays), parameters in _by_rate(model, config).items():
        inner = whose == "base" and decays
        matrices = [x for x in parameters if inner and x.dim() == 2 and x not in outputs]
        others = [x for x in parameters if x not in set(matrices)]
        for members, groups in ((matrices, muon_groups), (others, adamw_groups)):
            if members:
                groups.append(_group(members, rate, config.weight_decay * decays))
    return MuonAdamW(muon_groups, adamw_groups, lr, betas)


def make_scheduler(optimizer: Optimizer, config: TrainingConfig, max_steps: int) -> LRScheduler:
    """The learning-rate schedule over ``max_steps`` optimizer steps."""
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
    """The term that label smoothing adds to the mean cross-entropy of ``labels`` (shifted here).

    ``label_smoothing * mean(logits[label] - mean(logits))``: that share of the target is replaced
    by the uniform distribution. The log-sum-exps cancel, so the term can be added to any loss of
    the model.
    """
    logits, labels = logits[..., :-1, :].float(), labels[..., 1:]
    rows = labels != -100
    picked = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return label_smoothing * (picked - logits.mean(-1))[rows].mean()
