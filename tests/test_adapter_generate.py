"""Generation with attached parts: the model's own cache carries their state."""

import copy
import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from adapter_factories import ScaledConfig, make_attached, make_base, perturb_adapter
from model_factories import logits_of, make_tokens, pad_left
from toy_part import ToyConfig
from transformers import DynamicCache, StaticCache

from memattn.adapters import attach_memory, disable_adapters, enable_adapters, set_adapter
from memattn.models import MemAttnCache, MemAttnConfig
from memattn.parts import AddedPart, PartOutput, register_part

OPTIONS = dict(max_new_tokens=9, eos_token_id=None, pad_token_id=0)
WAYS = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, top_k=5),
    "beams": dict(do_sample=False, num_beams=3),
    "beams that sample": dict(do_sample=True, num_beams=2, num_return_sequences=2),
}


@register_part
@dataclass(frozen=True, kw_only=True)
class StatelessConfig(AddedPart):
    """A linear map of each token: it has nothing to remember."""

    kind: ClassVar[str] = "stateless"
    place: ClassVar[str] = "after_attention"

    @property
    def needs_state(self):
        return False

    def build(self, sizes, layer):
        return torch.nn.Linear(sizes.hidden_size, sizes.hidden_size)

    def run(self, module, hidden_states, context):
        hidden_states = hidden_states * (1 + context.positions.clamp(min=0)[..., None])
        return PartOutput(module(hidden_states))


def generate(model, tokens, mask=None, **options):
    torch.manual_seed(0)
    return model.generate(tokens, attention_mask=mask, **OPTIONS | options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "gpt2"])
def test_generates_the_same_with_and_without_a_cache(architecture, way):
    model = make_attached(architecture)
    rows = [make_tokens()[0, :9], make_tokens()[1, :4]]
    tokens, mask = pad_left(rows, 9)
    cached = generate(model, tokens, mask, **WAYS[way])
    assert torch.equal(cached, generate(model, tokens, mask, use_cache=False, **WAYS[way]))
    if way == "greedy":
        assert torch.equal(cached[1:, 5:], generate(model, tokens[1:, 5:], **WAYS[way]))


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_guesses_are_taken_back(architecture):
    model, tokens = make_attached(architecture), make_tokens(B=1, T=5).repeat(1, 3)
    expected = generate(model, tokens, do_sample=False)
    assert torch.equal(
        generate(model, tokens, prompt_lookup_num_tokens=3, do_sample=False), expected
    )
    assistant = make_attached(architecture)
    for parameter in assistant.get_output_embeddings().parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # often right
    actual = generate(model, tokens, assistant_model=assistant, do_sample=False)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("layers", [None, [1]])
@torch.no_grad()
def test_a_cache_of_the_caller(layers):
    model, tokens = make_attached(part=ScaledConfig(layers=layers)), make_tokens(T=20)
    whole = logits_of(model, tokens)
    cache = DynamicCache()

    def feed(begin, end, cache):
        logits = model(tokens[:, begin:end], past_key_values=cache).logits
        torch.testing.assert_close(logits, whole[:, begin:end], rtol=0, atol=1e-12)

    feed(0, 7, cache)
    assert isinstance(cache, DynamicCache)
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        feed(7, 12, copied)
    feed(7, 10, cache)  # the copies had their own state
    with pytest.raises(ValueError, match="tokens_to_remove must leave what later tokens see"):
        cache.crop(-1)
    cache.activate_past_recording()
    model(tokens[:, :4], past_key_values=cache)  # a wrong guess
    cache.crop(-4)
    feed(10, 13, cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([1]))
    logits = model(tokens[:1, 13:], past_key_values=cache).logits
    torch.testing.assert_close(logits, whole[:1, 13:], rtol=0, atol=1e-12)
    cache.reset()
    feed(0, 5, cache)


@torch.no_grad()
def test_a_prefix_for_several_rows():
    model, tokens = make_attached("qwen3"), make_tokens(B=1, T=12)
    cache = DynamicCache()
    model(tokens[:, :8], past_key_values=cache)
    cache.batch_repeat_interleave(3)
    logits = model(tokens[:, 8:].expand(3, -1), past_key_values=cache).logits
    whole = logits_of(model, tokens)[:, 8:].expand(3, -1, -1)
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-12)


@torch.no_grad()
def test_caches_that_do_not_fit_are_refused():
    model, tokens = make_base(), make_tokens(T=6)
    filled = model(tokens, use_cache=True).past_key_values
    attach_memory(model, ScaledConfig(), name="a")
    attach_memory(model, ToyConfig(), name="b")

    def feed(cache):
        return model(tokens, past_key_values=cache)

    with pytest.raises(ValueError, match="past_key_values must be filled with the attached parts"):
        feed(filled)
    static = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(
        TypeError, match="past_key_values must be a DynamicCache .* got StaticCache"
    ):
        feed(static)
    with pytest.raises(TypeError, match="past_key_values must be a DynamicCache"):
        generate(model, tokens, cache_implementation="static")
    own = MemAttnCache(MemAttnConfig.vanilla(hidden_size=32, num_attention_heads=4))
    with pytest.raises(TypeError, match="past_key_values must be a DynamicCache"):
        feed(own)
    cache = feed(None).past_key_values
    set_adapter(model, "a")
    with pytest.raises(
        ValueError, match=r"past_key_values must be of scaled.* in layer 0, got toy"
    ):
        feed(cache)
    set_adapter(model, "b")
    disable_adapters(model)
    feed(cache)
    enable_adapters(model)
    with pytest.raises(ValueError, match="have all tokens seen by them, got 6 of its 12 tokens"):
        feed(cache)
    for mask, message in (
        (torch.ones(2, 5), "attention_mask must have shape"),
        (torch.ones(2, 1, 6, 6), "attention_mask must have shape"),
        (torch.tensor([[1, 2, 1, 1, 1, 1]] * 2), "attention_mask must be 1 for tokens and 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model(tokens, attention_mask=mask)


def test_a_part_without_state_takes_any_cache():
    model = make_base()
    perturb_adapter(attach_memory(model, StatelessConfig()))
    tokens, mask = pad_left([make_tokens()[0, :9], make_tokens()[1, :4]], 9)
    expected = generate(model, tokens, mask, do_sample=False, use_cache=False)
    for kind in ("dynamic", "static"):
        actual = generate(model, tokens, mask, do_sample=False, cache_implementation=kind)
        assert torch.equal(actual, expected)
    disable_adapters(model)
    with torch.no_grad():
        prefix = model(tokens[:1, :5], use_cache=True).past_key_values
    enable_adapters(model)
    model(tokens[:1, 5:], past_key_values=prefix)  # filled without the part
    assert prefix.get_seq_length() == 9


@torch.no_grad()
def test_packed_documents_by_their_positions():
    model, tokens = make_attached(), make_tokens(B=1, T=13)
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None]
    logits = model(tokens, position_ids=positions, use_cache=False).logits
    alone = [logits_of(model, tokens[:, :5]), logits_of(model, tokens[:, 5:])]
    torch.testing.assert_close(logits, torch.cat(alone, 1), rtol=0, atol=1e-12)
