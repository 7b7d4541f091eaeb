"""Specialists beside a decoder's attention: exact in every scope, closed or open, with a state."""

import pytest
import torch
from model_factories import enable_checkpointing, logits_of, make_tokens, pad_left
from specialist_factories import (
    SHIFTABLE,
    SIZES,
    make_shiftable,
    modules_of,
    set_priors,
    specialists_part,
    without_specialists,
)
from torch import nn
from torch.nn import functional as F

from memattn.evaluate import audit
from memattn.evaluate.estimate import estimate
from memattn.models import MemAttnCache, MemAttnConfig, MemAttnForCausalLM
from memattn.nn import DomainGate, RotaryEmbedding, SegmentedAttention, apply_rotary
from memattn.nn.attention_specialist import AttentionWeights
from memattn.nn.base_attention import BaseAttention, base_attention
from memattn.nn.causal_specialists import CausalSpecialists
from memattn.parts.specialist_set import recording_gates
from memattn.parts.specialists import SpecialistsConfig

EXACT = dict(rtol=0, atol=1e-12)
BASE, FIRST, SECOND = torch.eye(3)
ONE = dict(num_hidden_layers=1)


@pytest.mark.parametrize("system", SHIFTABLE)
def test_a_model_with_open_specialists_is_exact(system):
    report = audit(make_shiftable(system, sizes=ONE), seq_len=14)
    assert report.verdict == "all 0", [row for row in report.rows if row.value]


@pytest.mark.parametrize("system", ["prefix", "token"])
def test_closed_ones_change_no_bit_and_open_copies_only_rounding(system, tmp_path):
    model, tokens = make_shiftable(system), make_tokens()
    plain = without_specialists(model)
    expected = logits_of(plain, tokens)
    assert not torch.allclose(logits_of(model, tokens), expected)
    assert torch.equal(logits_of(set_priors(model, 0.0), tokens), expected)
    none = make_shiftable(system, num_specialists=0)
    none.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(logits_of(none, tokens), expected)

    # a file without specialists, in a model with closed ones: they begin as copies
    plain.save_pretrained(tmp_path / "plain")
    fields = {**SHIFTABLE[system][1], "prior": 0.0}
    parts = {"parts": [specialists_part(**fields)]}
    load = MemAttnForCausalLM.from_pretrained
    grown = load(tmp_path / "plain", dtype=torch.float64, **parts).eval()
    assert torch.equal(logits_of(grown, tokens), expected)
    if system == "prefix":  # causal attention, as they are
        opened = logits_of(set_priors(grown, 1.0), tokens)
        torch.testing.assert_close(opened, expected, **EXACT)

    model.save_pretrained(tmp_path / "whole")
    loaded = load(tmp_path / "whole", dtype=torch.float64).eval()
    assert not any(m.gate.open_specialists for m in modules_of(loaded))  # as it was saved
    tensors = loaded.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("rank", [None, 2])
def test_a_one_hot_gate_is_that_branch(rank):
    model, tokens = make_shiftable(rank=rank), make_tokens()
    plain = without_specialists(model)
    alone = lambda weights: logits_of(model, tokens, domain_weights=weights.expand(2, 3))
    assert torch.equal(alone(BASE), logits_of(plain, tokens))
    own = [base_attention(block.attention).weights for block in model.model.layers]
    found = [
        m.specialist("specialist_1").weights(w) for m, w in zip(modules_of(model), own, strict=True)
    ]
    with torch.no_grad():
        for block, weights in zip(plain.model.layers, found, strict=True):
            for name in ("q", "k", "v"):
                getattr(block.attention, f"{name}_proj").weight.copy_(getattr(weights, name))
            block.attention.o_proj.weight.copy_(weights.out)
    torch.testing.assert_close(alone(SECOND), logits_of(plain, tokens), **EXACT)


def test_samples_of_one_batch_have_gates_of_their_own():
    model, tokens = make_shiftable(), make_tokens(B=3)
    for options in (
        dict(domain_weights=torch.stack([FIRST, 0.25 * BASE + 0.75 * SECOND, BASE])),
        dict(domain_prior=torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])),
        dict(domain_mask=torch.tensor([[True, False], [False, True], [False, False]])),
    ):
        together = logits_of(model, tokens, **options)
        for i in range(3):
            own = {name: rows[i : i + 1] for name, rows in options.items()}
            torch.testing.assert_close(
                together[i : i + 1], logits_of(model, tokens[i : i + 1], **own), **EXACT
            )
    beams = dict(num_beams=2, do_sample=False, max_new_tokens=5, eos_token_id=None)
    weights = torch.stack([FIRST, BASE, SECOND])
    found = model.generate(tokens, domain_weights=weights, **beams)
    for i in range(3):
        alone = model.generate(tokens[i : i + 1], domain_weights=weights[i : i + 1], **beams)
        assert torch.equal(found[i], alone[0])
    prior, mask = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([True, False])  # for all samples
    found = model.generate(tokens, domain_prior=prior, domain_mask=mask, **beams)
    options = dict(domain_prior=prior.expand(3, 3), domain_mask=mask.expand(3, 2))
    assert torch.equal(found, model.generate(tokens, **options, **beams))
    with pytest.raises(ValueError, match="not used by the model: .*domain_rank"):
        model.generate(tokens, domain_rank=weights, max_new_tokens=2)
    with pytest.raises(
        TypeError, match="domain_rank must be an argument of forward or of a part: domain_"
    ):
        model(tokens, domain_rank=weights)
    with pytest.raises(ValueError, match="domain_weights must be at least 0 and sum to 1"):
        model(tokens, domain_weights=2 * weights)


