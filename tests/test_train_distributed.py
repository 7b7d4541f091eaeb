"""Two processes on the CPU train as one with twice the rows does."""

import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from adapter_factories import make_base
from safetensors.torch import load_file
from train_factories import columns, tiny_config, write_corpus

from memattn.data import load_tokenizer
from memattn.train import LoraConfig, ModelConfig, TrainingConfig, load_config, train
from memattn.train.distributed import leave_process_group, prepare_model
from memattn.train.metrics import read_metrics
from memattn.train.setup import build_model

ROOT = Path(__file__).parent
CASES = {
    "ddp": {},
    "fsdp": {"distributed_strategy": "fsdp", "gradient_accumulation_steps": 2, "batch_size": 1},
    "fsdp-bf16": {"distributed_strategy": "fsdp", "mixed_precision": "bf16"},
    "ddp-padded": {"gradient_accumulation_steps": 2, "batch_size": 1},
    "ddp-future": {"gradient_accumulation_steps": 2, "batch_size": 1},
    # most steps select no token of some chapters
    "ddp-memory": {"memory_lr": 5e-3, "num_gpus": 2},
    # and no token of some specialists
    "ddp-shiftable": {"gradient_accumulation_steps": 2, "batch_size": 1},
    "ddp-attached": {"memory_lr": 5e-2},
    "fsdp-attached": {"memory_lr": 5e-2, "distributed_strategy": "fsdp"},
}
# the same as a memory file, with the loss that balances chapters
MEMORY_FILE = """
model: {{hidden_dim: 16, num_heads: 2, num_layers: 2, intermediate_dim: 32, vocab_size: 300,
         max_seq_len: 32}}
memory: {{num_memory_tokens: 64, use_chapters: true, num_chapters: 32, top_k_chapters: 2}}
training: {{training_mode: pretraining, dataset_name: {folder}/corpus.jsonl, num_gpus: 2,
            batch_size: 2, gradient_accumulation_steps: 1, max_steps: 5, warmup_steps: 1,
            memory_lr: 1e-2, base_model_lr: 1e-2, cpu: true, output_dir: {folder}/memory-file}}
data: {{held_out: 0.1, tokenizer: bytes, cache_dir: {folder}/cache}}
"""


def configure(folder: Path, name: str, **training):
    options = {"batch_size": 2, "save_steps": 3, "max_steps": 5, "output_dir": str(folder / name)}
    data = {"packed": "padded" not in name, "seq_len": 96 if "padded" in name else 32}
    preset = "segmented"
    if "future" in name:
        preset, corpus = "future", folder / "long.jsonl"
        # of one long document every position counts the same in the loss of future attention
        data |= {"dataset_name": str(write_corpus(corpus, 2, 900)), "held_out": 0.5}
    if "memory" in name:
        preset = "memory_transformer"
    if "shiftable" in name:
        preset = "shiftable"
    if "attached" in name:
        data |= {"packed": False, "seq_len": 96}
    options |= {**CASES.get(name, {}), **training}
    config = tiny_config(folder, preset=preset, data=data, **options)
    if "attached" in name:
        config = replace(config, model=attached_model(folder))
    return config


def attached_model(folder: Path) -> ModelConfig:
    """A memory and LoRA inside a tiny pretrained model, which stays as it is."""
    base = folder / "base"
    if not base.exists():
        torch.manual_seed(0)
        make_base("llama", torch.float32, vocab_size=300).save_pretrained(base)
    memory = {"kind": "chapter_memory", "num_memory_tokens": 16, "use_chapters": True}
    memory |= {"num_chapters": 8, "top_k_chapters": 2, "routing_block_size": 8}
    memory |= {"use_load_balance_loss": False}
    lora = LoraConfig(rank=2)
    return ModelConfig(
        model_path=str(base), memory_adapter=memory, lora=lora, freeze_base_model=True
    )


def test_no_garbage_outlives_the_process_group():
    """Where the collection of one cycle makes garbage of another, as those of sharded models do."""

    class Cycle:
        def __init__(self, held: list["Cycle"]):
            self.itself, self.held = self, held

        def __del__(self):
            self.held.clear()

    held = [Cycle([])]
    last, first = weakref.ref(held[0]), Cycle(held)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    del first
    leave_process_group()
    assert last() is None and not torch.distributed.is_initialized()


