"""The study of Titans: equal parameters and windows, tasks at two lengths, one page of all."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from train_factories import write_corpus

from memattn.data.tasks import MultiQueryRecall, draw_sample
from memattn.evaluate import recall
from memattn.evaluate.recall import reach_of
from memattn.models import PRESETS, MemAttnForCausalLM
from memattn.study import TitansCompare, TitansPart, TitansStudy, load_study, run_study
from memattn.study.titans import VANILLA, WITHOUT
from memattn.train import DataConfig, ModelConfig, TrainConfig, TrainingConfig
from memattn.train.config import TaskConfig
from memattn.train.setup import make_batches, prepare_data, run_tokenizer

CONFIGS = Path(__file__).parent.parent / "configs"
TRAINING = TrainingConfig(max_steps=3, batch_size=2, warmup_steps=1, save_steps=None, cpu=True)


def tiny(folder: Path, **changes) -> TitansStudy:
    """A study of three parts, whose runs take a second."""
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40)
    common: dict[str, Any] = dict(
        models=[VANILLA, "lmm"],
        window_size=4,
        sizes=sizes,
        memory=dict(chunk_size=4, memory_expansion=1),
        training=TRAINING,
    )

    def on(seq_len: int, **data) -> TitansPart:
        cache = str(folder / "cache")
        data = {"seq_len": seq_len, "held_out": 0.1, "cache_dir": cache, "packed": False, **data}
        return TitansPart(**common, data=DataConfig(**data))

    corpus = str(write_corpus(folder / "corpus.jsonl"))
    recall_task = TaskConfig(name="recall", options={"vocab_size": 9, "num_pairs": 2}, samples=20)
    needle_task = TaskConfig(name="needle", options={"needle": "word"}, samples=10)
    options = dict(
        out=str(folder / "study"),
        compare=TitansCompare(parts=["recall", "text"], longer=2, samples=3, seeds=[0]),
        recall=on(16, task=recall_task),
        needle=on(40, task=needle_task, vocab_size=600),
        text=on(8, dataset_name=corpus, tokenizer="bytes", packed=True),
    )
    return TitansStudy(**{**options, **changes})


def test_all_models_have_the_parameters_and_the_window_of_the_variant():
    study = TitansStudy()
    for name, part in study.parts().items():
        config: TitansPart = getattr(study, name)
        cells = {cell.name: cell for cell in part.plan(300)}
        assert list(cells) == config.models
        reaches = set()
        for cell in cells.values():
            assert cell.model.preset is not None
            made = PRESETS[cell.model.preset](vocab_size=300, **cell.model.options)
            with torch.device("meta"):
                model = MemAttnForCausalLM(made)
            count = sum(parameter.numel() for parameter in model.parameters())
            # a wider MLP by one is three rows a layer
            unit = 3 * made.hidden_size * made.num_hidden_layers
            assert abs(count - cells["lmm"].counts["parameters"]) <= unit / 2
            assert cell.counts["parameters"] == count
            if cell.name != VANILLA:
                for field, value in WITHOUT.get(cell.name, {}).items():
                    assert getattr(made.attention, field) == value
            reaches.add(reach_of(model))
        assert reaches == {config.window_size * config.sizes["num_hidden_layers"]}
        assert cells["lmm"].model.options["intermediate_size"] == 96


def test_every_part_is_measured_and_all_stand_on_one_page(tmp_path):
    page = tmp_path / "docs" / "titans.md"
    page.parent.mkdir()
    page.write_text("# Old\n\nold numbers\n\n## Reading\n\n- kept\n")
    study = tiny(tmp_path)
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        console = Console(file=file, width=200)
        assert run_study(study, console=console, command="X", max_minutes=1e-6) is None
        report = run_study(study, console=console, page=page, command="X")
    assert report == tmp_path / "study" / "results.md"
    found = {}
    for name, columns in (
        ("recall", ["accuracy", "accuracy_longer"]),
        ("text", ["loss_from_0", "loss_from_4", "loss_from_8"]),
    ):
        with (tmp_path / "study" / name / "results.csv").open() as file:
            rows = {row["variant"]: row for row in csv.DictReader(file)}
        assert list(rows) == [VANILLA, "lmm"] and all(
            row[c] for row in rows.values() for c in columns
        )
        found[name] = rows
    # the accuracy is that of the trained model at both lengths
    model = MemAttnForCausalLM.from_pretrained(tmp_path / "study/recall/lmm/seed-0/model")
    task = MultiQueryRecall(vocab_size=9, num_pairs=2)
    cells = recall(model, task, lengths=[16, 32], samples=3, batch_size=2).cells
    own = found["recall"]["lmm"]
    assert [float(own["accuracy"]), float(own["accuracy_longer"])] == [c.accuracy for c in cells]
    text = page.read_text()
    assert "old numbers" not in text and text.endswith("\n## Reading\n\n- kept\n")
    for name, heading in (("recall", "Multi-query"), ("text", "Text")):
        assert f"\n## {heading}" in text and f"![Losses over the steps](titans_{name}.png)" in text
        assert page.with_name(f"titans_{name}.png").read_bytes().startswith(b"\x89PNG")
    share = sum(draw_sample(task, 32, None, 0, i).distance > 4 for i in range(3)) / 3
    assert f"and in {share:.0%} of those of 32, the" in text
    assert "from the task recall with vocab_size 9, num_pairs 2 (288 tokens to train on" in text
    saved = json.loads((tmp_path / "study" / "recall" / "results.json").read_text())
    assert saved["config"]["data"]["task"]["name"] == "recall"


def test_a_task_is_trained_on_by_its_answers_alone_and_kept(tmp_path):
    data = tiny(tmp_path).recall.data
    config = TrainConfig(model=ModelConfig(preset="vanilla"), data=data, training=TRAINING)
    corpus = prepare_data(config)
    assert corpus.held_out is not None
    assert (corpus.train.num_documents, corpus.held_out.num_documents) == (18, 2)
    drawn = corpus.train.ids.view(18, 16).tolist()
    assert not any(ids in drawn for ids in corpus.held_out.ids.view(2, 16).tolist())
    seen = [
        draw_sample(MultiQueryRecall(vocab_size=9, num_pairs=2), 16, None, 0, i) for i in range(18)
    ]
    assert not any(sample.ids in drawn for sample in seen)  # those of an evaluation are others
    for packed in (False, True):  # padded and packed rows have the same targets
        model = MemAttnForCausalLM(
            PRESETS["vanilla"](
                vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
            )
        )
        rows = make_batches(
            replace(config, data=replace(data, packed=packed)),
            corpus.train,
            model=model,
            tokenizer=corpus.tokenizer,
            shuffle=False,
            rank=0,
            world_size=1,
        )
        labels = next(rows)["labels"]
        assert int((labels != -100).sum()) == 2 * 2
    again = prepare_data(config)
    assert again.fingerprint == corpus.fingerprint
    # kept samples that the task would not draw any more are drawn again
    (kept,) = [f for f in (tmp_path / "cache/tokens").glob("*/*") if f.stat().st_size > 1500]
    kept.write_bytes(b"damaged")
    assert prepare_data(config).fingerprint == corpus.fingerprint


def test_a_task_of_words_has_a_tokenizer_of_its_own(tmp_path):
    data = tiny(tmp_path).needle.data
    config = TrainConfig(model=ModelConfig(preset="vanilla"), data=data, training=TRAINING)
    corpus = prepare_data(config)
    assert 259 < len(corpus.tokenizer) <= 600
    assert corpus.train.trained is not None
    # a word that is asked for is one token, after all others
    assert corpus.train.trained.view(9, 40).sum(0).tolist() == [0] * 39 + [9]
    assert len(run_tokenizer(config)) == len(corpus.tokenizer)


def test_the_small_configuration_is_the_default_and_described():
    assert load_study("titans", CONFIGS / "titans_study_small.yaml") == TitansStudy()
    gpu = load_study("titans", CONFIGS / "titans_study_gpu.yaml")
    assert isinstance(gpu, TitansStudy)
    assert len(gpu.parts()["recall"].plan(4096)) == 10
    readme = (CONFIGS / "README.md").read_text()
    assert "`titans_study_small.yaml`" in readme and "`titans_study_gpu.yaml`" in readme


def test_bad_input_is_named(tmp_path):
    study = tiny(tmp_path)
    with pytest.raises(ValueError, match="compare.parts must have entries of .*, got 'x'"):
        TitansCompare(parts=["x"])
    with pytest.raises(ValueError, match="compare.variant must be one of .*, got 'x'"):
        TitansCompare(variant="x")
    with pytest.raises(ValueError, match="^models must have entries of .*, got 'x'"):
        TitansPart(models=["x"])
    with pytest.raises(ValueError, match="memory.variant must be left to the study"):
        TitansPart(memory={"variant": "mag"})
    with pytest.raises(ValueError, match="recall.models must have vanilla"):
        tiny(tmp_path, recall=replace(study.recall, models=["lmm"]))
    with pytest.raises(ValueError, match="needle.data.task must be given"):
        tiny(tmp_path, needle=study.text)
    with pytest.raises(ValueError, match="text.data.task must be null, got recall"):
        tiny(tmp_path, text=study.recall)
    with pytest.raises(ValueError, match="data.task.name must be one of needle, .*, got 'x'"):
        TaskConfig(name="x")
    with pytest.raises(ValueError, match="data.dataset_name must be left out with data.task"):
        DataConfig(task=TaskConfig(), dataset_name="foldoc")
    wrong = replace(study.recall.data, task=TaskConfig(options={"num_pair": 2}))
    with pytest.raises(ValueError, match="data.task.options: .*num_pair"):
        prepare_data(TrainConfig(model=ModelConfig(preset="vanilla"), data=wrong))
