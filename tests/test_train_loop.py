"""The training loop: what it minimises, and what it leaves behind."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file
from train_factories import columns, tiny_config, write_corpus
from transformers import AutoModelForCausalLM, AutoTokenizer

from memattn.models import MemAttnForCausalLM
from memattn.train import NonFiniteError, TrainResult, train
from memattn.train.config import ModelConfig, TrainConfig, TrainingConfig
from memattn.train.distributed import prepare_model
from memattn.train.metrics import COLUMNS, read_metrics
from memattn.train.setup import make_batches, prepare_data


def run(config: TrainConfig, **options) -> TrainResult:
    return train(config, progress=False, **options)


def changed(config: TrainConfig, **training) -> TrainConfig:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **training))


@pytest.mark.parametrize("preset", ["vanilla", "segmented"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_loss_falls_and_everything_is_written(tmp_path, preset, packed):
    config = tiny_config(tmp_path, preset=preset, data={"packed": packed}, max_steps=30)
    result = run(config)
    rows = read_metrics(result.output_dir / "metrics.csv")
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    assert losses[0] == pytest.approx(torch.tensor(259.0).log().item(), abs=0.2)
    assert losses[-1] == result.loss < losses[0] - 1.0
    assert result.eval_loss is not None and result.eval_loss == rows[-1]["eval_loss"] < losses[0]
    assert result.step == 30 and rows[-1]["step"] == 30 and rows[-1]["tokens"] == result.tokens
    if packed:
        assert result.tokens == 30 * 4 * 32
    written = {path.name for path in result.output_dir.iterdir()}
    assert {"config.yaml", "metrics.csv", "checkpoints", "model"} <= written
    for folder in (result.model_dir, result.checkpoint):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("the sea", return_tensors="pt").input_ids
        assert model(input_ids=ids).logits.shape == (1, 7, 259)


def losses_of(config: TrainConfig) -> list[tuple]:
    return columns(read_metrics(run(config).output_dir / "metrics.csv"), "loss", "eval_loss")


@pytest.mark.usefixtures("new_programs")
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_a_compiled_run_is_the_run_without(tmp_path, monkeypatch, packed):
    config = tiny_config(tmp_path, data={"packed": packed}, max_steps=2, save_steps=None)
    plain = losses_of(config)
    compiled = []

    def compile_quickly(model, **options):
        compiled.append(options)
        torch.nn.Module.compile(model, backend="aot_eager", **options)

    monkeypatch.setattr(MemAttnForCausalLM, "compile", compile_quickly)
    torch._dynamo.utils.counters.clear()
    found = losses_of(changed(config, output_dir=str(tmp_path / "compiled"), compile=True))
    assert compiled == [{"fullgraph": True}]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # training, evaluation
    found, plain = ([x for row in rows for x in row if x is not None] for rows in (found, plain))
    assert found == pytest.approx(plain, rel=1e-5)


def test_a_run_of_several_processes_is_not_compiled():
    several: Any = SimpleNamespace(num_processes=2)
    with pytest.raises(NotImplementedError, match="compile must be false .* got true with 2"):
        prepare_model(several, torch.nn.Linear(1, 1), TrainingConfig(compile=True))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_accumulation_is_one_large_batch(tmp_path, packed):
    # padded rows have unequal numbers of targets: a mean of means would differ
    config = tiny_config(tmp_path, data={"packed": packed, "seq_len": 96}, save_steps=None)
    whole = losses_of(config)
    options = {"batch_size": 1, "gradient_accumulation_steps": 4}
    parts = losses_of(changed(config, output_dir=str(tmp_path / "parts"), **options))
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, abs=2e-5)


def test_parts_of_the_loss_are_logged_and_add_up(tmp_path):
    config = tiny_config(tmp_path, preset="future", max_steps=4, eval_steps=2, batch_size=1)
    # a band as long as a row: a row of two documents has none
    options = {**config.model.options, "future_dim": 31}
    config = dataclasses.replace(config, model=ModelConfig(preset="future", options=options))
    result = run(config)
    rows = read_metrics(result.output_dir / "metrics.csv")
    trained = [row for row in rows if row["loss"] is not None]
    for row in trained:
        assert row["loss"] == pytest.approx(row["lm_loss"] + 0.5 * row["future_loss"], abs=1e-6)
        assert row["future_loss"] >= 0.0 and row["eval_future_loss"] is None
    assert sum(row["future_loss"] for row in trained) > 0.0
    held_out = [row for row in rows if row["eval_loss"] is not None]
    assert [row["step"] for row in held_out] == [2, 4] and held_out[-1]["loss"] is None

    # by the final model itself, batch by batch
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    corpus = prepare_data(config)
    options = {"model": model, "tokenizer": corpus.tokenizer, "rank": 0, "world_size": 1}
    batches = make_batches(config, corpus.held_out, shuffle=False, **options)
    total, future_losses = torch.zeros(2, dtype=torch.float64), []
    for batch in batches.one_epoch():
        count = (batch["labels"] != -100).sum().item()
        with torch.no_grad():
            output = model(**batch)
        assert output.loss == output.lm_loss  # nothing but cross-entropy in evaluation
        total += count * torch.tensor([1.0, output.lm_loss])
        future_losses.append(output.future_loss)
    found = [loss.item() for loss in future_losses if loss > 0.0]
    assert 0 < len(found) < len(future_losses)  # those without a position do not count
    assert held_out[-1]["eval_loss"] == pytest.approx(total[1].item() / total[0].item(), abs=1e-6)
    expected = sum(found) / len(found)  # each has one piece of 32 tokens
    assert held_out[-1]["eval_future_loss"] == pytest.approx(expected, abs=1e-6)


def test_parts_that_a_model_does_not_report_have_no_column(tmp_path):
    rows = read_metrics(run(tiny_config(tmp_path, max_steps=2)).output_dir / "metrics.csv")
    assert all(tuple(row) == COLUMNS for row in rows)  # no column for what there is not
    assert columns(rows[:2], "lm_loss") == columns(rows[:2], "loss")


def test_accumulated_parts_are_those_of_one_large_batch(tmp_path):
    # one long document: every position counts the same in the loss of future attention
    corpus = write_corpus(tmp_path / "long.jsonl", documents=2, words=900)
    data = {"dataset_name": str(corpus), "held_out": 0.5}
    config = tiny_config(tmp_path, preset="future", data=data, save_steps=None)
    names = ("loss", "lm_loss", "future_loss", "eval_loss", "eval_future_loss")
    whole = columns(read_metrics(run(config).output_dir / "metrics.csv"), *names)
    options = {"batch_size": 1, "gradient_accumulation_steps": 4}
    config = changed(config, output_dir=str(tmp_path / "parts"), **options)
    parts = columns(read_metrics(run(config).output_dir / "metrics.csv"), *names)
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, abs=2e-5)


def test_checkpointing_activations_changes_nothing(tmp_path):
    config = tiny_config(tmp_path, save_steps=None, max_steps=4)
    plain = losses_of(config)
    output_dir = str(tmp_path / "again")
    again = losses_of(changed(config, gradient_checkpointing=True, output_dir=output_dir))
    assert plain == again


def test_bfloat16_is_close_and_is_used(tmp_path):
    config = tiny_config(tmp_path, save_steps=None, max_steps=4)
    plain = losses_of(config)
    output_dir = str(tmp_path / "bf16")
    half = losses_of(changed(config, mixed_precision="bf16", output_dir=output_dir))
    assert plain != half
    for a, b in zip(plain, half, strict=True):
        assert a == pytest.approx(b, abs=0.05)


def test_label_smoothing_is_in_the_training_loss_only(tmp_path):
    config = tiny_config(tmp_path, save_steps=None, max_steps=1, base_model_lr=1e-9)
    plain = losses_of(config)
    output_dir = str(tmp_path / "smooth")
    smooth = losses_of(changed(config, label_smoothing=0.9, output_dir=output_dir))
    assert plain[0] != smooth[0]
    assert plain[1] == smooth[1]


def test_a_batch_without_targets_is_no_nan(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "a"}\n{"text": "bb"}\n{"text": "ccc"}\n')
    data = {"packed": False, "seq_len": 4, "held_out": 0.0}
    config = tiny_config(tmp_path, data=data, max_steps=6, batch_size=1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=4))
    result = run(config)  # "ccc" is cut into 4 tokens, and the end mark alone
    rows = read_metrics(result.output_dir / "metrics.csv")
    assert 0.0 in [row["loss"] for row in rows]
    assert result.eval_loss is None


def test_a_loss_that_is_not_finite_stops_before_it_does_harm(tmp_path):
    config = tiny_config(tmp_path, base_model_lr=1e30, warmup_steps=3, save_steps=1)
    with pytest.raises(NonFiniteError, match="must be finite, got (nan|inf) at step") as error:
        run(config)
    last = str(error.value).rsplit(" ", 1)[1]
    assert all(value.isfinite().all() for value in load_file(f"{last}/model.safetensors").values())
    assert f"step {int(last.rsplit('-', 1)[1]) + 1};" in str(error.value)


def test_keeps_the_newest_checkpoints(tmp_path):
    result = run(tiny_config(tmp_path, save_steps=2, keep_checkpoints=2))
    names = {path.name for path in result.checkpoint.parent.iterdir()}
    assert names == {"step-6", "step-8"}


def test_goes_on_training_a_hugging_face_model(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from memattn.data import load_tokenizer

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=264, num_attention_heads=2, **sizes))
    llama.save_pretrained(tmp_path / "llama")
    load_tokenizer("bytes").save_pretrained(tmp_path / "llama")
    config = tiny_config(tmp_path, data={"tokenizer": None, "packed": False}, max_steps=20)
    model = dataclasses.replace(
        config.model, preset=None, options={}, model_path=str(tmp_path / "llama")
    )
    config = dataclasses.replace(config, model=model)
    result = run(config)
    assert result.loss < 5.0
    assert type(AutoModelForCausalLM.from_pretrained(result.model_dir)) is LlamaForCausalLM

    packed = dataclasses.replace(config, data=dataclasses.replace(config.data, packed=True))
    with pytest.raises(ValueError, match="packed must be false for LlamaForCausalLM, which takes"):
        run(changed(packed, output_dir=str(tmp_path / "packed")))
    assert not (tmp_path / "packed").exists()


def test_names_what_is_wrong(tmp_path):
    config = tiny_config(tmp_path)

    def with_model(**fields):
        return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))

    with pytest.raises(ValueError, match="model.preset must be one of vanilla, .*, got 'plain'"):
        run(with_model(preset="plain"))
    with pytest.raises(ValueError, match="model.options: heads must be a field of .*, got 3"):
        run(with_model(options={"heads": 3}))
    with pytest.raises(ValueError, match="data.tokenizer must have at most .*vocab_size=100 entr"):
        run(with_model(options={**config.model.options, "vocab_size": 100}))
    with pytest.raises(ValueError, match="mixed_precision must be no or bf16 without CUDA, got fp"):
        run(changed(config, mixed_precision="fp16"))
    assert not (tmp_path / "run").exists()
