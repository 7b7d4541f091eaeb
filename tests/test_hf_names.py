"""What transformers and PEFT decide by the name of a model's class."""

import logging

import pytest
import torch
from transformers import Trainer, TrainingArguments, pipeline
from transformers.trainer_pt_utils import LabelSmoother

from memattn.data import load_tokenizer
from memattn.models import MemAttnConfig, MemAttnForCausalLM

SIZES = dict(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)


class Renamed(MemAttnForCausalLM):
    """A subclass whose name says nothing."""


def make_model(kind=MemAttnForCausalLM, preset="vanilla"):
    torch.manual_seed(0)
    return kind(getattr(MemAttnConfig, preset)(**SIZES)).train()


def make_trainer(model, folder, **options):
    arguments = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, **options)
    return Trainer(model=model, args=arguments)


def as_fsdp(model):
    """The class that FSDP2's ``fully_shard`` gives a model, and transformers' name of it."""
    model.__class__ = type(f"FSDP{type(model).__name__}", (type(model),), {})
    return model


def with_lora(model):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, adapter)


# peft asks transformers by an old name
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("preset", ["vanilla", "segmented"])
@pytest.mark.parametrize("change", [lambda model: model, as_fsdp, with_lora])
@pytest.mark.parametrize("kind", [MemAttnForCausalLM, Renamed])
def test_label_smoothing_of_the_trainer_shifts_labels(tmp_path, kind, change, preset):
    model = change(make_model(kind, preset))
    trainer = make_trainer(model, tmp_path, label_smoothing_factor=0.1)
    ids = torch.arange(24).view(2, 12) * 7 % 50
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    expected = LabelSmoother(0.1)(model(input_ids=ids), ids, shift_labels=True)
    torch.testing.assert_close(loss, expected)
    assert abs(loss - LabelSmoother(0.1)(model(input_ids=ids), ids)) > 1e-2


@pytest.mark.parametrize("kind", [MemAttnForCausalLM, Renamed])
def test_the_trainer_counts_labels_that_are_predicted(tmp_path, caplog, kind):
    model = make_model(kind)
    trainer = make_trainer(model, tmp_path)
    ids = torch.arange(24).view(2, 12)
    batch = [{"input_ids": ids, "labels": ids}]
    assert trainer._get_num_items_in_batch(batch, torch.device("cpu")) == 2 * 11
    with caplog.at_level(logging.WARNING, "transformers"):
        assert torch.isfinite(model(**batch[0]).loss)
    assert "loss_type" not in caplog.text


@pytest.mark.parametrize("kind", [MemAttnForCausalLM, Renamed])
def test_the_pipeline_takes_the_model(caplog, kind):
    with caplog.at_level(logging.WARNING, "transformers"):
        generator = pipeline(
            "text-generation", model=make_model(kind).eval(), tokenizer=load_tokenizer("bytes")
        )
        (result,) = generator("abc", max_new_tokens=3, do_sample=False)
    assert result["generated_text"].startswith("abc")
    assert "not supported" not in caplog.text
