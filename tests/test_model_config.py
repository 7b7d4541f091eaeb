"""The configuration of the decoder, its presets, and what decoder and configuration refuse."""

import json
import subprocess
import sys

import pytest
import torch
from model_factories import logits_of, make_config, make_model, make_tokens
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from memattn.models import (
    PRESETS,
    AttentionConfig,
    MemAttnConfig,
    MemAttnForCausalLM,
    register_preset,
)


def test_config_survives_json():
    config = make_config("both", rope_theta=123.0, rms_norm_eps=1e-5)
    again = MemAttnConfig.from_dict(json.loads(config.to_json_string()))
    assert again.attention == AttentionConfig(
        kind="segmented", segment_len=7, window_size=4, num_persistent_tokens=2
    )
    assert again.rope_parameters == {"rope_type": "default", "rope_theta": 123.0}
    assert again.to_dict() == config.to_dict()
    assert type(AutoConfig.for_model("memattn")) is MemAttnConfig


def test_config_derives_what_is_not_given():
    config = MemAttnConfig(hidden_size=96, num_attention_heads=6)
    assert (config.num_key_value_heads, config.head_dim, config.intermediate_size) == (6, 16, 256)


def test_rope_theta_reaches_the_model():
    tokens = make_tokens()
    outputs = [logits_of(make_model(rope_theta=theta), tokens) for theta in (1e2, 1e4)]
    assert not torch.equal(*outputs)


DYNAMIC = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (dict(rope_parameters=DYNAMIC), ValueError, "not change with the length, .* got 'dynamic'"),
        (dict(rope_scaling=DYNAMIC), ValueError, "not change with the length, .* got 'dynamic'"),
        (
            dict(partial_rotary_factor=0.5),
            ValueError,
            "for 'default', got partial_rotary_factor",
        ),
        (dict(rope_theta=-1.0), ValueError, "rope_theta must be positive, got -1.0"),
        (dict(head_dim=3), ValueError, "head_dim must be even, got 3"),
        (dict(norm="batch"), ValueError, "norm must be one of rms, layer, got 'batch'"),
        (dict(attention=dict(kind="segmented")), ValueError, "segment_len must be given"),
        (dict(segment_len=4), TypeError, "segment_len must be given as a field of attention"),
        (dict(future_dim=4), TypeError, "future_dim must be given as a field of attention"),
    ],
)
def test_options_given_at_loading_are_checked(tmp_path, given, error, message):
    make_model("vanilla").save_pretrained(tmp_path)
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(error, match=message):
            auto.from_pretrained(tmp_path, **given)


def test_options_given_at_loading_act_and_are_saved(tmp_path):
    model, tokens = make_model("vanilla"), make_tokens()
    model.save_pretrained(tmp_path / "one")
    given = dict(rope_theta=77.0, rms_norm_eps=1e-3, dtype=torch.float64, use_cache=False)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "one", **given)
    assert other.config.rope_parameters == {"rope_type": "default", "rope_theta": 77.0}
    assert not torch.allclose(logits_of(other, tokens), logits_of(model, tokens), atol=1e-3)
    other.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.float64)
    assert again.config.rms_norm_eps == 1e-3 and again.config.use_cache is False
    assert torch.equal(logits_of(again, tokens), logits_of(other, tokens))
    wanted = dict(rope_parameters={"rope_theta": 77.0}, rms_norm_eps=1e-3, dtype=torch.float64)
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "one", **wanted)
    assert torch.equal(logits_of(third, tokens), logits_of(other, tokens))


def test_fields_that_are_set_later_are_checked_before_they_are_used(tmp_path):
    config = make_config("vanilla")
    config.rope_parameters = DYNAMIC
    with pytest.raises(ValueError, match="rope_parameters must have a rope_type whose"):
        MemAttnForCausalLM(config)
    model = make_model("vanilla")
    model.config.rope_parameters = DYNAMIC
    with pytest.raises(ValueError, match="rope_parameters must have a rope_type whose"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.rglob("*.*"))
    with pytest.raises(ValueError, match="for 'default', got factor, partial_rotary"):
        rope = {"rope_type": "default", "factor": 2.0, "partial_rotary_factor": 0.5}
        MemAttnConfig(rope_parameters=rope)


def test_initial_weights_follow_initializer_range():
    torch.manual_seed(0)
    model = MemAttnForCausalLM(make_config("window", initializer_range=0.5))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        else:
            error = abs(parameter.std().item() / 0.5 - 1)
            assert error < 4 / (2 * parameter.numel()) ** 0.5, name  # four standard errors