@torch.no_grad()
def feed(model, tokens, cache, mask=None):
    return model(tokens, attention_mask=mask, past_key_values=cache).logits


def test_its_state_is_cut_saved_reset_and_split_by_row(tmp_path):
    model, tokens = make_shiftable(), make_tokens(T=24)
    whole = logits_of(model, tokens)
    cache = MemAttnCache(model.config)
    feed(model, tokens[:, :11], cache)
    cache.save(tmp_path / "state.safetensors")
    cache = MemAttnCache.load(tmp_path / "state.safetensors")
    torch.testing.assert_close(feed(model, tokens[:, 11:16], cache), whole[:, 11:16], **EXACT)
    cache.reset(torch.tensor([False, True]))
    expected = torch.cat([whole[:1, 16:], logits_of(model, tokens[1:, 16:])])
    first, second = cache.split(1)
    torch.testing.assert_close(feed(model, tokens[1:, 16:19], second), expected[1:, :3], **EXACT)
    feed(model, tokens[:1, 16:19], first)
    merged = MemAttnCache.merge([second, first])
    actual = feed(model, tokens[[1, 0], 19:], merged)
    torch.testing.assert_close(actual, expected[[1, 0], 3:], **EXACT)


def test_generates_with_and_without_a_cache_and_takes_guesses_back():
    model = make_shiftable()
    tokens, mask = pad_left([make_tokens()[0, :9], make_tokens()[1, :4]], 9)
    options = dict(do_sample=False, max_new_tokens=8, eos_token_id=None, suppress_tokens=[0])
    cached = model.generate(tokens, attention_mask=mask, num_beams=3, **options)
    uncached = model.generate(tokens, attention_mask=mask, num_beams=3, use_cache=False, **options)
    assert torch.equal(cached, uncached)
    tokens = make_tokens(B=1, T=6).repeat(1, 4)
    expected = model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, prompt_lookup_num_tokens=4, **options), expected)


def test_a_state_has_the_specialists_that_were_open_when_it_began():
    model, tokens = make_shiftable(sizes=ONE), make_tokens()
    for module in modules_of(model):
        module.gate.set_prior("specialist_1", 0.0)
    cache = MemAttnCache(model.config)
    feed(model, tokens[:, :5], cache)
    names = lambda: cache.layers[0].parts["specialists"].names
    assert names() == ("specialist_0",)
    set_priors(model, 0.0)
    feed(model, tokens[:, 5:7], cache)  # closed ones go on, so that they can open again
    for module in modules_of(model):
        module.gate.set_prior("specialist_0", 1.0)
    whole = logits_of(model, tokens)
    torch.testing.assert_close(feed(model, tokens[:, 7:9], cache)[:, 1:], whole[:, 8:9], **EXACT)
    set_priors(model, 1.0)
    wanted = (
        "past_key_values must hold specialist specialist_1, open since the first call, got spec"
    )
    with pytest.raises(ValueError, match=wanted):
        feed(model, tokens[:, 9:], cache)
    cache = MemAttnCache(model.config)
    for prior in (0.0, 1.0):  # all rows restart: others may be open now
        for module in modules_of(model):
            module.gate.set_prior("specialist_1", prior)
        begun = feed(model, tokens, cache)
        torch.testing.assert_close(begun, logits_of(model, tokens), **EXACT)
        cache.reset(torch.tensor([True, True]))
    assert names() == ("specialist_0", "specialist_1")


def test_packed_documents_are_apart():
    model, tokens = make_shiftable(), make_tokens(B=1, T=20)
    bounds = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    packed = logits_of(model, tokens, cu_seqlens=bounds)
    for a, b in zip(bounds, bounds[1:], strict=False):
        torch.testing.assert_close(packed[:, a:b], logits_of(model, tokens[:, a:b]), **EXACT)


