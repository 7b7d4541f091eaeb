"""Attention mass: shares of the sources of keys against weights written out."""

import pytest
import torch
from model_factories import make_model, make_tokens

from memattn.cli import main
from memattn.data import train_tokenizer
from memattn.models import MemAttnConfig, MemAttnForCausalLM
from memattn.nn.rotary import apply_rotary
from memattn.testing import assert_within_budget
from memattn.viz.attention import attention_mass, plot_attention_mass

KINDS = {
    "vanilla": ("tokens",),
    "segments": ("tokens",),
    "window": ("tokens", "persistent"),
    "both": ("segment", "window", "persistent"),
}


def dense_masses(model, input_ids):
    """The same from whole attention matrices."""
    found = []

    def measure(layer, args, options):
        query, key, _ = layer.split_heads(*args)
        query, key = (apply_rotary(x, *options["rotary"]) for x in (query, key))
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        T = query.shape[2]
        i, j = torch.arange(T)[:, None], torch.arange(T)
        L, W = layer.segment_len, layer.window_size
        segment = (i // L == j // L) if L else torch.zeros(T, T, dtype=torch.bool)
        window = (j > i - W) if W else torch.zeros(T, T, dtype=torch.bool)
        seen = (segment | window if L or W else ~segment) & (j <= i)
        scores = (query @ key.mT).masked_fill(~seen, -torch.inf)
        if layer.persistent_key is not None:
            keys = layer.persistent_key.repeat_interleave(
                query.shape[1] // len(layer.persistent_key), 0
            )
            scores = torch.cat([scores, query @ keys.mT], -1)
        weights = (scores / layer.head_dim**0.5).softmax(-1)
        tokens = weights[..., :T]
        masses = {"tokens": tokens.sum(-1)}
        if L and W:
            masses = {"segment": (tokens * segment).sum(-1), "window": (tokens * ~segment).sum(-1)}
        if layer.persistent_key is not None:
            masses["persistent"] = weights[..., T:].sum(-1)
        found.append({name: mass.double().mean((0, 2)) for name, mass in masses.items()})

    hooks = [
        layer.attention.register_forward_pre_hook(measure, with_kwargs=True)
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.stack([mass[name] for mass in found]) for name in found[0]}


@pytest.mark.parametrize("system", KINDS)
def test_masses_are_those_of_the_attention_matrix(system):
    ids = make_tokens(T=29)
    masses = attention_mass(make_model(system, torch.float32), ids)
    low, high = (
        dense_masses(make_model(system, dtype), ids) for dtype in (torch.float32, torch.float64)
    )
    assert tuple(masses) == KINDS[system]
    for name, mass in masses.items():
        assert mass.shape == (2, 4)
        assert_within_budget(name, mass.float(), low[name].float(), high[name])
    assert sum(masses.values()).sub(1.0).abs().max() < 1e-6
    if len(masses) > 1:
        assert min(mass.min() for mass in masses.values()) > 0.0


@pytest.mark.parametrize("system", ["both", "future"])
def test_subclasses_of_attention_layers_are_drawn(system):
    model, tokens = make_model(system), make_tokens()
    expected = attention_mass(model, tokens)
    for layer in model.model.layers:
        layer.attention.__class__ = type("Mine", (type(layer.attention),), {})
    masses = attention_mass(model, tokens)
    assert masses.keys() == expected.keys()
    assert all(torch.equal(masses[name], expected[name]) for name in expected)


def test_masses_leave_the_model_as_it_was():
    model = make_model("both").train()
    ids = make_tokens()
    before = model(ids).logits
    attention_mass(model, ids)
    assert model.training and torch.equal(model(ids).logits, before)
    assert not any(layer.attention._forward_pre_hooks for layer in model.model.layers)
    with pytest.raises(TypeError, match="model must have layers of kind SegmentedAttention, Fut"):
        attention_mass(torch.nn.Linear(2, 2), ids)


def test_a_picture_has_a_heat_map_for_each_source(tmp_path):
    masses = attention_mass(make_model("both"), make_tokens())
    plot_attention_mass(masses, tmp_path / "mass.svg", title="mass of keys")
    svg = (tmp_path / "mass.svg").read_text()
    assert svg.count("<image") == 4  # three sources and the colours
    with pytest.raises(ValueError, match="path must end in"):
        plot_attention_mass(masses, tmp_path / "mass.jpg")


def test_command_draws_the_attention_of_a_model(tmp_path, capsys, monkeypatch):
    tokenizer = train_tokenizer(["a cat sat on a mat"], 260, tmp_path / "model")
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = MemAttnConfig.segmented(vocab_size=len(tokenizer), **sizes)
    MemAttnForCausalLM(config).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert main(["plot", "attention", "model", "--text", "a cat"]) == 0
    assert "wrote attention.png" in capsys.readouterr().out
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", "attention", "model", "model", "--text", "a cat"]) == 2
    assert "runs must be attention and one model, got 2" in capsys.readouterr().err
    assert main(["plot", "attention", "vanilla", "--text", "a cat"]) == 2
    assert "folder with a tokenizer, got vanilla" in capsys.readouterr().err
