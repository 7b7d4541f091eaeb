<<<<<<< HEAD
"""Memory as context, a chapter memory and two specialists in one model."""

import pickle

import pytest
import torch
from adapter_factories import make_base, perturb_adapter
from model_factories import SIZES, logits_of, make_tokens, pad_left, perturb
from transformers import DynamicCache

from memattn.adapters import attach_memory, attach_specialists, detach_memory, set_adapter
=======
"""One decoder with a memory as context, chapters and two specialists, from a configuration."""

import pytest
import torch
from model_factories import SIZES, logits_of, make_tokens, perturb
from specialist_factories import CHAPTERS, specialists_part

>>>>>>> main
from memattn.evaluate import audit
from memattn.models import MemAttnCache, MemAttnConfig, MemAttnForCausalLM

MAC = dict(
    kind="titans",
    variant="mac",
<<<<<<< HEAD
    segment_len=8,
    chunk_size=4,
    memory_depth=1,
    num_persistent_tokens=2,
)
CHAPTERS = dict(
    kind="chapter_memory",
    num_memory_tokens=32,
    use_chapters=True,
    num_chapters=8,
    top_k_chapters=2,
    routing_block_size=4,
    memory_layer_placement="last_k",
    memory_layer_k=1,
    load_balance_coefficient=0.3,
)
SPECIALISTS = dict(
    num_specialists=2,
    prior=1.0,
    gate_size=4,
    layers=[0],
    entropy_coefficient=0.3,
    sparsity_coefficient=0.3,
)
NAMES = ("mac", "chapters", "specialists")


def make_three(dtype=torch.float64):
    """A tiny Qwen 3 with the three as adapters, which run together."""
    model = make_base("qwen3", dtype)
    mac = {"kind": "attention_layer", "attention": MAC, "layers": [1]}
    adapters = {
        "mac": attach_memory(model, mac, name="mac"),
        "chapters": attach_memory(model, CHAPTERS, name="chapters"),
        "specialists": attach_specialists(model, SPECIALISTS),
    }
    set_adapter(model, *NAMES)
    return model, adapters


def make_perturbed(dtype=torch.float64):
    """The same, where no zero hides a part."""
    model, adapters = make_three(dtype)
    for adapter in adapters.values():
        perturb_adapter(adapter)
    for name in adapters["specialists"].specialists.names:
        adapters["specialists"].specialists.set_prior(name, 1.0)
    return model, adapters


def test_as_adapters_they_are_exact_together_and_each_counts():
    model, _ = make_perturbed()
    assert audit(model, seq_len=12).passed
    tokens = make_tokens()
    together = logits_of(model, tokens)
    for left_out in NAMES:
        set_adapter(model, *(name for name in NAMES if name != left_out))
        assert not torch.allclose(logits_of(model, tokens), together), left_out
    detach_memory(model)
    assert torch.equal(logits_of(model, tokens), logits_of(make_base("qwen3"), tokens))