def test_weights_that_rest_are_not_sharded(tmp_path):
    model = build_model(configure(tmp_path, "shiftable").model, load_tokenizer("bytes"))
    two = SimpleNamespace(distributed_type="MULTI_CPU", num_processes=2)
    with pytest.raises(NotImplementedError, match="strategy must be ddp, got fsdp with CausalSpec"):
        prepare_model(cast(Any, two), model, TrainingConfig(distributed_strategy="fsdp"))


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    """The runs of all cases by two processes."""
    folder = tmp_path_factory.mktemp("launched")
    paths = []
    for name in CASES:
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(configure(folder, name).to_yaml())
    paths.append(folder / "memory-file.yaml")
    paths[-1].write_text(MEMORY_FILE.format(folder=folder))
    again = configure(folder, "fsdp", output_dir=str(folder / "fsdp-again"))
    (folder / "again.yaml").write_text(again.to_yaml())
    paths.append(f"{folder / 'again.yaml'}={folder / 'fsdp' / 'checkpoints' / 'step-3'}")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]  # so many CPUs, too
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
    done = subprocess.run(
        [*command, str(ROOT / "train_distributed.py"), *map(str, paths)],
        env={
            **os.environ,
            "PYTHONFAULTHANDLER": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT.parent, ROOT.parent / "kernels", ROOT))),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_losses_and_weights_are_those_of_one_process(launched, name):
    rows = CASES[name].get("batch_size", 2) * CASES[name].get("gradient_accumulation_steps", 1)
    config = configure(
        launched,
        name,
        batch_size=2 * rows,
        gradient_accumulation_steps=1,
        distributed_strategy="ddp",
        num_gpus=None,
        output_dir=str(launched / f"{name}-1"),
    )
    single = train(config, progress=False)
    metrics = [
        read_metrics(folder / "metrics.csv") for folder in (launched / name, single.output_dir)
    ]
    exact, rounded = ("step", "tokens", "learning_rate"), ("loss", "eval_loss", "grad_norm")
    assert columns(metrics[0], *exact) == columns(metrics[1], *exact)
    tolerance = 2e-2 if "bf16" in name else 2e-5
    rounded += ("lm_loss", "future_loss", "eval_future_loss")
    for a, b in zip(*(columns(rows, *rounded) for rows in metrics), strict=True):
        assert a == pytest.approx(b, abs=tolerance)
    many, one = (
        load_file(f / "model/model.safetensors") for f in (launched / name, launched / f"{name}-1")
    )
    assert many.keys() == one.keys()
    for key in many:
        assert many[key].shape == one[key].shape
        # Adam divides by the gradient's size: rounding may turn a tiny gradient round
        assert (many[key] - one[key]).abs().max() < 10 * tolerance


def test_a_memory_file_trains_on_as_many_processes_as_it_says(launched):
    rows = read_metrics(launched / "memory-file" / "metrics.csv")
    losses = [row["lm_loss"] for row in rows if row["lm_loss"] is not None]
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert all(row["load_balance_loss"] >= 0.99 for row in rows if row["load_balance_loss"])
    with pytest.raises(ValueError, match="training.num_gpus must be the number of processes, 1"):
        train(load_config(launched / "memory-file.yaml"), progress=False)


def test_shards_resume_bit_for_bit(launched):
    whole, again = (
        read_metrics(launched / name / "metrics.csv") for name in ("fsdp", "fsdp-again")
    )
    exact = ("step", "loss", "eval_loss", "grad_norm")
    assert columns(again, *exact) == columns(whole[3:], *exact)
    a, b = (
        load_file(launched / name / "model/model.safetensors") for name in ("fsdp", "fsdp-again")
    )
    assert all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_one_process_goes_on_where_two_stopped(launched, name):
    config = configure(launched, name, batch_size=4, gradient_accumulation_steps=1)
    before = read_metrics(launched / name / "metrics.csv")
    checkpoint = launched / name / "checkpoints/step-3"
    result = train(config, resume=checkpoint, progress=False)
    after = read_metrics(result.output_dir / "metrics.csv")
    assert columns(after[:3], "loss") == columns(before[:3], "loss")
    losses = (columns(rows, "loss", "eval_loss") for rows in (after, before))
    for a, b in zip(*losses, strict=True):
        assert a == pytest.approx(b, abs=2e-5)
