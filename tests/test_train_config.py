"""Configurations: the same as dataclasses and as YAML, and one line on what is wrong."""

import dataclasses
import re
from pathlib import Path

import pytest
from train_factories import tiny_config

from memattn.cli import main
from memattn.models import PRESETS
from memattn.train import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    TrainConfig,
    TrainingConfig,
    load_config,
)
from memattn.train.metrics import COLUMNS, MetricsLog, read_metrics

CONFIGS = Path(__file__).parents[1] / "configs"
SECTIONS = {"model": ModelConfig, "data": DataConfig, "training": TrainingConfig}


# those of studies are for another command
RUNS = [path for path in sorted(CONFIGS.glob("*.yaml")) if "\ncompare:" not in path.read_text()]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_each_shipped_file_makes_a_model(path):
    config = load_config(path)
    if config.model.preset is not None:
        size = config.data.vocab_size or 4096
        PRESETS[config.model.preset](**{"vocab_size": size, **config.model.options})
    assert config.training.output_dir == f"runs/{path.stem}"
    assert f"`{path.name}`" in (CONFIGS / "README.md").read_text()


def test_the_readme_describes_every_field_with_its_default():
    sections = re.split(r"^## ", (CONFIGS / "README.md").read_text(), flags=re.M)
    for name, section in SECTIONS.items():
        (text,) = (text for text in sections if text.startswith(f"`{name}`"))
        rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", text, flags=re.M))
        fields = {
            field.name: field.default_factory()
            if callable(field.default_factory)
            else field.default
            for field in dataclasses.fields(section)
        }
        shown = {None: "null", True: "true", False: "false"}
        assert rows == {
            field: shown[value] if value is None or isinstance(value, bool) else str(value)
            for field, value in fields.items()
        }


def test_yaml_is_the_dataclasses_written_down(tmp_path):
    data = {"dataset_name": ["a.txt", "b.txt"], "document_separator": "\n\n"}
    config = tiny_config(tmp_path, data=data, max_grad_norm=None, base_model_lr=1e-4)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {max_stepz: 3}", "does not accept option 'max_stepz'"),
        ("training: {max_steps: many}", 'training.max_steps".* Expected a .*int.*many'),
        ("training: {max_steps: 0}", "training.max_steps must be at least 1, got 0"),
        ("training: {max_epochs: 0}", "training.max_epochs must be at least 1, got 0"),
        ("training: {eval_batch_size: 0}", "training.eval_batch_size must be at least 1, got 0"),
        ("training: {eval_batches: 0}", "training.eval_batches must be at least 1, got 0"),
        ("training: {label_smoothing: 1.0}", r"training.label_smoothing must be in \[0, 1\), got"),
        ("training: {memory_lr: -1.0}", "training.memory_lr must be positive and finite, got -1.0"),
        ("training: {weight_decay: -0.1}", "training.weight_decay must be at least 0 and finite"),
        ("training: {lora_lr: 0.0}", "training.lora_lr must be positive and finite, got 0.0"),
        ("training: {num_gpus: 0}", "training.num_gpus must be at least 1, got 0"),
        (
            "training: {training_mode: chat}",
            "training.training_mode must be one of pretraining, instruction_finetuning, got chat",
        ),
        ("training: {mixed_precision: fp8}", "mixed_precision must be one of no, fp16, bf16, got"),
        ("training: {output_dir: ''}", "training.output_dir must not be empty, got ''"),
        ("data: {held_out: 1.5}", r"data.held_out must be in \[0, 1\), got 1.5"),
        ("data: {dataset_name: ''}", "data.dataset_name must not be empty, got ''"),
        ("data: {vocab_size: 300, tokenizer: bytes}", "vocab_size must be None with tokenizer byt"),
        (
            "model: {preset: vanilla, model_path: x}",
            "model must have exactly one of preset .*, got both",
        ),
        ("model: {preset: null}", "model must have exactly one of preset and .*, got neither"),
        ("training: [1", "Problems parsing config"),
    ],
)
def test_names_what_is_wrong_in_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text if text.startswith("model") else f"model: {{preset: vanilla}}\n{text}")
    with pytest.raises(ValueError, match=message) as error:
        load_config(path)
    assert "\n" not in str(error.value)
    assert main(["train", "--config", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config must be a file that exists, got .*no.yaml"):
        load_config(tmp_path / "no.yaml")
    assert main(["train", "--config", str(tmp_path / "no.yaml")]) == 2


def test_options_that_do_not_fit_together():
    with pytest.raises(ValueError, match="model.lora must be null without model_path, got LoraC"):
        ModelConfig(preset="vanilla", lora=LoraConfig())
    with pytest.raises(ValueError, match="freeze_base_model must be false without memory_adapter"):
        ModelConfig(model_path="x", freeze_base_model=True)
    with pytest.raises(ValueError, match="freeze_base_model must be false without model_path, got"):
        ModelConfig(preset="vanilla", freeze_base_model=True)
    with pytest.raises(ValueError, match="model.lora.targets must not be empty"):
        LoraConfig(targets=[])
    with pytest.raises(ValueError, match="model.options must be empty with model_path, got"):
        ModelConfig(model_path="x", options={"hidden_size": 3})
    with pytest.raises(TypeError, match="training.cpu must be True or False, got str"):
        TrainingConfig(cpu="yes")
    assert TrainConfig(model=ModelConfig(preset="vanilla")).data == DataConfig()


def test_metrics_take_back_rows_after_a_step_and_half_rows(tmp_path):
    log = MetricsLog(tmp_path, step=0, active=True)
    for step in (1, 2, 3):
        log.write(step=step, tokens=10 * step, loss=1 / step, learning_rate=0.1 + 0.2)
    log.write(step=3, tokens=30, eval_loss=0.25)
    log.close()
    path = tmp_path / "metrics.csv"
    before = path.read_text()
    path.write_text(before + "4,40,0.")
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 3] and tuple(rows[0]) == COLUMNS
    assert rows[2]["loss"] == 1 / 3 and rows[0]["learning_rate"] == 0.1 + 0.2
    assert rows[3]["loss"] is None and rows[3]["eval_loss"] == 0.25
    MetricsLog(tmp_path, step=3, active=True).close()
    assert path.read_text() == before
    MetricsLog(tmp_path, step=1, active=True).close()
    assert read_metrics(path) == rows[:1]
    MetricsLog(tmp_path / "other", step=0, active=False).write(step=1)
    assert not (tmp_path / "other").exists()


def test_metrics_names_damage(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="metrics must have columns step,tokens,.*, got .*metrics"):
        read_metrics(path)
    path.write_text(",".join(COLUMNS) + "\n1,x,,,,,,\n")
    with pytest.raises(ValueError, match="metrics must be numbers, got .*metrics.csv"):
        read_metrics(path)