@pytest.mark.usefixtures("new_programs")
def test_checkpointing_and_compiling_change_nothing():
    tokens, mask = pad_left([make_tokens()[0], make_tokens()[1, :9]], 23)
    labels, found = torch.tensor([[1], [0]]), []
    for way in ("plain", "checkpointing", "compiled"):
        model = make_shiftable(entropy_coefficient=0.5, domain_coefficient=0.3, sizes=ONE).train()
        if way == "checkpointing":
            enable_checkpointing(model)
        call = model if way != "compiled" else torch.compile(model, fullgraph=True, backend="eager")
        output = call(tokens, attention_mask=mask, labels=tokens, domain_labels=labels)
        output.loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        found.append([output.loss, output.gate_entropy, *grads])
        expected = output.lm_loss + 0.5 * output.gate_entropy + 0.3 * output.gate_domain
        torch.testing.assert_close(output.loss, expected)
        assert output.loss_counts["gate_sparsity"] == mask.sum() and output.gate_sparsity > 0
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("system", SHIFTABLE)
def test_labels_enter_the_loss_alone_and_teach_the_gate(system):
    """By row and by token, with unknown ones; gates that are taught tell the two kinds apart."""
    model = make_shiftable(system, domain_coefficient=1.0, top_k=None)
    tokens = make_tokens()
    labels = torch.tensor([[1], [0]])
    output = model(tokens, labels=tokens, domain_labels=labels, output_losses=True)
    plain = model(tokens, labels=tokens, output_losses=False)
    assert torch.equal(output.logits, plain.logits) and plain.losses is None
    by_token = labels.repeat(1, tokens.shape[1])
    again = model(tokens, labels=tokens, domain_labels=by_token, output_losses=True)
    assert again.gate_domain == output.gate_domain > 0
    by_token[0, 3:] = -1
    fewer = model(tokens, labels=tokens, domain_labels=by_token, output_losses=True)
    layers = len(modules_of(model))
    assert output.loss_counts["gate_domain"] == layers * tokens.numel()
    assert fewer.loss_counts["gate_domain"] == layers * (tokens.shape[1] + 3)
    untaught = model.train()(tokens, labels=tokens)
    assert untaught.gate_domain == untaught.loss_counts["gate_domain"] == 0.0
    rows = [p for m in modules_of(model) for p in m.gate.parameters()]
    optimizer = torch.optim.Adam(rows, lr=0.05)
    for _ in range(12):
        optimizer.zero_grad()
        model(tokens, domain_labels=labels, labels=tokens).loss.backward()
        optimizer.step()
    model.eval()
    with recording_gates(model) as record:
        taught = model(tokens, domain_labels=labels, output_losses=True)
    assert taught.gate_domain < 0.8 * output.gate_domain
    base = torch.stack(record.means)[..., 0].mean(0)
    assert base[0] < 0.5 < base[1]
    with pytest.raises(
        ValueError, match=r"domain_labels must have shape \[B=2, 1\] or .*got \[2\]"
    ):
        model(tokens, domain_labels=labels[:, 0], output_losses=True)
    with pytest.raises(TypeError, match="domain_labels must be integers, got torch.float32"):
        model(tokens, domain_labels=labels.float(), output_losses=True)


def test_closed_gates_have_losses_of_nothing():
    model = set_priors(make_shiftable(), 0.0)
    output = model(make_tokens(), labels=make_tokens())
    assert output.gate_entropy == output.gate_sparsity == 0.0
    assert output.loss_counts["gate_entropy"] == 2 * make_tokens().numel()
    assert output.gate_domain == output.loss_counts["gate_domain"] == 0.0


B, T, E, H, HKV, D = 2, 7, 12, 4, 2, 6


