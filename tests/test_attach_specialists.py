"""Specialists beside the attention of pretrained models."""

import hashlib

import peft
import pytest
import torch
from adapter_factories import make_base, perturb_adapter
from model_factories import enable_checkpointing, logits_of, make_tokens, pad_left
from test_adapters import facts_of
from torch import nn

from memattn.adapters import (
    SpecialistsAdapter,
    attach_memory,
    attach_specialists,
    detach_memory,
    disable_adapters,
    set_adapter,
)
from memattn.evaluate import audit
from memattn.evaluate.estimate_attached import estimate_attached
from memattn.parts.specialists import SpecialistsConfig
from memattn.testing import assert_within_budget

EXACT = dict(rtol=0, atol=1e-12)
LAST_GLOBAL = dict(layer_types=["sliding_attention", "full_attention"])
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)
BASE = torch.tensor([1.0, 0.0, 0.0])
# name: architecture, options of its configuration, of the specialists
BASES = {
    "llama": ("llama", dict(attention_bias=True, rope_parameters=YARN), {}),
    "qwen2": ("qwen2", dict(num_key_value_heads=4), dict(rank=2)),
    "qwen3": ("qwen3", dict(head_dim=16), dict(scope="prefix", top_k=1)),
    "mistral": ("mistral", dict(sliding_window=None), {}),
    "gemma3": ("gemma3", LAST_GLOBAL | dict(query_pre_attn_scalar=24), dict(layers=[1])),
    "gpt2": ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), dict(rank=3)),
}


def attach(name, dtype=torch.float64, **options):
    """A model whose norms are random, with closed copies, and what it gave without them."""
    architecture, sizes, fields = BASES[name]
    model = make_base(architecture, dtype, **sizes)
    for i, (_, parameter) in enumerate(n for n in model.named_parameters() if n[1].dim() == 1):
        generator = torch.Generator().manual_seed(i)
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(dtype)
    before, facts = logits_of(model, make_tokens()), facts_of(model)
    fields = {"num_specialists": 2, "gate_size": 4, **fields, **options}
    return model, attach_specialists(model, fields), before, facts


def open_all(adapter, prior=1.0):
    for name in adapter.specialists.names:
        adapter.specialists.set_prior(name, prior)


def hashes(model):
    """What the parameters are, by name."""
    return {
        name: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()
        for name, p in model.named_parameters()
        if "memory_adapters" not in name
    }


@pytest.mark.parametrize("name", BASES)
def test_a_new_specialist_is_a_closed_copy_and_training_leaves_the_base(name):
    model, adapter, before, facts = attach(name)
    tokens = make_tokens()
    assert torch.equal(logits_of(model, tokens), before)
    open_all(adapter)
    opened = logits_of(model, tokens)
    torch.testing.assert_close(opened, before, **EXACT)
    weights, optimizer = hashes(model), torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    losses = []
    for _ in range(6):
        output = model.train()(tokens, labels=tokens)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.lm_loss.item())
    assert losses[-1] < losses[0] and output.gate_entropy > 0
    assert hashes(model.eval()) == weights
    assert not torch.allclose(logits_of(model, tokens), before)
    forced = logits_of(model, tokens, domain_weights=BASE.expand(2, -1))
    assert torch.equal(forced, before)
    open_all(adapter, 0.0)
    assert torch.equal(logits_of(model, tokens), before)
    adapter.detach()
    assert torch.equal(logits_of(model, tokens), before) and facts_of(model) == facts


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_open_ones_are_exact(name):
    model, adapter, _, _ = attach(name)
    perturb_adapter(adapter)
    open_all(adapter)
    assert audit(model, seq_len=12).verdict == "all 0 (not applicable: packed documents)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_keep_their_bits_and_open_within_rounding(dtype):
    for name in ("qwen3", "qwen2"):
        model, adapter, before, _ = attach(name, dtype)
        tokens = make_tokens()
        assert {p.dtype for p in adapter.parameters()} == {dtype}
        assert torch.equal(logits_of(model, tokens), before)
        open_all(adapter)
        opened = logits_of(model, tokens)
        disabled = make_base(BASES[name][0], dtype, **BASES[name][1])
        disabled.load_state_dict(model.state_dict(), strict=False)
        assert_within_budget(name, opened, before, logits_of(disabled.double(), tokens))
        wide = attach_specialists(
            model, {"num_specialists": 1, "prior": 1.0}, name="wide", dtype=torch.float32
        )
        assert {p.dtype for p in wide.parameters()} == {torch.float32}
        assert_within_budget(name, logits_of(model, tokens), before, logits_of(disabled, tokens))


