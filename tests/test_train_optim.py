"""Parameter groups, schedules and label smoothing."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from memattn.models import MemAttnConfig, MemAttnForCausalLM
from memattn.train import TrainingConfig
from memattn.train.optim import (
    is_memory_parameter,
    make_optimizer,
    make_scheduler,
    parameter_groups,
    smoothing_loss,
)


def small_model() -> MemAttnForCausalLM:
    return MemAttnForCausalLM(
        MemAttnConfig.segmented(
            vocab_size=17,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            num_persistent_tokens=3,
        )
    )


def test_every_parameter_is_in_the_group_that_it_belongs_to():
    model = small_model()
    config = TrainingConfig(base_model_lr=1e-3, memory_lr=1e-4, weight_decay=0.1)
    groups = parameter_groups(model, config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    placed = {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert placed.keys() == set(names.values())
    for name, parameter in model.named_parameters():
        memory = "persistent" in name
        decays = not memory and parameter.dim() == 2 and "embed" not in name
        assert placed[name] == (1e-4 if memory else 1e-3, 0.1 if decays else 0.0), name
    assert {rate for rate, _ in placed.values()} == {1e-3, 1e-4}
    assert {decay for _, decay in placed.values()} == {0.1, 0.0}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_output_layer_have_a_rate_of_their_own(optimizer, tied):
    model = small_model()
    if not tied:
        head: Any = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
    config = TrainingConfig(base_model_lr=1e-3, embedding_lr=4e-3, optimizer=optimizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    placed = {
        names[p]: group["lr"]
        for group in make_optimizer(model, config).param_groups
        for p in group["params"]
    }
    ends = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if not tied else set())
    assert {name for name, rate in placed.items() if rate == 4e-3} == ends
    assert {rate for name, rate in placed.items() if name not in ends} == {1e-3}


class Experts(nn.Module):
    """Expert matrices stacked in one parameter, as Mixtral has them, and subclasses of tables."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 6, 8))
        self.gate_bias = nn.Parameter(torch.zeros(4))
        self.embed = type("ScaledEmbedding", (nn.Embedding,), {})(5, 8)
        self.bag = nn.EmbeddingBag(5, 8)
        self.head = nn.Linear(8, 5, bias=False)


def decaying_names(model: nn.Module) -> set[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, TrainingConfig(weight_decay=0.1))
    return {names[p] for group in groups if group["weight_decay"] for p in group["params"]}


def test_stacked_matrices_decay_and_no_kind_of_embedding_does():
    model = Experts()
    assert decaying_names(model) == {"gate_up_proj", "head.weight"}
    tied = nn.ModuleDict({"a_head": nn.Linear(8, 5, bias=False), "embed": nn.Embedding(5, 8)})
    tied["embed"].weight = tied["a_head"].weight  # which names it first
    assert decaying_names(tied) == set()


@pytest.mark.parametrize("model_type", ["gemma", "gemma3_text", "mixtral", "qwen3_moe"])
def test_no_embedding_of_transformers_decays(model_type):
    sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, intermediate_size=48, head_dim=8, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    decaying = decaying_names(model)
    assert not any("embed" in name for name in decaying)
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    assert decaying == {name for name in matrices if "embed" not in name}
    stacked = any(parameter.dim() == 3 for parameter in model.parameters())
    assert stacked == (model_type in ("mixtral", "qwen3_moe"))


