"""Memory as context, a chapter memory and two specialists as adapters in one model."""

import pickle

import pytest
import torch
from adapter_factories import make_base, perturb_adapter
from model_factories import logits_of, make_tokens, pad_left
from transformers import DynamicCache

from memattn.adapters import attach_memory, attach_specialists, detach_memory, set_adapter
from memattn.evaluate import audit

MAC = dict(
    kind="titans",
    variant="mac",
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


def test_they_are_exact_together_and_each_counts():
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
def test_they_generate_with_beams_from_one_cache():
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
def test_the_loss_of_each_falls_and_of_all(learning):
    model, _ = make_perturbed(torch.float32)
    set_adapter(model, *learning)
    wanted = {loss for name in learning for loss in OWN[name]}
    assert {name for name, coefficient in model.losses.items() if coefficient} == wanted
    check_losses_fall(model, [p for p in model.parameters() if p.requires_grad], wanted)