def make_base():
    """An attention with everything that pretrained ones have, as its numbers."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: 0.5 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    weights = [draw(n * D, E) for n in (H, HKV, HKV)] + [draw(E, H * D)]
    biases = [draw(n * D) for n in (H, HKV, HKV)] + [draw(E)]
    norms = [nn.RMSNorm(D, dtype=torch.float64) for _ in range(2)]
    for norm in norms:
        norm.weight.data = draw(D)
    return BaseAttention(AttentionWeights(*weights, *biases), H, HKV, *norms, 0.3)


def attend(x, base, weights, rotary):
    """Causal attention, as plain as it can be written."""
    heads = lambda y, n: y.unflatten(-1, (n, D)).transpose(1, 2)
    q = base.q_norm(heads(F.linear(x, weights.q, weights.q_bias), H))
    k = base.k_norm(heads(F.linear(x, weights.k, weights.k_bias), HKV))
    v = heads(F.linear(x, weights.v, weights.v_bias), HKV)
    q, k = (apply_rotary(y, *rotary) for y in (q, k))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    return F.linear(out.transpose(1, 2).flatten(2), weights.out, weights.out_bias)


@pytest.mark.parametrize("rank", [None, 3])
def test_the_module_is_its_formula_with_all_that_a_base_has(rank):
    torch.manual_seed(0)
    base = make_base()
    gate = DomainGate(E, gate_size=5).double()
    module = CausalSpecialists(E, H, HKV, D, gate, rank=rank)
    names = [module.add_specialist(prior=prior, base=base) for prior in (1.0, 0.0, 2.0)]
    x, attended = torch.randn(2, B, T, E, dtype=torch.float64)
    x.requires_grad_()
    attended.requires_grad_()
    positions = torch.arange(T)[None]
    rotary = RotaryEmbedding(D)(positions, torch.float64)
    options = dict(positions=positions, rotary=rotary)
    opened = attend(x, base, base.weights, rotary)  # all branches are the base
    torch.testing.assert_close(module(x, opened, base, **options).hidden_states, opened, **EXACT)
    for p in module.parameters():
        p.data += 0.2 * torch.randn(p.shape, dtype=torch.float64)
    out, gates = module(x, attended, base, **options)
    parts = [attended] + [
        attend(x, base, module.specialist(name).weights(base.weights), rotary) for name in names
    ]
    expected = (gates.gates[..., None] * torch.stack(parts, 2)).sum(2)
    assert (gates.gates[..., 2] == 0).all()
    torch.testing.assert_close(out, expected, **EXACT)
    d_out = torch.randn(B, T, E, dtype=torch.float64)
    actual, wanted = (
        torch.autograd.grad(y, (x, attended), d_out, retain_graph=True) for y in (out, expected)
    )
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)
    # what the base gets is its gate's share, to the bit
    assert torch.equal(actual[1], gates.gates[..., :1] * d_out)


def test_specialists_of_a_live_module_come_and_go():
    model, tokens = make_shiftable(), make_tokens()
    before = logits_of(model, tokens)
    for block, module in zip(model.model.layers, modules_of(model), strict=True):
        name = module.add_specialist("law", base=base_attention(block.attention))
    assert torch.equal(logits_of(model, tokens), before)
    for module in modules_of(model):
        state = module.export_specialist_state("specialist_1")
        module.load_specialist_state(name, state)
        module.remove_specialist("specialist_1")
    torch.testing.assert_close(logits_of(model, tokens), before, **EXACT)


def test_its_cost_is_that_of_what_tokens_use():
    sizes = {**SIZES, "num_hidden_layers": 1, "tie_word_embeddings": True}
    part = SpecialistsConfig(num_specialists=3, top_k=1, gate_size=4)
    config = MemAttnConfig(parts=[part], **sizes)
    line = next(x for x in estimate(config, 10).lines if x.name == "specialists")
    model = MemAttnForCausalLM(config)
    assert line.parameters == sum(p.numel() for p in modules_of(model)[0].parameters())
    gate, attention, pairs = 3 * 4 * (32 + 1), 2 * 32 * 32 + 3 * 2 * 16 * 32, 4 * 32 * 55
    assert line.flops == 2 * 10 * (gate + attention) + pairs


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: specialists(names="sql"), TypeError, "parts.specialists.names must be a list"),
        (lambda: specialists(names=["a", "a"]), ValueError, "name must be a new one, got 'a'"),
        (lambda: specialists(names=["a.b"]), ValueError, "name must be letters, digits"),
        (
            lambda: specialists(names=["a"], num_specialists=2),
            ValueError,
            "parts.specialists.num_specialists must be None or 1, the number of names, got 2",
        ),
        (
            lambda: specialists(scope="sequence"),
            ValueError,
            "parts.specialists.scope must be one of token, prefix, got 'sequence'",
        ),
        (lambda: specialists(prior=-1.0), ValueError, "parts.specialists.prior must be finite"),
        (
            lambda: specialists(domain_coefficient=-1.0),
            ValueError,
            "parts.specialists.domain_coefficient must be finite and at least 0",
        ),
        (lambda: specialists(rank=0), ValueError, "parts.specialists.rank must be at least 1"),
        (
            lambda: MemAttnConfig.titans(variant="lmm", parts=[specialists(rank=2)]),
            ValueError,
            "parts.specialists.rank must be None beside titans without attention, got 2",
        ),
        (
            lambda: CausalSpecialists(E, H, HKV, D, DomainGate(E)).add_specialist(
                base=base_attention(SegmentedAttention(E, H, head_dim=D))
            ),
            ValueError,
            r"base must have 4 heads and projections of \[\[24, 12\], \[12, 12\]",
        ),
    ],
)
def test_what_is_wrong_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


specialists = SpecialistsConfig
