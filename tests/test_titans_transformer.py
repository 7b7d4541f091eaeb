"""TitansTransformer and its state: options by their first names, and calls that go on."""

import inspect

import pytest
import torch
from model_factories import make_model, perturb
from transformers import AutoModelForCausalLM

from memattn import TitansTransformer, TransformerState
from memattn.models import MemAttnForCausalLM

SIZES = dict(num_tokens=50, dim=32, depth=2, heads=3, dim_head=16, segment_len=6, chunk_size=3)
RESIDUALS = dict(value_residual=True, neural_mem_weight_residual=True)


def make_titans(**options):
    torch.manual_seed(0)
    options = SIZES | RESIDUALS | dict(num_longterm_mem_tokens=2) | options
    return perturb(TitansTransformer(**options).double().eval())


@pytest.fixture(scope="module")
def model():
    return make_titans()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_call_with_a_state_goes_on(model, tokens, tmp_path):
    whole = model(tokens, use_cache=False)
    assert whole.state is None
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    state = model(tokens[:, :8], state=model.new_state()).state
    state.save(tmp_path / "state")
    loaded = TransformerState.load(tmp_path / "state", model)
    for a, b in zip(state.memory_states, loaded.memory_states, strict=True):
        close(a.current(), b.current())
    for given in (state, loaded):
        for cut in (slice(8, 9), slice(9, 15), slice(15, 20)):
            outputs = model(tokens[:, cut], state=given)
            close(outputs.logits, whole.logits[:, cut])
        assert outputs.state.cache is given.cache and given.cache.position == 20
    # rows in another order, and a row that restarts
    state.reorder(torch.tensor([2, 0, 0]))
    state.reset(torch.tensor([False, True, False]))
    logits = model(tokens[[2, 1, 0], :3], state=state).logits
    close(logits[1], whole.logits[1, :3])
    assert not torch.allclose(logits[2], whole.logits[0, :3])


def test_a_state_shows_what_the_layers_keep(model, tokens):
    state = model.new_state()
    assert state.memory_states == state.kv_caches == state.value_residuals == [None, None]
    state = model(tokens, state=state).state
    key, value = state.kv_caches[1]
    assert key.shape == value.shape == (3, 3, 2, 16)  # two tokens of the open segment
    assert state.value_residuals[0] is None
    assert torch.equal(state.value_residuals[1], state.kv_caches[0][1])
    plain = make_titans(**dict.fromkeys(RESIDUALS, False))
    assert plain(tokens).state.value_residuals == [None, None]
    # metrics by hand, of one layer of the memory of a sequence
    memory = state.memory_states[1]
    begun = [x[0] for x in model.model.layers[1].attention.memory.memory_weights]
    change = [x[2, 0] - y for x, y in zip(memory.current()[0], begun, strict=True)]
    norm = lambda layers: torch.stack([x.square().sum() for x in layers]).sum().sqrt()
    metrics = state.metrics
    torch.testing.assert_close(
        metrics["update_magnitude"][1][2, 0], (norm(change) / norm(begun)).detach()
    )
    shares = [torch.linalg.svdvals(x).square() for x in change]
    entropies = [-(s / s.sum() * (s / s.sum()).log()).sum() for s in shares]
    expected = sum(e.exp() / len(s) for e, s in zip(entropies, shares, strict=True)) / 2
    torch.testing.assert_close(metrics["utilisation"][1][2, 0], expected.detach())
    # a graph until it is detached
    assert memory.packed_weights.requires_grad
    assert not state.detach().memory_states[1].packed_weights.requires_grad
    for row in (0, 1):  # what was given earlier stays
        before = memory.packed_weights[row].clone()
        model(tokens[:, :7], state=state)
        assert torch.equal(memory.packed_weights[row], before)


def test_it_is_a_model_of_transformers(model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    again = TitansTransformer.from_pretrained(tmp_path, dtype=torch.float64).eval()
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    logits = model(tokens, use_cache=False).logits
    for loaded in (again, other):
        found = loaded(tokens, use_cache=False).logits
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-12)
    options = dict(max_new_tokens=8, do_sample=False, num_beams=2, pad_token_id=0)
    found = model.generate(tokens, **options)
    assert torch.equal(found, model.generate(tokens, use_cache=False, **options))
    outputs = model(tokens, labels=tokens, return_dict=False)
    assert isinstance(outputs, tuple) and outputs[0].dim() == 0
    names = inspect.signature(model.forward).parameters
    _, *expected, rest = inspect.signature(MemAttnForCausalLM.forward).parameters
    assert list(names) == [*expected, "state", rest]


def test_options_are_those_of_the_configuration():
    config = make_titans(heads=2, memory_dim=48, num_persist_mem_tokens=3, variant="mal",
                         num_longterm_mem_tokens=0, ff_mult=3).config  # fmt: skip
    assert (config.vocab_size, config.intermediate_size, config.mlp) == (50, 96, "gelu")
    assert config.position_embedding == "continuous_axial" and config.position_segment_len == 6
    part = config.attention
    assert (part.variant, part.window_size, part.num_persistent_tokens) == ("mal", 6, 3)
    assert part.memory_sizes(config.sizes) == (2, 24)
    sizes = {name: size for name, size in SIZES.items() if name != "chunk_size"}
    alone = TitansTransformer(use_memory=False, **sizes).config.attention
    assert (alone.kind, alone.spans, alone.backend) == ("segmented", (6, None), "auto")
    assert TitansTransformer(use_flex_attn=True, **SIZES).config.attention.backend == "flex"


def test_wrong_options_and_states_are_named(model, tokens, tmp_path):
    with pytest.raises(TypeError, match="config must be None with dim, got a configuration"):
        TitansTransformer(model.config, dim=3)
    with pytest.raises(TypeError, match="depht must be a field of MemAttnConfig"):
        TitansTransformer(depht=3)
    with pytest.raises(ValueError, match="memory_dim must be None without use_memory, got 64"):
        TitansTransformer(use_memory=False, memory_dim=64)
    with pytest.raises(TypeError, match="state must be a TransformerState, got dict"):
        model(tokens, state={})
    state = model(tokens).state
    with pytest.raises(ValueError, match="past_key_values must be None with state, got a cache"):
        model(tokens, state=state, past_key_values=state.cache)
    with pytest.raises(ValueError, match="state must have the batch size of the input, 2, got 3"):
        model(tokens[:2], state=state)
    other = make_titans(segment_len=9)
    with pytest.raises(ValueError, match=r"state must be of titans\(segment_len=9, variant=mac, "):
        other(tokens, state=state)
    for options in (dict(chunk_size=6), dict(memory_dim=64), dict(memory_depth=1)):
        with pytest.raises(ValueError, match="state must have a memory with . heads of sizes"):
            make_titans(**options)(tokens, state=model(tokens).state)
    state.save(tmp_path / "state")
    with pytest.raises(ValueError, match="state must be of titans"):
        TransformerState.load(tmp_path / "state", other)
    with pytest.raises(ValueError, match="state must have 2 layers|state must be of"):
        TransformerState.load(tmp_path / "state", make_model("titans-lmm"))