def test_presets_are_a_registry():
    assert list(PRESETS)[:2] == ["vanilla", "segmented"]
    with pytest.raises(ValueError, match="name must not be one of vanilla, segmented"):
        register_preset("vanilla", MemAttnConfig.vanilla)
    register_preset("wide", lambda **sizes: MemAttnConfig.segmented(window_size=999, **sizes))
    try:
        assert PRESETS["wide"](vocab_size=9).attention.window_size == 999
    finally:
        del PRESETS["wide"]


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: AttentionConfig(kind="full"), ValueError, "attention.kind must be one of causal"),
        (lambda: AttentionConfig(segment_len=4), ValueError, "attention.segment_len must be None"),
        (lambda: AttentionConfig(kind="segmented"), ValueError, "segment_len must be given"),
        (
            lambda: AttentionConfig(kind="segmented", window_size=0),
            ValueError,
            "attention.window_size must be at least 1, got 0",
        ),
        (lambda: AttentionConfig(backend="x"), ValueError, "attention.backend must be one of auto"),
        (
            lambda: AttentionConfig(num_persistent_tokens=-1),
            ValueError,
            "attention.num_persistent_tokens must be at least 0",
        ),
        (lambda: MemAttnConfig(attention=3), TypeError, "attention must be an AttentionConfig"),
        (
            lambda: MemAttnConfig(segment_len=4),
            TypeError,
            "segment_len must be given as a field of attention, got 4",
        ),
        (
            lambda: MemAttnConfig.vanilla(hiden_size=4),
            TypeError,
            "hiden_size must be a field of MemAttnConfig, got 4",
        ),
        (lambda: make_config(vocab_size=0), ValueError, "vocab_size must be at least 1, got 0"),
        (lambda: make_config(num_key_value_heads=3), ValueError, "num_key_value_heads must divide"),
        (lambda: make_config(hidden_size=30), ValueError, "hidden_size must be divisible by"),
        (lambda: make_config(head_dim=7), ValueError, "head_dim must be even, got 7"),
        (lambda: make_config(rms_norm_eps=0.0), ValueError, "rms_norm_eps must be positive"),
        (lambda: make_config(rope_theta=-1.0), ValueError, "rope_theta must be positive, got -1.0"),
        (
            lambda: make_config(rope_parameters={"rope_type": "longrope"}),
            ValueError,
            "rope_parameters must have a rope_type whose .*, got 'longrope'",
        ),
    ],
)
def test_config_error_messages(make, error, message):
    with pytest.raises(error, match=message):
        make()


TOKENS = make_tokens(T=4)


@pytest.mark.parametrize(
    "inputs, error, message",
    [
        (dict(), ValueError, "input_ids must be given, or inputs_embeds, but not both"),
        (dict(input_ids=TOKENS[0]), ValueError, "input_ids must have 2 axes"),
        (
            dict(input_ids=TOKENS, attention_mask=torch.tensor([[1, 1, 1, 1], [2, 1, 1, 1]])),
            ValueError,
            r"attention_mask must be 1 for tokens and 0 for padding, got \[2, 1, 1, 1\] in row 1",
        ),
        (
            dict(input_ids=TOKENS, attention_mask=torch.ones(2, 1, 4, 4)),
            ValueError,
            r"attention_mask must have shape \[B=2, 4\], got \[2, 1, 4, 4\]",
        ),
        (
            dict(input_ids=TOKENS, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)),
            ValueError,
            "query must have B=1 with cu_seqlens",
        ),
        (
            dict(
                input_ids=TOKENS[:1],
                cu_seqlens=torch.tensor([0, 4], dtype=torch.int32),
                attention_mask=torch.ones(1, 4),
            ),
            ValueError,
            "attention_mask must be None with cu_seqlens",
        ),
        (
            dict(
                input_ids=TOKENS[:1],
                cu_seqlens=torch.tensor([0, 4], dtype=torch.int32),
                use_cache=True,
            ),
            ValueError,
            "use_cache must not be True with packed documents",
        ),
        (
            dict(input_ids=TOKENS, past_key_values=StaticCache(make_config(), max_cache_len=8)),
            TypeError,
            "past_key_values must be a MemAttnCache .*, got StaticCache",
        ),
        (
            dict(input_ids=TOKENS, labels=TOKENS[:, :3]),
            ValueError,
            r"labels must have shape \[2, 4\], got \[2, 3\]",
        ),
        (
            dict(input_ids=TOKENS, position_ids=TOKENS[:, :3]),
            ValueError,
            r"position_ids must have shape \[B, T=4\], got \[2, 3\]",
        ),
        (
            dict(input_ids=TOKENS, output_attentions=True),
            NotImplementedError,
            "output_attentions must be False, got True",
        ),
    ],
)
def test_model_error_messages(inputs, error, message):
    with pytest.raises(error, match=message):
        make_model()(**inputs)


def test_attention_is_not_replaced_by_transformers(caplog):
    model = make_model()
    before = logits_of(model, TOKENS)
    with pytest.raises(NotImplementedError, match='attn_implementation must be "eager", which is'):
        AutoModelForCausalLM.from_config(make_config(), attn_implementation="sdpa")
    model.set_attn_implementation("sdpa")  # transformers warns, and changes nothing
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits_of(model, TOKENS), before)


def test_public_names_load_on_first_use():
    code = """
import sys
sys.modules["transformers"] = sys.modules["triton"] = None
import memattn
assert "torch" not in sys.modules and "MemAttnConfig" in dir(memattn)
attention = memattn.SegmentedAttention(8, 2)
import torch
assert attention(torch.zeros(1, 3, 8)).shape == (1, 3, 8)
try:
    memattn.MemAttnConfig
except ImportError:
    pass
else:
    raise AssertionError("transformers was not needed")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'memattn' has no attribute 'nothing'"):
        import memattn

        memattn.nothing  # noqa: B018