@torch.no_grad()
def test_as_adapters_they_generate_with_beams_from_one_cache():
    model, _ = make_perturbed()
    tokens, mask = pad_left([make_tokens()[0, :9], make_tokens()[1, :4]], 9)
    options = dict(do_sample=False, max_new_tokens=4, eos_token_id=None, num_beams=2)
    found = model.generate(tokens, attention_mask=mask, **options)
    expected = model.generate(tokens, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(found, expected)
    tokens, cache = make_tokens(T=15), DynamicCache()
    model(tokens[:, :10], past_key_values=cache)
    cache = pickle.loads(pickle.dumps(cache))
    rest = model(tokens[:, 10:], past_key_values=cache).logits
    torch.testing.assert_close(rest, logits_of(model, tokens)[:, 10:], rtol=0, atol=1e-12)


def check_losses_fall(model, learning, wanted):
    """Train the parameters that learn, and compare what was lost at the first and the last step."""
    tokens, losses = make_tokens(), []
    optimizer = torch.optim.AdamW(learning, lr=2e-2)
    for _ in range(12):
        output = model.train()(tokens, labels=tokens)
        losses.append({name: output.losses[name] for name in wanted} | {"loss": output.loss})
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    for name, loss in losses[0].items():
        assert losses[-1][name] < loss, name


OWN = {  # losses of the three
    "mac": (),
    "chapters": ("load_balance_loss",),
    "specialists": ("gate_entropy", "gate_sparsity"),
}


@pytest.mark.parametrize("learning", [*((name,) for name in NAMES), NAMES])
def test_as_adapters_the_loss_of_each_falls_and_of_all(learning):
    model, _ = make_perturbed(torch.float32)
    set_adapter(model, *learning)
    wanted = {loss for name in learning for loss in OWN[name]}
    assert {name for name, coefficient in model.losses.items() if coefficient} == wanted
    check_losses_fall(model, [p for p in model.parameters() if p.requires_grad], wanted)


def make_decoder(dtype=torch.float64, **changes):
    """A decoder that is the three by its configuration alone."""
    torch.manual_seed(0)
    parts = [CHAPTERS, {"kind": "specialists", **SPECIALISTS}]
    values = {"attention": MAC, "parts": parts, **SIZES, "num_hidden_layers": 1, **changes}
    return perturb(MemAttnForCausalLM(MemAttnConfig(**values)).to(dtype).eval())


def test_as_a_decoder_they_are_exact_together_and_each_counts():
    model, tokens = make_decoder(), make_tokens()
    assert audit(model, seq_len=12).verdict == "all 0"
    logits = logits_of(model, tokens)
    for left in (
        dict(attention={"kind": "causal"}),
        dict(parts=[CHAPTERS]),
        dict(parts=model.config.parts[1:]),
    ):
        other = make_decoder(**left)
        missing = other.load_state_dict(model.state_dict(), strict=False).missing_keys
        assert not missing or "attention" in left
        assert not torch.allclose(logits_of(other, tokens), logits)


@torch.no_grad()
def test_as_a_decoder_they_generate_with_beams_from_one_cache(tmp_path):
    model = make_decoder()
    tokens, mask = pad_left([make_tokens()[0, :9], make_tokens()[1, :4]], 9)
    options = dict(do_sample=False, max_new_tokens=4, eos_token_id=None, num_beams=2)
    found = model.generate(tokens, attention_mask=mask, **options)
    expected = model.generate(tokens, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(found, expected)
    tokens, cache = make_tokens(T=15), MemAttnCache(model.config)
    model(tokens[:, :10], past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    cache = MemAttnCache.load(tmp_path / "cache.safetensors")
    rest = model(tokens[:, 10:], past_key_values=cache).logits
    torch.testing.assert_close(rest, logits_of(model, tokens)[:, 10:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("learning", [*((name,) for name in NAMES), NAMES])
def test_as_a_decoder_the_loss_of_each_falls_and_of_all(learning):
    model = make_decoder(torch.float32)
    words = {"mac": ".attention.", "chapters": "chapter_memory", "specialists": ".specialists."}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(words[own] in name for own in learning))
    wanted = {loss for name in learning for loss in OWN[name]}
    check_losses_fall(model, [p for p in model.parameters() if p.requires_grad], wanted)
=======
    segment_len=4,
    chunk_size=4,
    memory_depth=1,
    num_persistent_tokens=1,
    conv_size=2,
)
PARTS = (
    CHAPTERS | dict(load_balance_coefficient=1.0),
    specialists_part(scope="prefix", top_k=1, activation="sigmoid", entropy_coefficient=1.0),
)


def make_composed(attention=MAC, parts=PARTS, dtype=torch.float64, **sizes):
    torch.manual_seed(0)
    config = MemAttnConfig(attention=attention, parts=list(parts), **SIZES | sizes)
    return perturb(MemAttnForCausalLM(config).to(dtype).eval())


def test_it_is_exact():
    report = audit(make_composed(num_hidden_layers=1), seq_len=12)
    assert report.verdict == "all 0", [row for row in report.rows if row.value]


@torch.no_grad()
def test_beams_go_on_from_one_cache_that_was_saved(tmp_path):
    model, tokens = make_composed(), make_tokens(T=11)
    options = dict(max_new_tokens=6, do_sample=False, num_beams=3, eos_token_id=None)
    expected = model.generate(tokens, **options)
    cache = MemAttnCache(model.config)
    model(tokens[:, :9], past_key_values=cache)
    cache.save(tmp_path / "state.safetensors")
    cache = MemAttnCache.load(tmp_path / "state.safetensors")
    assert list(cache.layers[0].parts) == ["attention", "chapter_memory", "specialists"]
    cache.batch_repeat_interleave(3)
    assert torch.equal(model.generate(tokens, past_key_values=cache, **options), expected)


@pytest.mark.parametrize("removed", ["memory", "chapter_memory", "specialists"])
def test_each_part_changes_the_logits(removed):
    model, tokens = make_composed(), make_tokens()
    attention, state = MAC, model.state_dict()
    if removed == "memory":  # the same attention, in the same segments
        attention = dict(kind="segmented", segment_len=4, num_persistent_tokens=1)
        state = {name.replace("attention.attention.", "attention."): x for name, x in state.items()}
    rest = make_composed(attention, [part for part in PARTS if part["kind"] != removed])
    assert not rest.load_state_dict(state, strict=False).missing_keys
    assert not torch.allclose(logits_of(rest, tokens), logits_of(model, tokens))


def test_all_learn_together_and_each_alone():
    whose = {
        "memory": ".attention.memory.",
        "chapter_memory": "chapter_memory",
        "specialists": ".specialists.",
    }
    tokens = make_tokens()
    for parts in (whose, *([name] for name in whose)):
        model = make_composed(dtype=torch.float32).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(whose[part] in name for part in parts))
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=1e-2)
        found = []
        for _ in range(6):
            output = model(tokens, labels=tokens)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append((output.lm_loss, output.load_balance_loss, output.gate_entropy))
        fell = [after < before for before, after in zip(found[0], found[-1], strict=True)]
        assert fell[0], (parts, found)
        assert all(fell) or len(parts) == 1, found  # those of the parts, too
>>>>>>> main
