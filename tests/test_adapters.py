"""Parts in pretrained models: where they stand, exactness, and taking them off again."""

import copy
import pickle

import pytest
import torch
from adapter_factories import (
    ARCHITECTURES,
    SERIAL,
    ScaledConfig,
    make_attached,
    make_base,
    perturb_adapter,
)
from model_factories import logits_of, make_tokens

from memattn.adapters import (
    MemoryAdapter,
    adapters_of,
    attach_memory,
    detach_memory,
    disable_adapters,
    enable_adapters,
    set_adapter,
)
from memattn.evaluate import audit
from memattn.parts.chapter_memory import ChapterMemoryConfig

PLACES = ("before_attention", "after_attention", "after_mlp")


def facts_of(model):
    """Everything that detaching must bring back."""
    parameters = dict(model.named_parameters())
    return (
        {name: (id(module), type(module)) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad) for name, p in parameters.items()},
        {name: sorted(vars(module)) for name, module in model.named_modules()},
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attaches_as_nothing_and_detaches_exactly(architecture):
    model = make_base(architecture)
    model.get_input_embeddings().weight.requires_grad_(False)
    tokens, before, facts = make_tokens(T=9), {}, facts_of(model)
    before = logits_of(model, tokens)
    place = "after_mlp" if architecture == "neox" else "after_attention"
    adapter = attach_memory(model, ScaledConfig(at=place))
    assert torch.equal(logits_of(model, tokens), before)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {name for name, _ in adapter.named_parameters()}
    assert len(names) == adapter_size(adapter)
    perturb_adapter(adapter)
    assert not torch.allclose(logits_of(model, tokens), before)
    detach_memory(model)
    assert torch.equal(logits_of(model, tokens), before)
    assert facts_of(model) == facts


def adapter_size(adapter):
    """Parameters of the tests' part: in two layers, and once."""
    assert adapter.num_parameters() == 2 * (32 + 32 * 32 + 33 + 4 * 32 + 32) + 3 * 32
    return 2 * 6 + 1


def mlp_norm(layer):
    """The norm before the MLP."""
    for name in ("pre_feedforward_layernorm", "ln_2", "post_attention_layernorm"):
        if hasattr(layer, name):
            return getattr(layer, name)
    raise AssertionError(layer)


@torch.no_grad()
def inputs_of(model, modules, tokens):
    """What modules get in one call."""
    seen = [None] * len(modules)
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, i=i: seen.__setitem__(i, args[0].clone())
        )
        for i, module in enumerate(modules)
    ]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("architecture", SERIAL)
def test_stands_where_it_says(architecture, place):
    """A constant is added to the residual: the modules after that place see it, bit for bit."""
    model, tokens = make_base(architecture), make_tokens(T=7)
    adapter = attach_memory(model, ScaledConfig(at=place, layers=[1]))
    layer = adapter.model.get_decoder().layers[1] if architecture != "gpt2" else None
    layer = model.transformer.h[1] if layer is None else layer
    final = {"gpt2": lambda: model.transformer.ln_f}.get(architecture, lambda: model.model.norm)()
    first = next(m for n, m in layer.named_children() if n in ("input_layernorm", "ln_1"))
    stations = [first, mlp_norm(layer), final]
    before = inputs_of(model, stations, tokens)
    part = layer.memory_adapters["default"].parts["scaled"]
    change = torch.linspace(0.5, 1.0, 32, dtype=torch.float64)
    part.register_forward_hook(
        lambda m, args, out: out._replace(hidden_states=change + 0 * args[0])
    )
    after = inputs_of(model, stations, tokens)
    begin = PLACES.index(place)
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        if i < begin:
            assert torch.equal(a, b)
        elif i == begin:
            torch.testing.assert_close(b, a + change, rtol=0, atol=1e-14)
        else:
            assert not torch.allclose(a, b)


