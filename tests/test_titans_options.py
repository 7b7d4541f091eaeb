"""Titans: its preset beside the plain decoder, and what its layers can have beyond the defaults."""

import pytest
import torch
from model_factories import (
    SIZES,
    enable_checkpointing,
    logits_of,
    make_config,
    make_model,
    make_tokens,
)

from memattn.models import PRESETS, MemAttnConfig, MemAttnForCausalLM, vanilla_of_equal_parameters
from memattn.parts.causal import CausalConfig


@pytest.mark.parametrize("window_size", [None, 6])
def test_the_plain_decoder_has_as_many_parameters(window_size):
    assert PRESETS["titans"]().attention.kind == "titans"
    sizes = dict(mlp="gelu", head_dim=10, tie_word_embeddings=False)
    other = make_config("titans-mag", **sizes)
    plain = vanilla_of_equal_parameters(other, window_size=window_size)
    count = lambda config: sum(p.numel() for p in MemAttnForCausalLM(config).parameters())
    one_wider = 2 * 2 * SIZES["hidden_size"]  # layers, projections of the MLP
    assert abs(count(plain) - count(other)) <= one_wider / 2
    assert plain.intermediate_size > other.intermediate_size
    if window_size is None:
        assert plain.attention == CausalConfig()
    else:
        assert plain.attention.spans == (None, window_size)
    same = ("hidden_size", "num_key_value_heads", "head_dim", "vocab_size", "mlp", "bos_token_id")
    assert all(getattr(plain, name) == getattr(other, name) for name in same)


def test_a_model_smaller_than_any_plain_decoder_is_refused():
    small = MemAttnConfig.titans(
        variant="lmm",
        memory_heads=1,
        memory_head_dim=1,
        memory_depth=1,
        intermediate_size=1,
        num_persistent_tokens=0,
        **{name: size for name, size in SIZES.items() if name != "intermediate_size"},
    )
    with pytest.raises(ValueError, match="config must have .* parameters or more"):
        vanilla_of_equal_parameters(small)


RESIDUALS = dict(value_residual=True, neural_mem_weight_residual=True)


def test_residuals_are_what_the_layer_before_had():
    """Two layers of MAG, the second by hand with values and memory output of the first."""
    model = make_model("titans-mag")
    layers = [block.attention for block in model.model.layers]
    found = [[], []]
    for layer, seen in zip(layers, found, strict=True):
        layer.register_forward_hook(lambda module, args, out, seen=seen: seen.extend([*args, out]))
    tokens = make_tokens()
    with torch.no_grad():
        logits_of(model, tokens)
        (x, _, _), (y, context, out) = found
        first, second = layers
        assert first.value_mix is None
        value, before = first.attention.v_proj(x), first.memory(x).out
        share = second.value_mix.gate(y).sigmoid().repeat_interleave(8, -1)  # heads of 8
        mixed = (1 - share) * second.attention.v_proj(y) + share * value
        attended = second.attention(y, rotary=context.rotary, change_value=lambda _: mixed)
        remembered = second.memory(y, kv_states=y + before).out
        torch.testing.assert_close(second.gate(attended, remembered), out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["mac", "mac_parallel", "mal"])
def test_each_option_is_read_and_learns(variant):
    tokens, known = make_tokens(), []
    for option in ({}, *({name: True} for name in RESIDUALS), dict(num_longterm_mem_tokens=3)):
        if "num_longterm_mem_tokens" in option and variant != "mac":
            continue
        plain = dict(num_longterm_mem_tokens=0, **dict.fromkeys(RESIDUALS, False))
        model = make_model(f"titans-{variant}", **plain | option).train()
        # what is new has its own parameters: those that all have are alike
        state = known[0][1].state_dict() if known else model.state_dict()
        model.load_state_dict(state, strict=False)
        logits = logits_of(model, tokens)
        assert all(not torch.equal(logits, other) for other, _ in known)
        known.append((logits, model))
        model(tokens, labels=tokens).loss.backward()
        for name, parameter in model.named_parameters():
            if "value_mix" in name or "longterm" in name:
                assert parameter.grad.abs().max() > 0, name
                assert ("longterm" in name) == (name in model.parameter_roles())
    counts = [sum("longterm" in name for name, _ in m.named_parameters()) for _, m in known]
    assert counts == [0, 0, 0, 2][: len(counts)]


def test_checkpointing_hands_on_the_same():
    gradients = []
    for checkpoint in (False, True):
        model = make_model("titans-mac").train()
        if checkpoint:
            enable_checkpointing(model)
        tokens = make_tokens()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_sizes_of_the_memory():
    sizes = lambda **options: (
        config := MemAttnConfig.titans(hidden_size=128, **options)
    ).attention.memory_sizes(config.sizes)
    three = dict(num_attention_heads=3, head_dim=64)
    assert sizes() == (8, 16)
    assert sizes(memory_heads=2) == (2, 64)
    assert sizes(memory_head_dim=5) == (8, 5)
    assert sizes(memory_dim=192) == (8, 24)
    assert sizes(**three) == (2, 64)  # 3 heads do not divide 128
    assert sizes(memory_dim=192, **three) == (3, 64)
    assert sizes(memory_dim=96, memory_head_dim=32) == (3, 32)
    assert sizes(memory_dim=96, memory_heads=2) == (2, 48)
    options = dict(hidden_size=128, head_dim=64, num_attention_heads=3, num_key_value_heads=3)
    model = make_model("titans-mac", num_hidden_layers=1, **options)
    layer = model.model.layers[0].attention
    assert layer.attention.q_proj.weight.shape == (192, 128)
    assert layer.memory.memory_weights[0].shape == (2, 128, 64)
    assert logits_of(model, make_tokens()).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(memory_dim=0), "attention.memory_dim must be at least 1, got 0"),
        (
            dict(memory_dim=20),
            "attention.memory_dim must be a multiple of the head size 64, got 20",
        ),
        (
            dict(memory_dim=96, memory_heads=5),
            "attention.memory_heads must divide memory_dim=96, got 5",
        ),
        (
            dict(memory_dim=96, memory_heads=2, memory_head_dim=32),
            "memory_heads must have memory_head_dim=32 features and make up memory_dim=96, got 2",
        ),
        (dict(value_residual=1), "attention.value_residual must be True or False, got int"),
        (
            dict(variant="lmm", value_residual=True),
            "attention.value_residual must be False with variant='lmm', which has no attention",
        ),
        (
            dict(variant="mag", num_longterm_mem_tokens=4),
            "attention.num_longterm_mem_tokens must be 0 with variant='mag', .*, got 4",
        ),
        (
            dict(num_longterm_mem_tokens=-1),
            "attention.num_longterm_mem_tokens must be at least 0, got -1",
        ),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        MemAttnConfig.titans(**options)
