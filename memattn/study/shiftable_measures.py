"""The measures of the study of shiftable attention: losses on both texts, and gates."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor

from memattn.dtgma.inference import nearest_prototype
from memattn.evaluate.batch_loss import Inputs, base_alone, mean_loss
from memattn.files import write_json
from memattn.parts.gate_report import measure_gates
from memattn.train.attached import load_base
from memattn.train.config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    TrainConfig,
    TrainingConfig,
)
from memattn.train.load import load_config
from memattn.train.setup import Corpus, make_batches, prepare_data

PROTOTYPE_ROWS = 64  # of each text


class Specialty(Protocol):
    """Parts of the study that the measures need: its texts, its generalist and its training."""

    @property
    def out(self) -> str: ...

    @property
    def base_path(self) -> str: ...

    @property
    def general(self) -> DataConfig: ...

    @property
    def data(self) -> DataConfig: ...

    @property
    def training(self) -> TrainingConfig: ...

    @property
    def lora(self) -> LoraConfig: ...


def base_losses(study: Specialty) -> dict[str, float]:
    """The losses of the generalist on both texts, measured once."""
    file = Path(study.out) / "base.json"
    about = {"general": asdict(study.general), "data": asdict(study.data)}
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["about"] == about:
            return known["losses"]
    model = load_base(ModelConfig(model_path=study.base_path))
    losses = {
        "val_loss": mean_loss(model, held_out_batches(study, study.data, model)),
        "general_loss": mean_loss(model, held_out_batches(study, study.general, model)),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"about": about, "losses": losses})
    return losses


def measure_run(study: Specialty, config: TrainConfig, model: Any) -> dict[str, float]:
    """The measures of a finished run that the study computes itself, with its model."""
    general = list(held_out_batches(study, study.general, model))
    if config.model.specialists is None:
        return {"general_loss": mean_loss(model, general)}
    special = list(held_out_batches(study, study.data, model))
    forced = lambda batch: base_alone(model, batch)
    found = {
        "general_loss": mean_loss(model, general),
        "forced_gap": mean_loss(model, general, forced) - base_losses(study)["general_loss"],
    }
    choose: Callable[[Inputs], Inputs] = lambda batch: {}
    if Path(config.training.output_dir).parent.name == "prototype":
        prototypes = Prototypes(study, model)
        choose = prototypes.gates
        found["general_loss"] = mean_loss(model, general, choose)
        found["val_loss"] = mean_loss(model, special, choose)
    gates = {
        name: specialists_gate(model, batches, choose)
        for name, batches in (("specialist_gate", special), ("general_gate", general))
    }
    separation = gates["specialist_gate"] - gates["general_gate"]
    return {**found, **gates, "separation": separation}


def held_out_batches(study: Specialty, data: DataConfig, model: Any) -> Iterator[Inputs]:
    """The held-out rows of a text, padded."""
    return _batches(study, data, model, held_out=True)


def _batches(study: Specialty, data: DataConfig, model: Any, *, held_out: bool) -> Iterator[Inputs]:
    config = TrainConfig(
        model=ModelConfig(model_path=study.base_path), data=data, training=study.training
    )
    corpus = _corpus(config.to_yaml())
    tokens = corpus.held_out if held_out else corpus.train
    assert tokens is not None
    batches = make_batches(
        config,
        tokens,
        model=model,
        tokenizer=corpus.tokenizer,
        shuffle=not held_out,
    )
    return batches.one_epoch()


@lru_cache(maxsize=2)
def _corpus(text: str) -> Corpus:
    """The tokens of a configuration, which many runs are measured on."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(text, encoding="utf-8")
        return prepare_data(load_config(file))


@torch.no_grad()
def specialists_gate(model: Any, batches: Any, more: Callable[[Inputs], Inputs]) -> float:
    """The sum of the gates of all specialists, as mean over layers and tokens."""
    total, count = 0.0, 0.0
    for batch in batches:
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        del inputs["labels"]
        given = {**inputs, **more(inputs)}
        for layer in measure_gates(model, given.pop("input_ids"), **given):
            total += float(layer.gates[..., 1:].sum())
            count += float(layer.gates.sum())  # the gates of a token sum to 1
    return total / count


class Prototypes:
    """Infers the text of a row as DTG-MA infers tasks: by the nearer mean of hidden states.

    Args:
        study: The study; prototypes are means over training rows of either text.
        model: A model with one specialist, whose base gives the hidden states.
    """

    tasks = ("base", "specialist")

    def __init__(self, study: Specialty, model: Any) -> None:
        self.model = model
        self.means: dict[int | str, Tensor | None] = {}
        for task, data in zip(self.tasks, (study.general, study.data), strict=True):
            rows: list[Tensor] = []
            for batch in _batches(study, data, model, held_out=False):
                rows.append(self._features(batch))
                if sum(map(len, rows)) >= PROTOTYPE_ROWS:
                    break
            self.means[task] = torch.cat(rows)[:PROTOTYPE_ROWS].mean(0, keepdim=True)

    def gates(self, batch: Inputs) -> Inputs:
        """One-hot gates of each row."""
        chosen = nearest_prototype(self._features(batch), self.means)
        return {"domain_weights": torch.nn.functional.one_hot(chosen, 2).float()}

    @torch.no_grad()
    def _features(self, batch: Inputs) -> Tensor:
        """Mean hidden states of the base over real tokens, ``[B, E]``."""
        inputs = {k: v.to(self.model.device) for k, v in batch.items() if k != "labels"}
        forced = base_alone(self.model, inputs)
        hidden = self.model.model(**inputs, **forced, use_cache=False).last_hidden_state
        present = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[..., None]
        return (hidden * present).sum(1) / present.sum(1)