@pytest.mark.parametrize("architecture", SERIAL)
def test_beside_attention_a_part_stands_instead_of_what_attention_gives(architecture):
    """It gets what attention got, and what attention gives; a layer goes on with its output."""
    model, tokens = make_base(architecture), make_tokens(T=7)
    facts = facts_of(model)
    layer = (model.transformer.h if architecture == "gpt2" else model.model.layers)[1]
    attention = layer.attn if architecture == "gpt2" else layer.self_attn
    normed_behind = architecture == "gemma3"
    behind = layer.post_attention_layernorm if normed_behind else mlp_norm(layer)
    attach_memory(model, ScaledConfig(), name="after")
    adapter = attach_memory(model, ScaledConfig(at="beside_attention", layers=[1]), name="beside")
    set_adapter(model, "after", "beside")
    before = logits_of(model, tokens)
    perturb_adapter(adapter)
    own = layer.memory_adapters["beside"]
    assert not own.norms  # it gets attention's
    calls = []
    hook = lambda _, args, kwargs, out: calls.append((args or (kwargs["hidden_states"],), out))
    for module in (own.parts["scaled"], attention, behind):
        module.register_forward_hook(hook, with_kwargs=True)
    assert not torch.allclose(logits_of(model, tokens), before)
    ((normed, context), mean), ((got,), (attended, _)), ((after,), _) = calls
    assert got is normed and context.base is attention
    assert torch.equal(attended, context.attended + mean.hidden_states)
    assert torch.equal(after, attended if normed_behind else context.residual + attended)
    if architecture == "gpt2":
        assert context.rotary is None
    else:
        cos, sin = context.rotary
        assert cos.shape == (1, 1, 7, 4)
        torch.testing.assert_close(cos.square() + sin.square(), torch.ones_like(cos))
    detach_memory(model)
    assert facts_of(model) == facts


def test_where_attention_and_mlp_run_side_by_side_nothing_stands_between():
    model = make_base("neox")
    facts = facts_of(model)
    for place in ("after_attention", "beside_attention"):
        message = "parts.scaled must stand before_attention or after_mlp in GPTNeoXLayer .* got "
        with pytest.raises(ValueError, match=message + place):
            attach_memory(model, ScaledConfig(at=place))
    assert facts_of(model) == facts
    serial = make_base("neox", use_parallel_residual=False)
    attach_memory(serial, ScaledConfig())
    assert audit(make_attached("neox", part=ScaledConfig(at="after_mlp")), seq_len=14).passed


def memory(strategy="sequence", **options):
    """A chapter memory of a few chapters."""
    return ChapterMemoryConfig(
        num_memory_tokens=32,
        use_chapters=True,
        num_chapters=8,
        top_k_chapters=2,
        routing_block_size=4,
        routing_window_size=6,
        routing_strategy_train=strategy,
        routing_strategy_inference=strategy,
        **options,
    )


EXACT = {
    "llama": ("sequence", "A"),
    "qwen2": ("rolling", "B"),
    "qwen3": ("hybrid", "A"),
    "mistral": ("token", "B"),
    "gemma3": ("hybrid", "B"),
    "gpt2": ("rolling", "A"),
}


@pytest.mark.parametrize("architecture", SERIAL)
def test_an_attached_model_is_exact(architecture):
    """With a running mean and a chapter memory, whose output projections are perturbed."""
    strategy, variant = EXACT[architecture]
    place = "beside_attention" if variant == "A" else "after_attention"
    parts = [ScaledConfig(at=place), memory(strategy, memory_block_variant=variant)]
    model = make_attached(architecture, torch.float32, parts)
    assert model.reach == (6 if strategy in ("rolling", "hybrid") else 4)
    report = audit(model, seq_len=16)
    # a window of transformers counts columns, not tokens
    lacks = "holes, packed" if architecture in ("mistral", "gemma3") else "packed"
    assert report.verdict == f"all 0 (not applicable: {lacks} documents)", report.rows