def test_generates_with_beams_padding_and_gates_of_samples():
    model, adapter, _, _ = attach("qwen3")
    perturb_adapter(adapter)
    open_all(adapter)
    tokens, mask = pad_left([make_tokens()[0, :9], make_tokens()[1, :4]], 9)
    weights = torch.tensor([[0.2, 0.8, 0.0], [0.0, 0.5, 0.5]])
    options = dict(do_sample=False, max_new_tokens=7, eos_token_id=None, num_beams=3)
    options["domain_weights"] = weights
    cached = model.generate(tokens, attention_mask=mask, **options)
    expected = model.generate(tokens, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached, expected)
    prior = torch.tensor([0.5, 1.0, 2.0])  # for all samples
    beams = {**options, "domain_weights": None, "attention_mask": mask}
    found = model.generate(tokens, domain_prior=prior, **beams)
    expected = model.generate(tokens, domain_prior=prior.expand(2, 3), **beams)
    assert torch.equal(found, expected) and not torch.equal(found, cached)
    options["domain_weights"] = weights[1:]
    assert torch.equal(cached[1:, 5:], model.generate(tokens[1:, 5:], **options))
    inputs = dict(attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    together = logits_of(model, tokens, **inputs, domain_weights=weights)
    alone = logits_of(model, tokens[1:, 5:], domain_weights=weights[1:])
    torch.testing.assert_close(together[1:, 5:], alone, **EXACT)
    with pytest.raises(ValueError, match="domain_weights must be at least 0 and sum to 1"):
        model(tokens, domain_weights=2 * weights)
    with pytest.raises(ValueError, match="domain_rank"):
        model.generate(tokens, domain_rank=weights)
    attach_memory(model, {"kind": "chapter_memory", "num_memory_tokens": 8})  # runs alone
    with pytest.raises(TypeError, match="domain_weights must be an argument of forward or of a"):
        model(tokens, domain_weights=weights)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")  # by PEFT
@pytest.mark.parametrize("lora_first", [False, True])
def test_lora_is_the_base_s_and_specialists_copy_the_base(lora_first):
    tokens = make_tokens()
    plain, model = logits_of(make_base("qwen2"), tokens), make_base("qwen2")
    part = {"num_specialists": 2, "gate_size": 4}
    if lora_first:
        model = lora(model)
        adapter = attach_specialists(model, part)
    else:
        adapter = attach_specialists(model, part)
        model = lora(model)
        set_adapter(model, "specialists")
    learning = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    assert {"default", "hidden"} <= learning and "q_proj" not in learning
    with_lora = logits_of(model, tokens)
    assert not torch.allclose(with_lora, plain)
    open_all(adapter)
    first = torch.tensor([0.0, 1.0, 0.0]).expand(2, -1)
    torch.testing.assert_close(logits_of(model, tokens, domain_weights=first), plain, **EXACT)
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    found = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("lora_B" in n for n in found) and any("q_weight" in n for n in found)
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model.eval(), tokens), plain, **EXACT)
    detach_memory(model)
    assert torch.equal(logits_of(model, tokens), with_lora)
    assert torch.equal(logits_of(model.unload(), tokens), plain)


def lora(model):
    options = dict(r=2, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))


def test_checkpointing_changes_nothing():
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, adapter, _, _ = attach("qwen3", domain_coefficient=0.3)
        perturb_adapter(adapter)
        open_all(adapter)
        if checkpointing:
            enable_checkpointing(model.train(), use_reentrant=False)
        labels = torch.tensor([[1], [0]])  # whose text it is
        output = model.train()(make_tokens(), labels=make_tokens(), domain_labels=labels)
        expected = output.lm_loss + 0.01 * output.gate_entropy + 0.3 * output.gate_domain
        torch.testing.assert_close(output.loss, expected)
        assert output.gate_domain > 0
        output.loss.backward()
        # a specialist that no token uses has no gradient
        used = {n: p.grad for n, p in adapter.named_parameters() if p.grad is not None}
        found.append({"loss": output.loss, "gate_entropy": output.gate_entropy, **used})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 12
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_specialists_come_and_go_learn_alone_and_are_saved(tmp_path):
    model, adapter, before, _ = attach("qwen3", rank=2, dtype=torch.float32)
    tokens, specialists = make_tokens(), adapter.specialists
    assert specialists.names == ("specialist_0", "specialist_1")
    specialists.add("law", prior=0.5)
    specialists.remove("specialist_0")
    law = set(specialists.train_only("law"))
    assert {p for p in model.parameters() if p.requires_grad} == law
    assert set(adapter.parameters()) > law and len(law) == 2 * 12
    attach_memory(model, {"kind": "chapter_memory", "num_memory_tokens": 8}, name="memory")
    set_adapter(model, "specialists")  # it is still the one that learns
    assert {p for p in model.parameters() if p.requires_grad} == law
    medicine = specialists.add("medicine")
    learning = {p for p in model.parameters() if p.requires_grad}
    assert learning == law | {*specialists.parameters(medicine)}
    specialists.remove(medicine)
    detach_memory(model, "memory")
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    perturb_adapter(adapter)
    logits, gates = model(tokens, return_gates=True)
    assert not torch.allclose(logits, before)
    assert [row.shape for row in gates] == [(2, 3)] * 2
    assert (gates[1][:, 1] == 0).all() and (gates[1].sum(1) - 1).abs().max() < 1e-6
    specialists.export("law", tmp_path / "law")
    adapter.save_pretrained(tmp_path / "whole")
    adapter.detach()
    again = SpecialistsAdapter.from_pretrained(model, tmp_path / "whole")
    assert torch.equal(model(tokens).logits, logits) and isinstance(again, SpecialistsAdapter)
    assert again.specialists.names == ("specialist_1", "law")
    set_adapter(model, again.name)
    assert all(p.requires_grad for p in again.parameters())
    again.detach()
    fresh = attach_specialists(model, again_fields(num_specialists=0))
    assert fresh.specialists.load(tmp_path / "law") == "law"
    assert torch.equal(model(tokens).logits, logits)  # the other one was closed
    for architecture, sizes, message in (
        ("qwen2", {}, "model.config.model_type must be 'qwen3'"),
        ("qwen3", {}, "model.config.head_dim must be 16"),
    ):
        other = make_base(architecture, **sizes)
        with pytest.raises(ValueError, match=message):
            SpecialistsAdapter.from_pretrained(other, tmp_path / "whole")
        specialists = attach_specialists(other, again_fields()).specialists
        with pytest.raises(
            ValueError, match="folder must be of a model with (model_type|head_dim)"
        ):
            specialists.load(tmp_path / "law")


