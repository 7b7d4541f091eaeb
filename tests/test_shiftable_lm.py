"""The shiftable language model: a frozen base, specialists that come, learn, travel and fold."""

import copy
import hashlib
import json

import pytest
import torch
from model_factories import logits_of, make_model, make_tokens, pad_left, perturb

from memattn import ShiftableLanguageModel
from memattn.models import fold_gates, specialists_of

EXACT = dict(rtol=0, atol=1e-12)
NAMES = ("sql", "law")


def make_lm(system="vanilla", shake=True, sizes=None, **options):
    """A base and a shiftable model of it, whose specialists differ from the base."""
    base = make_model(system, **(sizes or {}))
    options = dict(names=NAMES, gate_size=4) | options
    model = ShiftableLanguageModel(base, **options)
    if shake:
        generator = torch.Generator().manual_seed(3)
        for p in (
            p for name in model.specialists.names for p in model.specialists.parameters(name)
        ):
            p.data += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return base, model


def hashes(model):
    return {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
    }


def train(model, parameters, steps=3, **options):
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(make_tokens(), labels=make_tokens(), **options).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def test_it_is_the_base_until_a_specialist_opens_and_leaves_it_as_it_is():
    base, model = make_lm()
    tokens = make_tokens()
    before, expected = hashes(base), logits_of(base, tokens)
    assert torch.equal(logits_of(model, tokens), expected)
    assert model.lm_head.weight is base.model.embed_tokens.weight  # its own, not copies
    assert not any(p.requires_grad for p in base.parameters())
    options = dict(max_new_tokens=6, do_sample=False, num_beams=2)
    assert torch.equal(model.generate(tokens, **options), base.generate(tokens, **options))

    model.specialists.set_prior("sql", 1.0)
    law = [p.detach().clone() for p in model.specialists.parameters("law")]
    mine = model.specialists.train_only("sql")
    losses = train(model, mine)
    assert losses[-1] < losses[0]
    learnt = [name for name, p in model.named_parameters() if p.requires_grad]
    assert learnt and all(".sql." in name for name in learnt)
    assert all(
        torch.equal(a, b) for a, b in zip(law, model.specialists.parameters("law"), strict=True)
    )
    assert not torch.equal(logits_of(model, tokens), expected)
    assert hashes(base) == before
    alone = torch.tensor([1.0, 0.0, 0.0]).expand(2, 3)
    assert torch.equal(logits_of(model, tokens, domain_weights=alone), expected)


def test_gradients_flow_through_the_frozen_base_to_lower_layers():
    _, model = make_lm(layers=(0,))
    model.specialists.set_prior("sql", 1.0)
    model(make_tokens(), labels=make_tokens()).loss.backward()
    assert all(p.grad is not None for p in model.specialists.parameters("sql"))
    assert all(p.grad is None for p in model.specialists.parameters("law"))


def test_gates_come_with_the_logits():
    _, model = make_lm(scope="prefix")
    rows = [make_tokens()[0], make_tokens()[1, :9]]
    tokens, mask = pad_left(rows, 23)
    logits, gates = model(tokens, attention_mask=mask, return_gates=True)
    assert all(torch.equal(g, torch.eye(3)[:1].expand(2, 3)) for g in gates)  # all are closed
    model.specialists.set_prior("sql", 1.0)
    model.specialists.set_prior("law", 2.0)
    logits, gates = model(tokens, attention_mask=mask, return_gates=True)
    same, by_token = model(tokens, attention_mask=mask, return_gates="token")
    assert torch.equal(logits, same)
    there = mask.bool()  # what stands in other columns depends on the mode
    plain = logits_of(model, tokens, attention_mask=mask)
    assert torch.equal(same[there], plain[there])
    assert [list(g.shape) for g in gates] == [[2, 3]] * 2
    assert [list(g.shape) for g in by_token] == [[2, 23, 3]] * 2
    for mean, each in zip(gates, by_token, strict=True):
        torch.testing.assert_close(mean.sum(-1), torch.ones(2, dtype=mean.dtype))
        assert (each[1, :14] == 0).all()
        torch.testing.assert_close(mean[1], each[1, 14:].mean(0), **EXACT)
    _, alone = model(rows[1][None], return_gates=True)
    torch.testing.assert_close(alone[1][0], gates[1][1], **EXACT)
    with pytest.raises(
        ValueError, match="return_gates must be True, False or \"token\", got 'all'"
    ):
        model(tokens, return_gates="all")