@pytest.mark.parametrize("source", ["table", "relative", "computed"])
def test_tables_of_future_keys_do_not_decay(source):
    sizes = dict(vocab_size=17, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    options = dict(max_position_embeddings=16, future_dim=4, source=source, source_rank=2)
    model = MemAttnForCausalLM(MemAttnConfig.future(**options, **sizes))
    future = {name for name in decaying_names(model) if name.split(".")[-1] in ("key", "value")}
    assert not future and any(parameter.dim() == 3 for parameter in model.parameters())


def test_frozen_parameters_are_left_out_and_no_group_is_empty():
    model = small_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("persistent" in name)
    groups = parameter_groups(model, TrainingConfig())
    assert len(groups) == 1 and groups[0]["lr"] == TrainingConfig().base_model_lr


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_what_lora_adds_has_its_own_rate():
    peft = pytest.importorskip("peft")
    sizes = dict(vocab_size=17, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    base = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", intermediate_size=16, **sizes)
    )
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    groups = parameter_groups(model, TrainingConfig(base_model_lr=1e-3, lora_lr=3e-4))
    ((group),) = groups
    assert group["lr"] == 3e-4 and len(group["params"]) == 2 and group["weight_decay"] > 0
    base.requires_grad_(True)
    rates = {
        g["lr"]: len(g["params"]) for g in parameter_groups(model, TrainingConfig(lora_lr=2e-5))
    }
    assert rates[2e-5] == 2 and rates.keys() == {2e-5, TrainingConfig().base_model_lr}


def test_muon_has_the_matrices_inside_the_model_and_adamw_the_rest():
    model = small_model()
    config = TrainingConfig(optimizer="muon", base_model_lr=1e-2, memory_lr=1e-3)
    optimizer = make_optimizer(model, config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    before = {name: x.detach().clone() for x, name in names.items()}
    grads = {name: torch.randn_like(x) for name, x in before.items()}
    for parameter, name in names.items():
        parameter.grad = grads[name].clone()
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does
    optimizer.step()
    used = set()
    for group in optimizer.param_groups:
        options = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        for parameter in group["params"]:
            name = names[parameter]
            inner = parameter.dim() == 2 and "proj" in name
            assert group["optimizer"] == ("muon" if inner else "adamw"), name
            alone = nn.Parameter(before[name].clone())
            alone.grad = grads[name].clone()
            if inner:
                torch.optim.Muon([alone], adjust_lr_fn="match_rms_adamw", **options).step()
            else:
                torch.optim.AdamW([alone], betas=(0.9, 0.95), **options).step()
            assert torch.equal(parameter, alone) and not torch.equal(alone, before[name]), name
            used.add(name)
    assert used == before.keys()
    assert optimizer.state.keys() == set(names)


def test_muon_leaves_an_output_layer_of_its_own_to_adamw():
    options = dict(vocab_size=17, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    model: Any = MemAttnForCausalLM(MemAttnConfig.vanilla(**options, tie_word_embeddings=False))
    groups = make_optimizer(model, TrainingConfig(optimizer="muon")).param_groups
    (group,) = [g for g in groups if any(x is model.lm_head.weight for x in g["params"])]
    assert group["optimizer"] == "adamw" and group["weight_decay"] > 0


def test_memory_parameters_are_known_by_name():
    assert is_memory_parameter("layers.0.neural_memory.weight")
    assert is_memory_parameter("layers.0.attn.persistent_key")
    assert not is_memory_parameter("layers.0.attn.q_proj.weight")


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", [0.0, 0.5] + [(1 + math.cos(math.pi * x / 4)) / 2 for x in range(5)]),
    ],
)
def test_schedules(name, factors):
    config = TrainingConfig(
        lr_scheduler=name, warmup_steps=2, max_steps=6, base_model_lr=2e-3, memory_lr=1e-3
    )
    optimizer = make_optimizer(small_model(), config)
    scheduler = make_scheduler(optimizer, config, config.num_steps())
    for factor in factors:
        rates = sorted({group["lr"] for group in optimizer.param_groups} | {0.0})[1:]
        assert rates == pytest.approx([1e-3 * factor, 2e-3 * factor] if factor else [])
        optimizer.step()
        scheduler.step()


def test_smoothing_is_that_of_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 7, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, 7, (2, 9), generator=generator)
    labels[0, 4:] = -100
    rows, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    wanted = cross_entropy(rows, targets, label_smoothing=0.3)
    actual = cross_entropy(rows, targets) + smoothing_loss(logits, labels, 0.3)
    assert actual.item() == pytest.approx(wanted.item(), abs=1e-6)
