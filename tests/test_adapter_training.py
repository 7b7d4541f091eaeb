"""Learning with attached parts: losses, checkpointing, compiled, LoRA, transformers' trainer."""

import multiprocessing
import os
import sys

import peft
import pytest
import torch
from adapter_factories import (
    SERIAL,
    ScaledConfig,
    make_attached,
    make_base,
    perturb_adapter,
)
from adapters_distributed import check_all
from model_factories import enable_checkpointing, logits_of, make_tokens, pad_left
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from toy_part import LOSS
from transformers import Trainer, TrainingArguments

from memattn.adapters import (
    MemoryAdapter,
    adapters_of,
    attach_memory,
    detach_memory,
    disable_adapters,
    set_adapter,
)
from memattn.parts import Role
from memattn.train import TrainingConfig
from memattn.train.optim import parameter_groups

PLACES = ("beside_attention", "after_attention")

# what other libraries call by its old name
OLD_NAME = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


def make_batch():
    tokens, mask = pad_left([make_tokens()[0], make_tokens()[1, :9]], 23)
    return dict(input_ids=tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100))


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_losses_of_parts_are_in_the_output_and_in_the_loss():
    model, batch = make_attached(), make_batch()
    plain = model(**batch)
    assert plain.losses is None and plain.toy_loss is None and "lm_loss" not in plain
    measured = model(**batch, output_losses=True)
    assert torch.equal(measured.loss, plain.loss) and torch.equal(measured.lm_loss, plain.loss)
    assert measured.loss_counts[LOSS] == 2 * 32  # in two layers
    output = model.train()(**batch)
    assert output.past_key_values is None
    assert torch.equal(output.losses[LOSS], measured.toy_loss)
    torch.testing.assert_close(output.loss, output.lm_loss + 0.1 * output.toy_loss)
    parts = model(**batch, num_items_in_batch=torch.tensor(120))
    # all of the 32 labels but the first of a row have a token before them
    expected = (output.lm_loss + 0.1 * output.toy_loss) * 31 / 120
    torch.testing.assert_close(parts.loss, expected, check_dtype=False)
    loss, logits, *_ = model(**batch, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)
    assert model.losses == {LOSS: 0.1}
    disable_adapters(model)
    assert model.losses == {} and not hasattr(model(**batch), "toy_loss")


def wrap_layers(model):
    """Checkpoint each layer from outside, as accelerate does with FSDP."""
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(layer)


def test_checkpointing_from_outside_gives_equal_gradients():
    found = []
    for checkpointing in (False, True):
        model = make_attached("qwen3").train()
        names = {parameter: name for name, parameter in model.named_parameters()}
        if checkpointing:
            wrap_layers(model)
        batches = [make_batch(), {**make_batch(), "attention_mask": None}]
        outputs = [model(**batch) for batch in batches]
        sum(output.loss for output in outputs).backward()  # neither call is the newest for both
        grads = {names[p]: p.grad for p in model.parameters() if p.grad is not None}
        found.append((grads, [output.loss_counts for output in outputs]))
    assert found[0][1] == found[1][1] and len(found[0][0]) == 13
    for name, gradient in found[0][0].items():
        assert torch.equal(gradient, found[1][0][name]), name


@pytest.mark.parametrize("architecture", SERIAL)
def test_checkpointing_gives_equal_gradients_and_counts_losses_once(architecture):
    found = []
    for checkpointing in (False, True):
        place = PLACES[SERIAL.index(architecture) % 2]
        part = ScaledConfig(at=place)
        model = without_dropout(make_attached(architecture, part=part)).train()
        if checkpointing:
            enable_checkpointing(model, use_reentrant=False)
        outputs = [model(**make_batch(), use_cache=checkpointing) for _ in range(2)]
        for output in outputs:  # both calls are open for the backward
            output.loss.backward()
        found.append(
            (gradients(model), outputs[1].loss, outputs[1].toy_loss, outputs[1].loss_counts)
        )
    for a, b in zip(*found, strict=True):
        assert a.keys() == b.keys() if isinstance(a, dict) else torch.equal(a, b)
    for name, gradient in found[0][0].items():
        assert torch.equal(gradient, found[1][0][name]), name
    assert len(found[0][0]) == (11 if place == "beside_attention" else 13)  # two norms


