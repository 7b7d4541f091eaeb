"""Rotary positions with scaled frequencies: those of transformers' Llama, and errors."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from adapter_factories import make_base, perturb_adapter
from model_factories import SIZES, logits_of, make_model, make_tokens
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from memattn.adapters import attach_memory
from memattn.evaluate import audit
from memattn.models import MemAttnConfig
from memattn.nn.rope_scaling import make_rotary
from memattn.parts.base import make_part
from memattn.testing import assert_within_budget

LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
SCALED = {
    "linear": dict(rope_type="linear", factor=3.0),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    "mscale": dict(rope_type="yarn", factor=4.0, mscale=2.0, mscale_all_dim=0.5, beta_fast=4.0),
    "llama3": LLAMA3,
    "proportional": dict(rope_type="proportional", partial_rotary_factor=0.5),
}


def rms_norm(module, x):
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def make_llama(model):
    """Llama of transformers with the weights and the scaled positions of a model."""
    rope = dict(model.config.rope_parameters)
    config = LlamaConfig(
        **SIZES,
        head_dim=8,
        max_position_embeddings=model.config.max_position_embeddings,
        rms_norm_eps=model.config.rms_norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    llama = LlamaForCausalLM(config).double().eval()
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    weights = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in (*names.items(), (".attention.", ".self_attn.")):
            name = name.replace(ours, theirs)
        weights[name] = tensor
    llama.load_state_dict(weights)
    return llama


@pytest.mark.parametrize("name", SCALED)
def test_values_are_those_of_llama(name):
    rope = SCALED[name]
    model, tokens = make_model("vanilla", rope_parameters=dict(rope)), make_tokens(T=31)
    llama = make_llama(model)
    theirs, ours = llama.model.rotary_emb, model.model.rotary
    positions = torch.arange(31)[None]
    exact = ours(positions, torch.float64)
    for actual, wide, low in zip(
        ours(positions), exact, theirs(torch.zeros(()), positions), strict=True
    ):
        assert_within_budget("angles", actual[0, 0], low[0, :, :4], wide[0, 0])

    # transformers computes angles, norms and eager softmax in float32 whatever the dtype
    def wide_angles(x, position_ids):
        angle = position_ids[..., None].double() * theirs.inv_freq.double()
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos() * theirs.attention_scaling, angle.sin() * theirs.attention_scaling

    logits = logits_of(model, tokens)
    narrow = [logits_of(copy.deepcopy(m).float(), tokens) for m in (model, llama)]
    assert_within_budget("logits", *narrow, logits)
    llama.set_attn_implementation("sdpa")
    theirs.forward = wide_angles
    for module in llama.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = partial(rms_norm, module)
    torch.testing.assert_close(logits, logits_of(llama, tokens), rtol=0, atol=1e-12)
    assert not torch.allclose(logits, logits_of(make_model("vanilla"), tokens))


@pytest.mark.parametrize("system", ["both", "future"])
def test_decoding_is_prefill_and_folders_keep_them(system, tmp_path):
    rope = dict(LLAMA3, rope_theta=99.0)
    model = make_model(system, rope_parameters=rope)
    assert audit(model, seq_len=24).verdict == "all 0"
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.rope_parameters == rope
    tokens = make_tokens(T=9)
    options = dict(do_sample=False, max_new_tokens=12, eos_token_id=None)
    one_step = loaded.float().eval().generate(tokens, **options)  # float32: by one call a layer
    assert torch.equal(one_step, loaded.generate(tokens, use_cache=False, **options))
    tokens = make_tokens(T=31)
    given = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    other = AutoModelForCausalLM.from_pretrained(tmp_path, **given, dtype=torch.float64).eval()
    assert other.config.rope_parameters["rope_theta"] == 99.0
    assert other.model.rotary.frequencies[0] == 0.5
    assert not torch.allclose(logits_of(other, tokens), logits_of(model, tokens))


def test_a_layer_attached_to_another_model_has_them():
    part = {"kind": "attention_layer", "attention": {"kind": "causal"}}
    tokens, logits = make_tokens(), []
    for rope in (None, SCALED["linear"]):
        model = make_base("qwen3")
        adapter = attach_memory(model, {**part, "rope_parameters": rope})
        (made,) = adapter.parts
        assert make_part(made.to_dict(), "part", attention=False) == made
        perturb_adapter(adapter)
        logits.append(logits_of(model, tokens))
    assert not torch.allclose(*logits)


@pytest.mark.parametrize(
    ("rope", "error", "message"),
    [
        (
            dict(rope_type="dynamic", factor=2.0),
            ValueError,
            "not change with the length, .*'dyn",
        ),
        (dict(rope_type="longrope"), ValueError, "do not change with the length, else decoding"),
        (dict(rope_type="ntk"), ValueError, "have a rope_type among default, linear, .* got 'ntk'"),
        (dict(rope_type="linear"), ValueError, "have factor for 'linear', got no factor"),
        (dict(rope_type="linear", factor=0.5), ValueError, r"\['factor'\] must be at least 1"),
        (
            dict(rope_type="linear", factor="2"),
            TypeError,
            r"'factor'\] must be a number, got str",
        ),
        (dict(rope_type="linear", factor=2.0, beta=1), ValueError, "have only .*, got beta"),
        (dict(SCALED["yarn"], truncate=1), TypeError, r"\['truncate'\] must be True or False"),
        (
            dict(SCALED["yarn"], beta_slow=40.0),
            ValueError,
            "beta_fast'. must be above beta_slow",
        ),
        (dict(LLAMA3, high_freq_factor=1.0), ValueError, "must be above low_freq_factor=1.0"),
        (
            dict(rope_type="proportional", partial_rotary_factor=1.5),
            ValueError,
            "partial_rotary_factor'. must be at most 1",
        ),
    ],
)
def test_errors_name_the_parameter(rope, error, message):
    for make in (
        lambda: MemAttnConfig.vanilla(rope_parameters=copy.copy(rope), **SIZES),
        lambda: make_rotary(8, rope, 64),
    ):
        with pytest.raises(error, match=f"rope_parameters.*{message}"):
            make()


def test_where_nothing_turns_they_are_refused():
    with pytest.raises(ValueError, match='have rope_type "default" with learned positions'):
        MemAttnConfig(position_embedding="learned", rope_parameters=LLAMA3)
