"""Titans: what its layers are made of; that they are exact is in the tests of every system."""

import pytest
import torch
from model_factories import make_config, make_model, make_tokens

from memattn.evaluate import audit
from memattn.models import MemAttnCache, MemAttnConfig, MemAttnForCausalLM

VARIANTS = ("lmm", "mac", "mac_parallel", "mag", "mal")


@pytest.mark.parametrize("variant", VARIANTS)
def test_audit_finds_no_leak(variant):
    # two chunks in a segment of MAC
    short = dict(segment_len=6, chunk_size=3) if variant == "mac" else {}
    model = make_model(f"titans-{variant}", torch.float32, num_hidden_layers=1, **short)
    report = audit(model, seq_len=12 if short else 21)
    assert report.verdict == "all 0"


def test_layers_are_memory_and_attention_joined_as_defined():
    x = torch.randn(2, 14, 32, dtype=torch.float64)
    captured = {}
    for variant in ("lmm", "mag", "mal"):
        model = make_model(f"titans-{variant}", num_hidden_layers=1)
        layer = model.model.layers[0]
        hook = lambda m, args, out, v=variant: captured.update({v: (args[0], out)})
        layer.attention.register_forward_hook(hook)
        with torch.no_grad():
            model(inputs_embeds=x, use_cache=False)
            normed, out = captured[variant]
            rotary = model.model.rotary
            angles = None if rotary is None else rotary(torch.arange(14)[None], torch.float64)
            remembered = layer.attention.memory(normed).out
            if variant == "lmm":
                expected = remembered
            elif variant == "mal":
                expected = layer.attention.attention(remembered, rotary=angles)
            else:
                y = layer.attention.attention(normed, rotary=angles)
                gate = layer.attention.gate
                scale = lambda u, eps: u / (u.square().mean(-1, keepdim=True) + eps).sqrt()
                eps = model.config.rms_norm_eps
                opened = (scale(remembered, eps) * gate.gate_norm.weight).sigmoid()
                expected = scale(y, eps) * gate.value_norm.weight * opened
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("persistent", [0, 2])
@pytest.mark.parametrize("variant", ["lmm", "mac", "mag"])
def test_new_memories_have_the_rates_asked_for(variant, persistent, tmp_path):
    rates = dict(lr=0.1, momentum=0.7, decay=0.01)
    model = MemAttnForCausalLM(
        make_config(f"titans-{variant}", num_persistent_tokens=persistent, **rates)
    )
    memories = [block.attention.memory for block in model.model.layers]
    for memory in memories:
        assert not memory.rate_proj.weight.any()
        found = memory.rate_proj.bias.sigmoid().view(len(rates), -1)
        expected = torch.tensor(list(rates.values()))[:, None].expand_as(found)
        torch.testing.assert_close(found, expected)
    # and loaded ones keep theirs
    with torch.no_grad():
        memories[0].rate_proj.bias.add_(1.0)
    model.save_pretrained(tmp_path)
    again = MemAttnForCausalLM.from_pretrained(tmp_path).model.layers[0].attention.memory
    assert torch.equal(again.rate_proj.bias, memories[0].rate_proj.bias)
    assert torch.equal(again.memory_weights[0], memories[0].memory_weights[0])


def test_a_text_beyond_the_window_is_remembered():
    tokens = make_tokens(B=1, T=40)
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1 - 3) % 50 + 3
    memory, window = make_model("titans-mag"), make_model("window")
    last = lambda model, ids: model(ids, use_cache=False).logits[:, -1]
    with torch.no_grad():
        assert torch.equal(last(window, tokens), last(window, other))
        assert not torch.equal(last(memory, tokens), last(memory, other))


def test_memory_weights_and_persistent_tokens_are_memory_and_learn():
    model = make_model("titans-mag").train()
    roles = model.parameter_roles()
    tokens = make_tokens()
    model(tokens, labels=tokens).loss.backward()
    memory = [name for name, role in roles.items() if role.kind == "memory"]
    assert {name.rsplit("attention.", 1)[1] for name in memory} == {
        *("memory.memory_weights.0", "memory.memory_weights.1", "memory.persistent_tokens"),
        *("persistent_key", "persistent_value"),
    }
    parameters = dict(model.named_parameters())
    assert all(parameters[name].grad.abs().max() > 0 for name in memory)


def test_flops_are_those_of_projections_pairs_and_memory():
    length, E = 10, 32
    found = {
        variant: make_config(f"titans-{variant}").attention.cost(
            make_config(f"titans-{variant}").sizes, length
        )
        for variant in VARIANTS
    }
    # 4 heads of 8: W = 8 * 16 * 2 = 256, widths 8 16 8, chunks of 9
    memory = 4 * length * (2 * 256 + 2 * 128 + 8 * 256 + 10 * 48)
    projections = 5 * E * E + 12 * E + 3 * E * 3  # q k v gate o, 3 rates of 4 heads, convolutions
    assert found["lmm"].flops == 2 * length * projections + memory
    pairs = sum(min(i + 1, 5) + 2 for i in range(length))
    attention = 2 * length * (2 * E * E + 2 * E * 16) + 4 * E * pairs
    assert found["mag"].flops == found["mal"].flops == found["lmm"].flops + attention
    # segments of 9: two keys for each token in sight, and the memory's keys are projected too
    pairs = sum(2 * (i % 9 + 1) + 2 for i in range(length))
    attention = 2 * length * (2 * E * E + 4 * E * 16) + 4 * E * pairs
    assert found["mac_parallel"].flops == found["lmm"].flops + attention
    # a second read: query with its convolution, gate, output, and the memory itself
    read = 2 * (3 * E * E + 3 * E) + 4 * 2 * 256
    # the same for 2 long-term tokens before each of 2 segments, keys and values of them and of what
    # it gives, and 2 keys more for each in sight
    longterm = 2 * 2 * (read + 2 * 4 * E * 16) + 4 * E * length * 2 * 2
    assert found["mac"].flops == found["mac_parallel"].flops + length * read + longterm


def test_crop_is_refused_before_anything_changes():
    model, tokens = make_model("titans-lmm"), make_tokens()
    cache = MemAttnCache(model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        with pytest.raises(ValueError, match=r"tokens_to_remove must .*activate_past_recording"):
            cache.crop(-1)
        cache.activate_past_recording()
        model(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match=r"tokens_to_remove must fit what the memory keeps"):
        cache.crop(-20)
    assert cache.position == 46
    cache.crop(-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(variant="mean"),
            r"attention.variant must be one of lmm, mac, mac_parallel, mag, mal, got 'mean'",
        ),
        (dict(memory_depth=5), r"attention.memory_depth must be at most 4, got 5"),
        (dict(chunk_size=0), r"attention.chunk_size must be at least 1, got 0"),
        (dict(segment_len=0), r"attention.segment_len must be at least 1, got 0"),
        (
            dict(variant="mac", segment_len=20, chunk_size=8),
            r"attention.chunk_size must divide segment_len=20, got 8",
        ),
        (dict(decay=1.0), r"attention.decay must be between 0 and 1, got 1.0"),
        (dict(memory_heads=3), r"attention.memory_heads must divide hidden_size=512, got 3"),
    ],
)
def test_wrong_fields_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MemAttnConfig.titans(**options)
