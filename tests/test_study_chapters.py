"""The study of chapter memory: equal operations, causal routing, two baselines."""

import csv
from pathlib import Path

import pytest
import torch
from rich.console import Console
from train_factories import write_corpus

from memattn.evaluate import estimate
from memattn.models import PRESETS
from memattn.study import ChaptersCompare, ChaptersStudy, load_study, run_study
from memattn.train import DataConfig, TrainingConfig

CONFIGS = Path(__file__).parent.parent / "configs"
MEMORY = dict(
    num_memory_tokens=16,
    num_chapters=4,
    top_k_chapters=2,
    routing_block_size=4,
    routing_window_size=4,
    wo_init_zero=False,  # else the memory has no say in so few steps
)


def tiny(folder: Path, **changes) -> ChaptersStudy:
    """A study of four models with one seed, whose runs take a second."""
    options = dict(
        out=str(folder / "study"),
        compare=ChaptersCompare(strategies=["token", "rolling"], seeds=[0]),
        sizes=dict(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16
        ),
        memory_options=MEMORY,
        data=DataConfig(
            dataset_name=str(write_corpus(folder / "corpus.jsonl")),
            tokenizer="bytes",
            held_out=0.1,
            seq_len=16,
            cache_dir=str(folder / "cache"),
        ),
        training=TrainingConfig(
            max_steps=3, batch_size=2, warmup_steps=1, save_steps=None, cpu=True
        ),
    )
    return ChaptersStudy(**{**options, **changes})


def test_dense_has_the_operations_of_the_memory_transformer_with_the_most():
    study = ChaptersStudy()
    cells = {cell.name: cell for cell in study.plan(1024)}
    assert list(cells) == ["plain", "dense", "token", "sequence", "rolling"]
    found = {}
    for name, cell in cells.items():
        config = PRESETS[cell.model.preset](vocab_size=1024, **cell.model.options)
        found[name] = estimate(config, study.data.seq_len).flops
        assert cell.counts["flops_per_token"] == round(found[name] / study.data.seq_len)
    most = max(found[name] for name in study.compare.strategies)
    wider = dict(cells["dense"].model.options)
    wider["intermediate_size"] += 1
    unit = estimate(PRESETS["vanilla"](vocab_size=1024, **wider), 128).flops - found["dense"]
    assert abs(found["dense"] - most) <= unit / 2 and found["plain"] < most
    for strategy in study.compare.strategies:
        options = cells[strategy].model.options
        assert options["routing_strategy_train"] == options["routing_strategy_inference"]
        # a window of a whole row would make rolling and sequence one
        assert options["routing_window_size"] < study.data.seq_len


def test_a_study_compares_with_both_baselines_and_writes_a_page(tmp_path):
    page = tmp_path / "docs" / "chapters.md"
    page.parent.mkdir()
    page.write_text("# Old\n\nold numbers\n\n## Reading\n\n- kept\n")
    study = tiny(tmp_path)
    with (tmp_path / "log.txt").open("w") as file:
        report = run_study(study, console=Console(file=file, width=200), page=page, command="X")
    assert report is not None
    with (tmp_path / "study" / "results.csv").open() as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["plain", "dense", "token", "rolling"]
    for row in rows.values():
        for base in ("dense", "plain"):
            minus = float(row["val_loss"]) - float(rows[base]["val_loss"])
            assert float(row[f"val_loss_minus_{base}"]) == pytest.approx(minus, abs=1e-12)
    assert len({row["val_loss"] for row in rows.values()}) == 4
    text = page.read_text()
    assert text.startswith("# Chapter memory against a dense decoder of equal operations\n")
    assert "old numbers" not in text and text.endswith("\n## Reading\n\n- kept\n")
    assert "**Differences to dense**" in text and "**Differences to plain**" in text
    assert f"{float(rows['token']['val_loss_minus_dense']):+.4f}" in text
    assert "Printed by `X`: 4 runs of 3 steps" in text and torch.__version__ in text
    assert "![Losses over the steps](chapters.png)" in text
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_small_configuration_is_the_default_and_described():
    assert load_study("chapters", CONFIGS / "chapters_small.yaml") == ChaptersStudy()
    assert "`chapters_small.yaml`" in (CONFIGS / "README.md").read_text()


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="compare.strategies must have entries of .*, got 'x'"):
        ChaptersCompare(strategies=["x"])
    with pytest.raises(ValueError, match="compare.strategies must .*, got 'bidirectional'"):
        ChaptersCompare(strategies=["bidirectional"])
    with pytest.raises(ValueError, match="compare.seeds must be at least 0, got -1"):
        ChaptersCompare(seeds=[-1])
    with pytest.raises(ValueError, match=r"memory_options.use_chapters must be left to compare"):
        ChaptersStudy(memory_options={"use_chapters": True})
    with pytest.raises(ValueError, match="top_k_chapters"):
        tiny(tmp_path, memory_options={**MEMORY, "top_k_chapters": 5}).plan(259)
    with pytest.raises(ValueError, match="sizes: .*num_chapter"):
        tiny(tmp_path, memory_options={"num_chapter": 5}).plan(259)