def again_fields(**options):
    return {**BASES["qwen3"][2], "rank": 2, "gate_size": 4, **options}


def test_they_are_estimated_with_the_biases_of_the_base():
    for name, (architecture, sizes, fields) in BASES.items():
        part = {"kind": "specialists", "num_specialists": 2, "gate_size": 4, **fields}
        line = estimate_attached(make_base(architecture, **sizes), 10, part).lines[-1]
        assert line.parameters == attach(name)[1].num_parameters() and line.flops > 0
    with pytest.raises(ValueError, match="model must have layers with an attention that special"):
        estimate_attached(make_base("neox"), 10, {"kind": "specialists"})


@torch.no_grad()
def test_gates_are_of_real_tokens():
    model, adapter, before, _ = attach("qwen2")
    tokens, mask = pad_left([make_tokens()[0, :9], make_tokens()[1, :4]], 9)
    _, gates = model(tokens, attention_mask=mask, return_gates="token")  # of closed ones
    base = torch.tensor([1.0, 0.0, 0.0]) * mask[..., None]
    assert len(gates) == 2 and torch.equal(gates[0].double(), base.double())
    open_all(adapter)
    perturb_adapter(adapter)
    open_all(adapter)
    logits, means = model(tokens, attention_mask=mask, return_gates=True)
    _, gates = model(tokens, attention_mask=mask, return_gates="token")
    for mean, gate in zip(means, gates, strict=True):
        torch.testing.assert_close(mean, gate.sum(1) / mask.sum(1)[:, None], **EXACT)
    assert torch.equal(logits, model(tokens, attention_mask=mask).logits)
    with pytest.raises(ValueError, match='return_gates must be True, False or "token", got 3'):
        model(tokens, return_gates=3)
    disable_adapters(model)
    with pytest.raises(ValueError, match="return_gates must be None or False where no specialists"):
        model(tokens, return_gates=True)


def test_what_does_not_fit_is_refused_and_leaves_the_model():
    for make, config, error, message in (
        (make_base, {"rnk": 2}, ValueError, "config.rnk must be a field of specialists"),
        (make_base, {"layers": [2]}, ValueError, "specialists.layers must name layers from 0 to 1"),
        (make_base, {"kind": "toy"}, ValueError, "config.kind must be specialists, got 'toy'"),
        (make_base, 3, TypeError, "config must be a SpecialistsConfig or a dict, got int"),
        (
            lambda: make_base("gemma3", **LAST_GLOBAL),
            None,
            ValueError,
            "specialists.layers must leave out layer 0, whose attention sees a window of 5 tokens",
        ),
        (
            lambda: make_base("mistral"),
            None,
            ValueError,
            "layers must leave out layer 0, whose att",
        ),
        (lambda: make_base("neox"), None, ValueError, "stand before_attention or after_mlp in GPT"),
        (changed, None, ValueError, "beside an attention that does no more than projections, "),
    ):
        model = make()
        facts = facts_of(model)
        with pytest.raises(error, match=message):
            attach_specialists(model, config)
        assert facts_of(model) == facts
    model = make_base()
    adapter = attach_specialists(model, SpecialistsConfig(names=["sql"]))
    memory = attach_memory(model, {"kind": "chapter_memory", "num_memory_tokens": 8})
    own = adapter.specialists
    for call, message in (
        (lambda: own.set_prior("law", 1.0), "name must be a specialist: sql, got 'law'"),
        (lambda: own.remove("law"), "name must be a specialist: sql, got 'law'"),
        (lambda: own.add("sql"), "name must be a new one, got 'sql'"),
        (lambda: own.train_only("law"), "name must be a specialist: sql, got 'law'"),
        (lambda: SpecialistsAdapter(model, memory.name), "be that of an adapter with specialists"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def changed():
    """A model whose attention squashes what it gives."""
    model = make_base()
    for layer in model.model.layers:
        kind = type(layer.self_attn)
        forward = lambda self, *args, kind=kind, **kwargs: (
            kind.forward(self, *args, **kwargs)[0].tanh(),
            None,
        )
        layer.self_attn.__class__ = type("Squashed", (kind,), {"forward": forward})
    return model
