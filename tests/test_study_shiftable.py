"""The study of shiftable attention: a generalist first, specialists beside it, and their peers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_train_mixture import write_general
from train_factories import write_corpus

from memattn.evaluate.batch_loss import mean_loss
from memattn.study import (
    Cell,
    Generalist,
    ShiftableCompare,
    ShiftableStudy,
    Teaching,
    load_study,
    run_study,
)
from memattn.study.shiftable_measures import base_losses, held_out_batches
from memattn.train import DataConfig, TrainingConfig, load_config
from memattn.train.attached import load_model_folder
from memattn.train.config import LoraConfig

pytest.importorskip("peft")
CONFIGS = Path(__file__).parent.parent / "configs"


def tiny(folder: Path, **changes) -> ShiftableStudy:
    """A study with one seed, whose runs take a second."""
    text = dict(held_out=0.2, seq_len=32, packed=False, cache_dir=str(folder / "cache"))
    training = dict(batch_size=4, warmup_steps=1, save_steps=None, cpu=True)
    general = write_general(folder)
    special = write_corpus(folder / "special.jsonl")
    options = dict(
        out=str(folder / "study"),
        compare=ShiftableCompare(
            seeds=[0],
            systems=["lora", "specialists", "prototype", "xlora"],
            specialists=[2],
            scopes=["prefix"],
            taught=["token"],
            unmixed=[],
        ),
        teaching=Teaching(gate_rows=8),
        base=Generalist(
            sizes=dict(
                hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
            ),
            vocab_size=300,
            training=TrainingConfig(max_steps=3, base_model_lr=1e-2, **training),
        ),
        lora=LoraConfig(rank=4, alpha=8),
        general=DataConfig(dataset_name=general, **text),
        data=DataConfig(dataset_name=str(special), mix_in=general, **text),
        training=TrainingConfig(max_steps=4, base_model_lr=2e-2, **training),
    )
    return ShiftableStudy(**{**options, **changes})


def test_specialists_learn_beside_a_generalist_that_stays(tmp_path):
    config = tiny(tmp_path)
    with (tmp_path / "log.txt").open("w+") as file:
        assert run_study(config, console=Console(file=file, width=250)) is not None
        file.seek(0)
        text = file.read()
    out = tmp_path / "study"
    assert text.startswith("first base, seed 0\nbase: 0 trainable parameters, ")
    models = {m["name"]: m for m in json.loads((out / "results.json").read_text())["models"]}
    gated = ["specialists-2-prefix", "specialists-1-token-taught", "prototype"]
    assert list(models) == ["base", "lora", *gated, "xlora"]
    base = dict(load_model_folder(out / "base" / "model").named_parameters())
    for name in gated:
        losses = {k: v["mean"] for k, v in models[name]["losses"].items()}
        assert losses["forced_gap"] == 0.0  # the generalist answers as before
        gap = losses["specialist_gate"] - losses["general_gate"]
        assert losses["separation"] == pytest.approx(gap, abs=1e-9)
        model = load_model_folder(out / name / "seed-0" / "model")
        own = dict(model.named_parameters())
        assert all(own[n].equal(base[n]) for n in base)
        trained = sum(p.numel() for n, p in own.items() if n not in base)
        assert models[name]["trainable_parameters"] == trained
        general = mean_loss(model, held_out_batches(config, config.general, model))
        if name != "prototype":
            assert losses["general_loss"] == pytest.approx(general, abs=1e-9)
    # texts of one word each, and of tales: prototypes tell them apart
    losses = {k: v["mean"] for k, v in models["prototype"]["losses"].items()}
    assert losses["specialist_gate"] == 1.0 and losses["general_gate"] == 0.0
    assert losses["general_loss"] == pytest.approx(base_losses(config)["general_loss"], abs=1e-6)
    # so does a gate that was taught, though the specialist had four steps
    assert models["specialists-1-token-taught"]["losses"]["separation"]["mean"] > 0.8
    taught = load_config(out / "specialists-1-token-taught" / "seed-0" / "config.yaml")
    assert taught.training.gate_rows == 8 and taught.data.mix_weight == 10.0
    assert taught.model.specialists["domain_coefficient"] == 0.1
    assert "Gates" in text and "gate separation" in text
    assert models["xlora"]["losses"]["val_loss"]["mean"] != models["lora"]["losses"]["val_loss"]


def test_unmixed_cells_are_the_same_without_the_general_text(tmp_path):
    study = tiny(tmp_path, compare=ShiftableCompare(seeds=[0], unmixed=["full", "specialists"]))
    models = study.models()
    assert models["full-unmixed"] == models["full"]
    assert models["specialists-1-token-unmixed"] == models["specialists-1-token"]
    for mixed in (True, False):
        cell = Cell(name="full", model=models["full"], labels={"mixed": mixed, "taught": False})
        assert study.run_config(cell, 0).data == replace(
            study.data, mix_in=study.data.mix_in if mixed else None
        )


def test_bad_input_is_named(tmp_path):
    study = tiny(tmp_path)
    for changes, message in (
        (dict(data=replace(study.data, mix_in=None)), "data.mix_in must be the general text"),
        (
            dict(general=replace(study.general, held_out=0.3)),
            "general.held_out must be above 0 and",
        ),
        (dict(general=replace(study.general, split_seed=1)), "general.split_seed must be that of"),
        (dict(data=replace(study.data, packed=True)), "data.packed must be false"),
        (dict(general=replace(study.general, vocab_size=300)), "general.vocab_size must be null"),
        (dict(specialists={"prior": 2.0}), "specialists.prior must be left to the study, got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(study, **changes)
    with pytest.raises(ValueError, match="compare.systems must have lora"):
        ShiftableCompare(systems=["specialists"])
    with pytest.raises(ValueError, match="compare.unmixed must have entries of lora, specialists"):
        ShiftableCompare(systems=["lora", "specialists"], unmixed=["full"])


def test_the_shipped_file_is_the_default():
    assert load_study("shiftable", CONFIGS / "shiftable_study_small.yaml") == ShiftableStudy()
    assert torch.is_grad_enabled()