def test_reentrant_checkpointing_is_refused():
    model = make_attached().train()
    enable_checkpointing(model, use_reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant must be False"):
        model(**make_batch())
    model.eval()(**make_batch())


def test_other_ways_to_replace_forward_are_refused():
    model = make_base()
    model.model.layers[0].forward = model.model.layers[0].forward
    with pytest.raises(
        ValueError, match="model must have modules with their own forward, got model"
    ):
        attach_memory(model, ScaledConfig())
    model = make_attached()
    model.forward = model.forward  # as accelerate does for mixed precision
    for call in (
        lambda: detach_memory(model),
        lambda: attach_memory(model, ScaledConfig(), name="b"),
    ):
        with pytest.raises(ValueError, match="model must .* forward"):
            call()
    del model.forward
    detach_memory(model)
    replica = make_attached()
    replica._is_replica = True
    with pytest.raises(NotImplementedError, match="DataParallel"):
        replica(**make_batch())
    with torch.device("meta"):
        empty = make_base()
    with pytest.raises(ValueError, match="model must have its weights loaded"):
        attach_memory(empty, ScaledConfig())


@pytest.mark.usefixtures("new_programs")
def test_compiles_as_one_graph():
    model = make_base(dtype=torch.float32, num_hidden_layers=1).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch = make_batch()
    compiled(**batch)
    attach_memory(compiled, ScaledConfig())  # compiled before: it is noticed
    perturb_adapter(adapters_of(model)["default"])
    actual = compiled(**batch)
    actual.loss.backward()
    found = gradients(model)
    model.zero_grad()
    expected = model(**batch)
    expected.loss.backward()
    torch.testing.assert_close(actual.losses, expected.losses)
    torch.testing.assert_close(found, gradients(model))
    assert actual.toy_loss > 0


def test_roles_and_learning_rates():
    model = make_base()
    attach_memory(model, ScaledConfig(table_lr=0.5), freeze_base=False)
    roles = model.parameter_roles()
    assert roles["memory_adapters.default.scaled.rows"] == Role("memory", 0.5)
    table = "model.layers.1.memory_adapters.default.parts.scaled.table"
    assert roles[table] == Role("table", 0.5)
    groups = parameter_groups(model, TrainingConfig(base_model_lr=1e-5, memory_lr=1e-3))
    names = {parameter: name for name, parameter in model.named_parameters()}
    placed = {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert placed[table] == (0.5, 0.0)
    assert placed[table.replace("table", "value_proj.weight")] == (1e-3, 0.1)
    assert placed["model.layers.1.mlp.up_proj.weight"] == (1e-5, 0.1)
    assert len(placed) == len(names)


def lora(model):
    options = dict(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))


def learning(model):
    """Which of the three kinds of parameters learn."""
    kinds = {
        "lora" if "lora_" in n else "memory" if "memory_adapters" in n else "base"
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    return sorted(kinds)


@OLD_NAME
def test_lora_and_memory_in_either_order(tmp_path):
    tokens, found = make_tokens(T=9), []
    plain = logits_of(make_base(), tokens)
    for memory_first in (True, False):
        torch.manual_seed(1)
        model = make_base()
        if memory_first:
            attach_memory(model, ScaledConfig())
            torch.manual_seed(1)
            model = lora(model)
            assert learning(model) == ["lora"]  # PEFT freezes everything else
            set_adapter(model, "default")
        else:
            model = lora(model)
            attach_memory(model, ScaledConfig())
        assert learning(model) == ["lora", "memory"]
        adapter = adapters_of(model)["default"]
        with model.disable_adapter():
            assert torch.equal(logits_of(model, tokens), plain)
        perturb_adapter(adapter)
        found.append(logits_of(model, tokens))
        model.train()(**make_batch()).loss.backward()
        assert {p.grad is not None for p in model.parameters() if p.requires_grad} == {True}
        model.eval()
        tokens_out = model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False)
        assert tokens_out.shape == (2, 13)

        adapter.save_pretrained(tmp_path / "memory")
        model.save_pretrained(tmp_path / "lora")
        loaded = peft.PeftModel.from_pretrained(make_base(), tmp_path / "lora")
        MemoryAdapter.from_pretrained(loaded, tmp_path / "memory")
        assert torch.equal(logits_of(loaded, tokens), found[-1])
        with_memory = logits_of(loaded.merge_and_unload(), tokens)
        torch.testing.assert_close(with_memory, found[-1], rtol=0, atol=1e-12)
        detach_memory(model)
        alone = peft.PeftModel.from_pretrained(make_base(), tmp_path / "lora")
        assert torch.equal(logits_of(model, tokens), logits_of(alone, tokens))
        assert torch.equal(logits_of(model.unload(), tokens), plain)


class Rows(torch.utils.data.Dataset):
    """Two sequences, again and again."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {name: values[i % 2] for name, values in make_batch().items()}


def run_trainer(folder, **options):
    model = make_base(dtype=torch.float32)
    attach_memory(model, ScaledConfig())
    arguments = TrainingArguments(
        folder,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.05,
        logging_steps=1,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return model, Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())


@OLD_NAME
def test_transformers_trainer_trains_saves_and_resumes(tmp_path):
    before = {n: p.clone() for n, p in make_base(dtype=torch.float32).named_parameters()}
    model, trainer = run_trainer(tmp_path / "a", gradient_checkpointing=True)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.05
    changed = {
        n for n, p in model.named_parameters() if n not in before or not torch.equal(p, before[n])
    }
    assert changed == {n for n, _ in adapters_of(model)["default"].named_parameters()}

    again, trainer = run_trainer(tmp_path / "b")
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
    folder = tmp_path / "a" / "checkpoint-4"
    loaded = make_base(dtype=torch.float32)
    MemoryAdapter.from_pretrained(loaded, folder)
    assert torch.equal(logits_of(loaded, make_tokens()), logits_of(model.eval(), make_tokens()))


def test_two_processes_learn_as_one(tmp_path, monkeypatch, capfd):
    """Under DDP and FSDP2, with chapters that no token selects."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["adapters_distributed"])  # what takes long, once for both
    folder = tmp_path / "saved"
    workers = [context.Process(target=check_all, args=(rank, folder)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
        worker.kill()
    assert [worker.exitcode for worker in workers] == [0, 0], capfd.readouterr().err[-4000:]
    assert sorted(path.name for path in folder.iterdir()) == ["ddp", "fsdp", "fsdp-checkpointing"]
