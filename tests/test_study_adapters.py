"""The study of adapters: a base model first, equal trainable parameters, what is retained."""

import csv
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from train_factories import write_corpus

from memattn.study import AdaptersCompare, AdaptersStudy, BaseModel, load_study, run_study
from memattn.study import run as study_run
from memattn.train import DataConfig, TrainingConfig
from memattn.train.attached import load_attached
from memattn.train.config import LoraConfig

pytest.importorskip("peft")
CONFIGS = Path(__file__).parent.parent / "configs"


def tiny(folder: Path, **changes) -> AdaptersStudy:
    """A study of three adapters with one seed, whose runs take a second."""
    text = dict(held_out=0.1, seq_len=32, packed=False, cache_dir=str(folder / "cache"))
    training = dict(batch_size=2, warmup_steps=1, save_steps=None, cpu=True)
    general = write_corpus(folder / "general.jsonl", documents=30, words=60)
    special = write_corpus(folder / "special.jsonl")
    options = dict(
        out=str(folder / "study"),
        compare=AdaptersCompare(seeds=[0]),
        base=BaseModel(
            sizes=dict(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
                max_position_embeddings=32,
                tie_word_embeddings=True,
            ),
            vocab_size=300,
            training=TrainingConfig(max_steps=3, base_model_lr=1e-2, **training),
        ),
        lora=LoraConfig(rank=16, alpha=32),
        memory=dict(
            use_chapters=True,
            num_chapters=4,
            top_k_chapters=2,
            routing_strategy_train="token",
            routing_strategy_inference="token",
            use_low_rank_memory=True,
            low_rank_mode="reduced_dim",
            memory_rank=4,
        ),
        general=DataConfig(dataset_name=str(general), **text),
        data=DataConfig(dataset_name=str(special), **text),
        training=TrainingConfig(max_steps=6, base_model_lr=2e-2, **training),
    )
    return AdaptersStudy(**{**options, **changes})


def study(config: AdaptersStudy, folder: Path) -> str:
    """Run a study and return what it printed."""
    with (folder / "log.txt").open("w+") as file:
        assert run_study(config, console=Console(file=file, width=250)) is not None
        file.seek(0)
        return file.read()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished study: its configuration, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("adapters")
    config = tiny(folder)
    return config, folder, study(config, folder)


def test_adapters_learn_beside_a_frozen_base_at_equal_trainable_parameters(whole):
    config, folder, text = whole
    out = folder / "study"
    assert text.startswith("first base, seed 0\nbase: 0 trainable parameters, ")
    assert "run 3 of 3: both, seed 0, " in text
    models = {m["name"]: m for m in json.loads((out / "results.json").read_text())["models"]}
    assert list(models) == ["base", "lora", "memory", "both"]
    assert models["both"]["lora_rank"] == 8 and models["both"]["lora"]["alpha"] == 16
    target = models["lora"]["trainable_parameters"]
    assert target == 2 * 2 * 16 * (16 + 16)  # layers, matrices, rank, features of both sides
    for name in ("memory", "both"):
        step = 4 * 4  # one more token in each of four chapters of four features
        assert abs(models[name]["trainable_parameters"] - target) <= step / 2
    base = load_base_weights(out / "base" / "model")
    for name in ("lora", "memory", "both"):
        model = load_attached(out / name / "seed-0" / "model")
        own = dict(model.named_parameters())
        trained = sum(p.numel() for p in own.values() if p.requires_grad)
        assert trained == models[name]["trainable_parameters"]
        kept = [n for n in base if n in own and torch.equal(own[n], base[n])]
        assert len(kept) >= len(base) - 4  # PEFT renames the matrices that it works in
        before, after = (models[m]["losses"]["val_loss"]["mean"] for m in ("base", name))
        assert after != before


def load_base_weights(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def test_retention_is_the_general_loss_before_and_after(whole):
    config, folder, _ = whole
    out = folder / "study"
    before = json.loads((out / "base.json").read_text())["losses"]
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["lora", "memory", "both"]
    for row in rows:
        run = config.run_config(
            next(cell for cell in config.plan(300) if cell.name == row["variant"]), 0
        )
        assert float(row["general_loss"]) == config.measure(run)["general_loss"]
        minus = float(row["val_loss"]) - before["val_loss"]
        assert float(row["val_loss_minus_base"]) == pytest.approx(minus, abs=1e-12)
    report = (out / "results.md").read_text()
    gap = float(rows[1]["general_loss"]) - before["general_loss"]
    assert "**Differences to base**" in report and f"| {gap:+.4f} |" in report
    assert "peft " in report and "transformers " in report


def test_a_finished_study_trains_and_measures_nothing_again(whole, monkeypatch):
    config, folder, _ = whole
    before = (folder / "study" / "results.csv").read_text()
    monkeypatch.setattr(study_run, "train", None)  # would raise TypeError
    monkeypatch.setattr(AdaptersStudy, "measure", None)
    monkeypatch.setattr(AdaptersStudy, "_held_out_loss", None)
    study(config, folder)
    assert (folder / "study" / "results.csv").read_text() == before


def test_a_given_checkpoint_takes_the_place_of_the_base(whole, tmp_path):
    config, folder, _ = whole
    given = BaseModel(model_path=str(folder / "study" / "base" / "model"))
    other = tiny(tmp_path, base=given)
    assert other.first_run() is None
    cells = {cell.name: cell for cell in other.plan(300)}
    assert cells["lora"].model.model_path == given.model_path
    counts = {cell.name: cell.counts for cell in config.plan(300)}
    assert cells["memory"].counts == counts["memory"]


def test_the_small_configuration_is_the_default_and_described():
    assert load_study("adapters", CONFIGS / "adapters_small.yaml") == AdaptersStudy()
    assert "`adapters_small.yaml`" in (CONFIGS / "README.md").read_text()


def test_bad_input_is_named(whole, tmp_path):
    with pytest.raises(ValueError, match="compare.adapters must have lora, which the others are"):
        AdaptersCompare(adapters=["memory"])
    with pytest.raises(ValueError, match="compare.adapters must have entries of lora, memory, bo"):
        AdaptersCompare(adapters=["lora", "x"])
    with pytest.raises(ValueError, match="memory.num_memory_tokens must be left to the study, got"):
        AdaptersStudy(memory={"num_memory_tokens": 4})
    with pytest.raises(ValueError, match="data.tokenizer must be null: the tokenizer is that of"):
        AdaptersStudy(data=DataConfig(tokenizer="bytes"))
    with pytest.raises(ValueError, match="general.held_out must be above 0 for a study, got 0.0"):
        AdaptersStudy(general=DataConfig(held_out=0.0))
    with pytest.raises(ValueError, match="base.architecture must be a model_type of .*, got 'x'"):
        tiny(tmp_path, base=BaseModel(architecture="x")).first_run()
    config, folder, _ = whole
    given = BaseModel(model_path=str(folder / "study" / "base" / "model"))
    small = tiny(tmp_path, base=given, lora=LoraConfig(rank=1))
    with pytest.raises(ValueError, match="lora.rank must leave memory room for a memory at 128 tr"):
        small.plan(300)
