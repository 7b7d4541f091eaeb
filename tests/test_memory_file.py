"""Files with the sections model, memory and training: their mapping, and what is wrong in them."""

import dataclasses
import json
from pathlib import Path

import pytest

from memattn.cli import main
from memattn.models import PRESETS
from memattn.parts.chapter_memory import ChapterMemoryConfig
from memattn.train import LoraConfig, load_config, train
from memattn.train.memory_file import FileModel, FileTraining
from memattn.train.metrics import read_metrics
from memattn.yaml_text import load_yaml

ROOT = Path(__file__).parents[1]
NAMES = (
    *("base_small", "base_medium", "adapter_qwen_1.5b", "adapter_comparison", "test_small"),
    "mixture_of_chapters",
)
# the fields and defaults that the plan of the memory transformer lists
MODEL = dict(
    hidden_dim=768,
    num_heads=12,
    num_layers=12,
    intermediate_dim=3072,
    vocab_size=32000,
    max_seq_len=2048,
    use_rope=True,
    base_model_name=None,
    freeze_base_model=True,
)
PART = dict(
    num_memory_tokens=1024,
    memory_dim=None,
    memory_layer_placement="all",
    memory_layer_k=5,
    memory_layer_n=3,
    memory_layer_custom=None,
    memory_sharing="shared",
    memory_sharing_k=2,
    use_low_rank_memory=False,
    memory_rank=64,
    low_rank_mode="factorized",
    use_low_rank_projections=False,
    projection_rank=64,
    memory_block_variant="A",
    use_chapters=False,
    num_chapters=100,
    tokens_per_chapter=None,
    top_k_chapters=20,
    routing_strategy_train="sequence",
    routing_strategy_inference="sequence",
    use_load_balance_loss=True,
    load_balance_coefficient=0.01,
    use_z_loss=False,
    z_loss_coefficient=0.001,
    quantize_memory=False,
    memory_quant_bits=8,
    wo_init_zero=True,
    vanilla_mode=False,
)
LORA = dict(use_lora=False, lora_rank=16, lora_alpha=32, lora_targets=None)
SWITCHES = dict(use_memory_adapter=True, use_both_memory_and_lora=False)
TRAINING = dict(
    memory_lr=1e-4,
    lora_lr=1e-4,
    base_model_lr=1e-5,
    training_mode="instruction_finetuning",
    dataset_name="HuggingFaceH4/ultrachat_200k",
    dataset_subset=None,
    dataset_split="train",
    text_field="text",
    distributed_strategy="ddp",
    num_gpus=1,
    batch_size=4,
    gradient_accumulation_steps=4,
    max_steps=10000,
    warmup_steps=100,
    weight_decay=0.01,
    max_grad_norm=1.0,
    gradient_checkpointing=True,
    save_steps=500,
    eval_steps=500,
)


def defaults(kind, names):
    return {f.name: f.default for f in dataclasses.fields(kind) if f.name in names}


def load(tmp_path, text):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    return load_config(path)


def test_defaults_are_those_of_the_plan():
    assert defaults(FileModel, MODEL) == MODEL
    assert defaults(ChapterMemoryConfig, PART) == PART
    assert defaults(FileTraining, TRAINING) == TRAINING
    assert {f.name for f in dataclasses.fields(FileTraining)} == TRAINING.keys()
    assert (LoraConfig().rank, LoraConfig().alpha) == (LORA["lora_rank"], LORA["lora_alpha"])


@pytest.mark.parametrize("name", NAMES)
def test_each_shipped_file_writes_every_field_down(name):
    values = load_yaml((ROOT / "configs" / f"{name}.yaml").read_text())
    assert MODEL.keys() <= values["model"].keys()
    assert PART.keys() | LORA.keys() | SWITCHES.keys() <= values["memory"].keys()
    assert TRAINING.keys() <= values["training"].keys()
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert config.training.num_gpus == values["training"]["num_gpus"]
    assert config.data.seq_len == values["model"]["max_seq_len"]
    if config.model.preset is not None:
        model = PRESETS[config.model.preset](**config.model.options)
        assert model.hidden_size == values["model"]["hidden_dim"]
        assert (
            model.named_parts()["chapter_memory"].num_chapters == values["memory"]["num_chapters"]
        )


def test_the_adapter_file_has_the_defaults_of_the_plan():
    values = load_yaml((ROOT / "configs" / "adapter_qwen_1.5b.yaml").read_text())
    assert values["model"] == MODEL | {"base_model_name": "Qwen/Qwen2.5-1.5B"}
    assert values["memory"] == PART | LORA | SWITCHES | {"lora_targets": ["q_proj", "v_proj"]}
    assert values["training"] == TRAINING | {"output_dir": "runs/adapter_qwen_1.5b"}