def test_chapter_memory_starts_as_nothing_and_learns():
    model, tokens = make_base(dtype=torch.float32), make_tokens()
    before = logits_of(model, tokens)
    adapter = attach_memory(model, memory(use_z_loss=True, memory_sharing="per_layer"))
    assert torch.equal(logits_of(model, tokens), before)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=5e-2)
    losses = []
    for _ in range(15):
        output = model.train()(tokens, labels=tokens)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.lm_loss.item())
    assert losses[-1] < min(losses[:5])
    assert output.loss_counts["load_balance_loss"] == 2 * 2 * 6  # layers, rows, blocks
    assert output.z_loss > 0 and output.auxiliary_loss is None
    model.eval()
    options = dict(do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    prompt = tokens[:1, :5].repeat(1, 3)
    expected = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(model.generate(prompt, **options), expected)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **options), expected)
    disable_adapters(model)
    assert torch.equal(logits_of(model, tokens), before)


def test_several_adapters():
    model, tokens = make_base(), make_tokens(T=8)
    plain = logits_of(model, tokens)
    logits = {}
    for name, place in (("a", "after_attention"), ("b", "after_mlp")):
        perturb_adapter(attach_memory(model, ScaledConfig(at=place), name=name), seed=len(logits))
        logits[name] = logits_of(model, tokens)
    assert list(adapters_of(model)) == ["b", "a"]

    def learning():
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert all("memory_adapters" in name for name in names)
        return {part for name in names for part in name.split(".") if part in ("a", "b")}

    assert learning() == {"b"}
    set_adapter(model, "a")
    assert torch.equal(logits_of(model, tokens), logits["a"]) and learning() == {"a"}
    set_adapter(model, "a", "b")
    both = logits_of(model, tokens)
    assert learning() == {"a", "b"}
    assert not torch.allclose(both, logits["a"]) and not torch.allclose(both, logits["b"])
    disable_adapters(model)
    assert torch.equal(logits_of(model, tokens), plain)
    enable_adapters(model)
    assert torch.equal(logits_of(model, tokens), both)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(twin, tokens), both) and type(twin) is type(model)
        detach_memory(twin)
        assert torch.equal(logits_of(twin, tokens), plain)
    MemoryAdapter(model, "a").detach()
    assert torch.equal(logits_of(model, tokens), logits["b"])
    detach_memory(model)
    assert torch.equal(logits_of(model, tokens), plain)
    for call, message in (
        (lambda: set_adapter(model, "a"), "model must have attached parts"),
        (lambda: detach_memory(model), "model must have attached parts"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_what_is_refused():
    model = make_base()
    attach_memory(model, ScaledConfig())
    for call, message, kind in (
        (
            lambda: attach_memory(model, ScaledConfig()),
            "name must not be one of default",
            ValueError,
        ),
        (lambda: attach_memory(model, ScaledConfig(), name="a.b"), "be an identifier", ValueError),
        (lambda: attach_memory(model, [], name="b"), "config must hold at least one", ValueError),
        (lambda: attach_memory(model, 3, name="b"), "config must be a PartConfig", TypeError),
        (
            lambda: attach_memory(model, ScaledConfig(layers=[2]), name="b"),
            "layers from 0 to 1",
            ValueError,
        ),
        (
            lambda: attach_memory(model, {"kind": "scaled", "size": 1}, name="b"),
            "config.size",
            ValueError,
        ),
        (
            lambda: attach_memory(torch.nn.Linear(2, 2), ScaledConfig()),
            "transformers model",
            TypeError,
        ),
        (
            lambda: set_adapter(model, "other"),
            "name must be one of default, got 'other'",
            ValueError,
        ),
        (lambda: set_adapter(model), "names must have at least one name", ValueError),
        (lambda: detach_memory(model, "other"), "name must be one of default", ValueError),
        (lambda: model.model(make_tokens()), "must be called through the model", RuntimeError),
    ):
        with pytest.raises(kind, match=message):
            call()