def test_specialists_trained_apart_combine(tmp_path):
    base = make_model("vanilla")
    logits, tokens = {}, make_tokens()
    for name, prior in zip(NAMES, (1.0, 2.0), strict=True):
        model = ShiftableLanguageModel(copy.deepcopy(base), names=[name], gate_size=4)
        model.specialists.set_prior(name, prior)
        train(model, model.specialists.train_only(name))
        logits[name] = logits_of(model, tokens)
        model.specialists.export(name, tmp_path / name)
    about = json.loads((tmp_path / "sql" / "specialist.json").read_text())
    assert about["name"] == "sql" and about["model"]["hidden_size"] == 32

    both = ShiftableLanguageModel(base, num_specialists=0, gate_size=4)
    for name in NAMES:
        assert both.specialists.load(tmp_path / name) == name
    for name, other in (NAMES, NAMES[::-1]):
        prior = both.specialists.priors(other)[0]
        both.specialists.set_prior(other, 0.0)
        assert torch.equal(logits_of(both, tokens), logits[name])
        both.specialists.set_prior(other, prior)
    weights = torch.tensor([[0.0, 1.0, 0.0], [0.2, 0.4, 0.4]])
    assert both(tokens, domain_weights=weights).logits.isfinite().all()

    # the model with both is a model like others
    both.save_pretrained(tmp_path / "both")
    loaded = ShiftableLanguageModel.from_pretrained(tmp_path / "both", dtype=torch.float64).eval()
    assert loaded.specialists.names == NAMES
    torch.testing.assert_close(logits_of(loaded, tokens), logits_of(both, tokens), **EXACT)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in loaded.named_parameters() if ".parts." in n
    }
    torch.save(both.state_dict(), tmp_path / "shiftable_lm.pt")
    fresh = ShiftableLanguageModel(perturb(make_model("vanilla")), names=NAMES, gate_size=4).eval()
    fresh.load_state_dict(torch.load(tmp_path / "shiftable_lm.pt", weights_only=True))
    torch.testing.assert_close(logits_of(fresh, tokens), logits_of(both, tokens), **EXACT)
    both.specialists.remove("sql")
    assert both.config.parts[0].names == ("law",)
    assert torch.equal(logits_of(both, tokens), logits["law"])
    assert both.specialists.add(prior=0.0) == "specialist_0"


def test_a_file_for_another_model_is_refused(tmp_path):
    base, model = make_lm()
    model.specialists.export("sql", tmp_path / "sql")
    load = lambda other, **options: other.specialists.load(tmp_path / "sql", **options)
    with pytest.raises(ValueError, match="name must be a new one, got 'sql'"):
        load(model)
    assert load(model, name="more") == "more"
    with pytest.raises(ValueError, match="of a model with scope 'prefix', got .* with 'token'"):
        load(make_lm(scope="prefix")[1], name="x")
    with pytest.raises(ValueError, match="of a model with num_layers 1, got .* with 2"):
        load(make_lm(sizes=dict(num_hidden_layers=1))[1], name="x")
    empty = dict(num_specialists=0, gate_size=4)
    moved = ShiftableLanguageModel(perturb(make_model("vanilla")), **empty)
    with pytest.raises(
        ValueError, match="folder must hold a specialist of a base with the weights"
    ):
        load(moved)
    assert moved.specialists.names == ()
    assert load(moved, any_base=True) == "sql"
    half = ShiftableLanguageModel(copy.deepcopy(base).bfloat16(), **empty)
    assert load(half) == "sql"  # the same weights, rounded
    with pytest.raises(FileNotFoundError, match=r"folder must hold specialist.json, got"):
        model.specialists.load(tmp_path)
    with pytest.raises(ValueError, match="name must be a specialist: sql, law, more, got 'none'"):
        model.specialists.export("none", tmp_path / "x")
    (tmp_path / "sql" / "specialist.json").write_text("{}")
    with pytest.raises(ValueError, match="folder must hold a saved specialist"):
        load(make_lm(num_specialists=0, names=None)[1])
    (tmp_path / "sql" / "notes").touch()
    with pytest.raises(ValueError, match="folder must be new, empty or hold a saved specialist"):
        model.specialists.export("sql", tmp_path / "sql")


def give(row):
    """What gives a layer gates of its own."""
    return lambda module, args, options: (args, {**options, "override": row.expand(2, 3)})


@pytest.mark.parametrize("rank", [None, 2])
def test_constant_gates_fold_into_weights(rank):
    base, model = make_lm(rank=rank)
    tokens = make_tokens()
    for weights, heads in (
        ([1.0, 0.0, 0.0], 4),
        ([0.0, 0.0, 1.0], 4),
        ([0.25, 0.0, 0.75], 8),
        ([[0.0, 1.0, 0.0], [0.5, 0.25, 0.25]], 12),
    ):
        weights = torch.tensor(weights)
        folded = fold_gates(model, weights)
        assert folded.config.num_attention_heads == heads and not folded.config.parts
        layers = zip(weights.expand(2, 3), model.specialists.modules, strict=True)
        hooks = [m.register_forward_pre_hook(give(row), with_kwargs=True) for row, m in layers]
        expected = logits_of(model, tokens)
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(logits_of(folded, tokens), expected, **EXACT)
    assert torch.equal(logits_of(fold_gates(model, {}), tokens), logits_of(base, tokens))
    with pytest.raises(ValueError, match="weights must be at least 0 and sum to 1"):
        fold_gates(model, torch.tensor([1.0, 1.0, 0.0]))
    with pytest.raises(
        ValueError, match="model must have plain causal attention where specialists"
    ):
        fold_gates(make_lm("both")[1], {"law": 1.0})
    with pytest.raises(ValueError, match="must have no other parts where several branches count"):
        fold_gates(make_lm("chapters")[1], {"law": 0.5})


def test_what_is_no_base_is_refused():
    base = make_model("vanilla")
    with pytest.raises(
        TypeError, match="base_model must be a MemAttnForCausalLM or a MemAttnConfig"
    ):
        ShiftableLanguageModel(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="base_model must be a model with num_specialists"):
        ShiftableLanguageModel(base.config, 2)
    with pytest.raises(ValueError, match="base_model must have no specialists yet"):
        ShiftableLanguageModel(ShiftableLanguageModel(base))
    with pytest.raises(ValueError, match="model must have specialists"):
        specialists_of(make_model("vanilla"))