def test_a_model_with_new_weights(tmp_path):
    config = load(
        tmp_path,
        "model: {hidden_dim: 64, num_heads: 2, use_rope: false, options: {rms_norm_eps: 1e-5}}\n"
        "memory: {use_chapters: true, num_chapters: 4, top_k_chapters: 2, num_memory_tokens: 8}\n"
        "training: {dataset_name: wiki, dataset_split: train, seed: 5, memory_lr: 3e-4}\n"
        "data: {held_out: 0.2}\n",
    )
    assert config.model.preset == "memory_transformer"
    model = PRESETS["memory_transformer"](**config.model.options)
    assert (model.hidden_size, model.num_attention_heads, model.num_hidden_layers) == (64, 2, 12)
    assert (model.vocab_size, model.intermediate_size, model.rms_norm_eps) == (32000, 3072, 1e-5)
    assert (model.position_embedding, model.max_position_embeddings) == ("learned", 2048)
    assert model.named_parts()["chapter_memory"].num_chapters == 4
    assert config.data.vocab_size == 32000 and config.data.packed and config.data.held_out == 0.2
    assert (config.data.dataset_name, config.data.dataset_split) == ("wiki", None)
    assert (config.training.seed, config.training.memory_lr) == (5, 3e-4)
    assert config.training.base_model_lr == TRAINING["base_model_lr"]
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("memory", "has_memory", "has_lora"),
    [
        ("{}", True, False),
        ("{use_lora: true, lora_rank: 3, lora_targets: [o_proj]}", True, True),
        ("{use_lora: true, use_memory_adapter: false}", False, True),
        ("{use_both_memory_and_lora: true, use_memory_adapter: false}", True, True),
        ("{use_lora: true, vanilla_mode: true}", False, True),
    ],
)
def test_a_memory_inside_a_pretrained_model(tmp_path, memory, has_memory, has_lora):
    config = load(tmp_path, f"model: {{base_model_name: owner/name}}\nmemory: {memory}\n")
    assert (config.model.model_path, config.model.preset) == ("owner/name", None)
    assert config.model.freeze_base_model and not config.data.packed
    assert (config.model.memory_adapter is not None) == has_memory
    assert (config.model.lora is not None) == has_lora
    if config.model.memory_adapter is not None:
        assert config.model.memory_adapter["kind"] == "chapter_memory"
    if "o_proj" in memory:
        assert config.model.lora == LoraConfig(rank=3, alpha=32, targets=["o_proj"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {hiden_dim: 3}\nmemory: {}",
            r"model.hiden_dim must be one of the fields hidden_dim",
        ),
        ("memory: {num_chapter: 3}", r"memory.num_chapter must be one of .*num_chapters.*, got 3"),
        ("memory: {}\ntraining: {lr: 1}", r"training.lr must be one of .*memory_lr, .*, got 1"),
        ("memory: {}\ndata: {seq: 1}", r"data.seq must be one of the fields .*seq_len.*, got 1"),
        ("model: {hidden_dim: big}", "model.hidden_dim must be an integer, got str"),
        ("model: {use_rope: 1}", "model.use_rope must be True or False, got int"),
        ("memory: {use_lora: 1}", "memory.use_lora must be True or False, got int"),
        ("memory: {use_lora: true}", "memory.use_lora must be false without model.base_model_name"),
        (
            "memory: {use_memory_adapter: false}",
            "memory.use_memory_adapter must be true without mo",
        ),
        ("memory: {memory_layer_placement: some}", "memory.memory_layer_placement must be one of"),
        (
            "memory: {use_chapters: true, num_memory_tokens: 10, num_chapters: 3}",
            "memory.num_memory_tokens must be divisible by num_chapters=3, got 10",
        ),
        (
            "memory: {use_chapters: true, num_memory_tokens: 8, num_chapters: 4}",
            "memory.top_k_chapters must be at most .* = 4, got 20",
        ),
        (
            "model: {base_model_name: a/b}\nmemory: {use_lora: true, lora_rank: 0}",
            "memory.lora_rank must be at least 1, got 0",
        ),
        (
            "memory: {}\ntraining: {training_mode: chat}",
            "training.training_mode must be one of pretraining, instruction_finetuning, got chat",
        ),
        (
            "memory: {}\ntraining: {dataset_name: a}\ndata: {dataset_name: b}",
            "data.dataset_name must be given in one of training and data, got 'b'",
        ),
        ("memory: 3", "memory must be a section with fields, got 3"),
        (
            "model: {base_model_name: a/b, options: {x: 1}}\nmemory: {}",
            "model.options must be empty with base_model_name",
        ),
        (
            "model: {hidden_dim: 8, options: {hidden_size: 1}}",
            "model.options.hidden_size must not stand beside its own field, got 1",
        ),
    ],
)
def test_names_what_is_wrong_in_one_line(tmp_path, capsys, text, message):
    with pytest.raises((TypeError, ValueError), match=message):
        load(tmp_path, text)
    assert main(["train", "--config", str(tmp_path / "file.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_line_goes_over_the_file(tmp_path, capsys):
    (tmp_path / "file.yaml").write_text("memory: {num_memory_tokens: 8}\n")
    options = ["--training.max_steps", "7", "--data.held_out", "0.5", "--print_config"]
    assert main(["train", "--config", str(tmp_path / "file.yaml"), *options]) == 0
    printed = load_yaml(capsys.readouterr().out)
    assert printed["training"]["max_steps"] == 7 and printed["data"]["held_out"] == 0.5
    assert printed["model"]["options"]["num_memory_tokens"] == 8
    assert printed["model"]["options"]["position_embedding"] == "rope"


def test_the_small_file_learns(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(ROOT)
    config = load_config("configs/test_small.yaml")
    training = dataclasses.replace(config.training, output_dir=str(tmp_path / "run"))
    data = dataclasses.replace(config.data, cache_dir=str(tmp_path / "cache"))
    result = train(dataclasses.replace(config, data=data, training=training), progress=False)
    assert result.step == 100
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    losses = [row["lm_loss"] for row in rows if row["lm_loss"] is not None]
    assert max(losses[-10:]) < min(losses[:10])
    held_out = [row["eval_loss"] for row in rows if row["eval_loss"] is not None]
    assert len(held_out) == 2 and max(held_out) < losses[0]

    found = []  # the same with the bank in 8 bits
    for options in ([], ["--memory_bits", "8"]):
        command = ["evaluate", str(tmp_path / "run"), "--json", str(tmp_path / "loss.json")]
        assert main([*command, "--cache_dir", str(tmp_path / "cache"), *options]) == 0
        found.append(json.loads((tmp_path / "loss.json").read_text())["loss"])
    assert 0 < abs(found[1] - found[0]) < 0.01
