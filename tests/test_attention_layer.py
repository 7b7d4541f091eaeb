"""Parts that stand instead of attention, as further layers of a decoder and of a pretrained one."""

import pytest
import torch
from adapter_factories import make_base, perturb_adapter
from model_factories import SIZES, logits_of, make_tokens, perturb

from memattn.adapters import MemoryAdapter, attach_memory, detach_memory
from memattn.evaluate import audit
from memattn.models import MemAttnConfig, MemAttnForCausalLM
from memattn.parts.attention_layer import AttentionLayerConfig

TITANS = dict(kind="titans", window_size=5, segment_len=8, chunk_size=4, memory_expansion=2)
MAC = dict(kind="attention_layer", attention={**TITANS, "variant": "mac"}, layers=[1])
IN_DECODER = [
    AttentionLayerConfig(attention={"kind": "segmented", "window_size": 4}, at="after_attention"),
    AttentionLayerConfig(attention={"kind": "causal"}, at="after_mlp", layers=(1,)),
]


def test_attached_it_starts_as_nothing_and_is_exact(tmp_path):
    model, tokens = make_base("qwen3"), make_tokens()
    before = logits_of(model, tokens)
    adapter = attach_memory(model, MAC)
    assert torch.equal(logits_of(model, tokens), before)
    model.train()(tokens, labels=tokens).loss.backward()
    reached = {n.rsplit(".", 1)[1] for n, p in adapter.named_parameters() if p.grad.any()}
    assert reached == {"scale"}
    perturb_adapter(adapter)
    logits, adapter_parts = logits_of(model.eval(), tokens), adapter.parts
    assert not torch.allclose(logits, before)
    memory = "model.layers.1.memory_adapters.default.parts.attention_layer.attention.memory."
    assert model.parameter_roles()[memory + "memory_weights.0"].kind == "memory"
    options = dict(do_sample=False, max_new_tokens=9, eos_token_id=None, num_beams=2)
    expected = model.generate(tokens[:, :9], use_cache=False, **options)
    assert torch.equal(model.generate(tokens[:, :9], **options), expected)
    adapter.save_pretrained(tmp_path)
    detach_memory(model)
    again = MemoryAdapter.from_pretrained(model, tmp_path)
    assert torch.equal(logits_of(model, tokens), logits) and again.parts == adapter_parts


def test_in_a_decoder_it_counts_saves_and_is_estimated(tmp_path):
    torch.manual_seed(0)
    model = MemAttnForCausalLM(MemAttnConfig.vanilla(parts=IN_DECODER, **SIZES)).double().eval()
    plain = MemAttnForCausalLM(MemAttnConfig.vanilla(**SIZES)).double().eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    tokens = make_tokens()
    assert torch.equal(logits_of(model, tokens), logits_of(plain, tokens))
    logits = logits_of(perturb(model), tokens)
    assert audit(model, seq_len=12).verdict == "all 0"
    model.save_pretrained(tmp_path)
    loaded = MemAttnForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert loaded.config.parts == IN_DECODER
    torch.testing.assert_close(logits_of(loaded, tokens), logits, rtol=0, atol=1e-12)
    cost = IN_DECODER[0].cost(model.config.sizes, 16)
    layer = model.model.layers[1].parts["attention_layer"]
    assert cost.parameters == sum(p.numel() for p in layer.parameters()) and cost.flops > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(attention={"kind": "toy"}), "attention_layer.attention.kind must be"),
        (
            dict(attention=TITANS, at="attention"),
            "resolved_place must not be attention",
        ),
        (
            dict(attention=TITANS, at="beside_attention"),
            "attention_layer.at must be a place of",
        ),
        (dict(attention=TITANS, rope_theta=0.0), "rope_theta must be positive, got 0.0"),
        (dict(attention={**TITANS, "memory_heads": 5}), "memory_heads must divide hidden_size=32"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        attach_memory(make_base(), {"kind": "attention_layer", **options})


def test_two_that_hand_on_the_same_are_refused():
    titans = {**TITANS, "value_residual": True}
    part = {"kind": "attention_layer", "attention": titans}
    with pytest.raises(ValueError, match="carry nothing that titans does, got value_residual"):
        MemAttnConfig.titans(parts=[part], value_residual=True, **SIZES)
