"""Saved adapters: whole or not at all, and only into models like the one they came from."""

import json

import pytest
import torch
from adapter_factories import ScaledConfig, make_base, perturb_adapter
from model_factories import logits_of, make_tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from memattn import ChapterMemoryConfig, quantize_memory
from memattn.adapters import (
    MemoryAdapter,
    adapters_of,
    attach_memory,
    detach_memory,
    files,
    set_adapter,
)

PARTS = [ScaledConfig(at="after_mlp", layers=[1]), {"kind": "toy", "num_rows": 3}]


@pytest.fixture
def saved(tmp_path):
    """A model with an adapter of two parts, and where the adapter is saved."""
    model = make_base("qwen3")
    adapter = attach_memory(model, PARTS)
    perturb_adapter(adapter)
    adapter.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_an_adapter_comes_back(saved):
    model, folder = saved
    logits, weights = logits_of(model, make_tokens()), load_file(folder / "memory.safetensors")
    assert sorted(path.name for path in folder.iterdir()) == [
        "memory.safetensors",
        "memory_config.json",
    ]
    assert len(weights) == len(list(adapters_of(model)["default"].parameters()))
    assert weights["shared.scaled.rows"].shape == (3, 32)
    assert "layers.1.parts.toy.gate_proj.bias" in weights
    assert not any("self_attn" in name or "mlp" in name for name in weights)

    detach_memory(model)
    adapter = MemoryAdapter.from_pretrained(model, folder, name="again")
    assert torch.equal(logits_of(model, make_tokens()), logits)
    assert [part.kind for part in adapter.parts] == ["scaled", "toy"]
    assert all(
        p.requires_grad == ("again" in n or "memory" in n) for n, p in model.named_parameters()
    )
    adapter.save_pretrained(folder)  # over the one that is there
    other = MemoryAdapter.from_pretrained(make_base("qwen3"), folder, dtype=torch.float32)
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    assert other.model.dtype == torch.float64
    expected = logits_of(other.model, make_tokens())
    torch.testing.assert_close(expected, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        (
            "llama",
            {},
            "model.config.model_type must be 'qwen3', which the adapter in .*, got 'llama'",
        ),
        ("qwen3", dict(hidden_size=48), "model.config.hidden_size must be 32, .*, got 48"),
        ("qwen3", dict(num_hidden_layers=3), "model.config.num_hidden_layers must be 2, .*, got 3"),
        ("qwen3", dict(head_dim=16), "model.config.head_dim must be 8, .*, got 16"),
    ],
)
def test_another_model_is_refused(saved, architecture, options, message):
    model = make_base(architecture, **options)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        MemoryAdapter.from_pretrained(model, saved[1])
    assert (
        dict(model.named_modules()) == modules
        and type(model).__mro__[1].__name__ != "AttachedModel"
    )


def edit_config(folder, **changes):
    path = folder / "memory_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, edit):
    weights = load_file(folder / "memory.safetensors")
    edit(weights)
    save_file(weights, folder / "memory.safetensors")


def truncate(folder):
    data = (folder / "memory.safetensors").read_bytes()
    (folder / "memory.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: edit_config(f, format="other"),
            "hold an adapter of format memattn-adapter-1, got 'other'",
        ),
        (lambda f: edit_config(f, parts=[{"kind": "none"}]), "config.kind must be one of"),
        (
            lambda f: edit_config(f, parts=[{"kind": "toy", "rows": 3}]),
            "config.rows must be a field of toy",
        ),
        (
            lambda f: edit_config(f, parts=[{"kind": "toy"}]),
            r"have layers.0.parts.toy.table of shape \[4, 32\], got \[3, 32\]|not have",
        ),
        (
            lambda f: edit_config(f, dtyp="float32"),
            "memory_config.json dtyp must be a field .format, base, dtype, parts., got float32",
        ),
        (
            lambda f: edit_config(f, base={"model_type": "qwen3"}),
            "memory_config.json base must have the field",
        ),
        (lambda f: edit_config(f, base=[]), r"base must be of type dict, got \[\]"),
        (lambda f: edit_config(f, dtype="float23"), "dtype must be one of torch, got 'float23'"),
        (lambda f: edit_config(f, parts="toy"), "parts must be of type list, got 'toy'"),
        (lambda f: (f / "memory_config.json").write_text("{"), "folder must hold a saved adapter"),
        (truncate, "folder must hold a saved adapter"),
        (
            lambda f: edit_weights(f, lambda w: w.pop("shared.scaled.rows")),
            "must have shared.scaled.rows",
        ),
        (lambda f: edit_weights(f, lambda w: w.update(x=torch.zeros(1))), "must not have x"),
        (
            lambda f: edit_weights(
                f, lambda w: w.update({"shared.scaled.rows": torch.zeros(4, 32)})
            ),
            r"of shape \[3, 32\], got \[4, 32\]",
        ),
    ],
)
def test_damage_is_refused_and_leaves_the_model_as_it_was(saved, damage, message):
    damage(saved[1])
    model = make_base("qwen3")
    names = [(n, p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        MemoryAdapter.from_pretrained(model, saved[1])
    assert names == [(n, p.requires_grad) for n, p in model.named_parameters()]
    assert "memory_adapters" not in dict(model.named_modules())


def test_a_quantised_memory_comes_back(tmp_path):
    memory = ChapterMemoryConfig(num_memory_tokens=24, num_chapters=4, top_k_chapters=2)
    model, tokens = make_base("qwen3"), make_tokens()
    plain = logits_of(model, tokens)
    adapters = {name: attach_memory(model, memory, name=name) for name in ("a", "b")}
    for adapter in adapters.values():
        perturb_adapter(adapter)
    full = logits_of(model, tokens)
    quantize_memory(model)
    set_adapter(model, "b")
    logits = logits_of(model, tokens)
    assert 0 < (logits - full).square().mean().sqrt() < 0.02 * full.std()
    for adapter in adapters.values():
        assert adapter.parts[0].quantize_memory and not adapter.parts[0].memory_quant_training
        assert not any("rows" in name for name, _ in adapter.named_parameters())
    adapters["b"].save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "whole")
    detach_memory(model)
    assert torch.equal(logits_of(model, tokens), plain)
    for folder in ("own", "whole"):
        MemoryAdapter.from_pretrained(model, tmp_path / folder, name="b")
        assert torch.equal(logits_of(model, tokens), logits)
        detach_memory(model)
    weights = load_file(tmp_path / "own" / "memory.safetensors")
    assert weights["shared.chapter_memory.banks.0.codes"].dtype == torch.int8


def test_a_missing_file_is_refused(saved):
    (saved[1] / "memory_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="folder must hold memory_config.json"):
        MemoryAdapter.from_pretrained(make_base("qwen3"), saved[1])


def test_a_failed_save_leaves_the_previous_one_whole(saved, monkeypatch):
    model, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    perturb_adapter(adapters_of(model)["default"])

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(files, "write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        adapters_of(model)["default"].save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter"]
    monkeypatch.undo()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="folder must be new, empty or hold a saved adapter"):
        adapters_of(model)["default"].save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_whole_model_is_saved_with_its_adapters(tmp_path):
    model, tokens = make_base(dtype=torch.float32), make_tokens()
    plain = logits_of(model, tokens)
    model.save_pretrained(tmp_path / "plain")
    for name in ("a", "b"):
        perturb_adapter(attach_memory(model, ScaledConfig(), name=name))
    logits = logits_of(model, tokens)
    model.save_pretrained(tmp_path / "attached")
    configs = [(tmp_path / name / "config.json").read_text() for name in ("plain", "attached")]
    assert configs[0] == configs[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "attached")
    assert torch.equal(logits_of(loaded, tokens), plain)
    MemoryAdapter.from_pretrained(loaded, tmp_path / "attached", name="b")
    assert torch.equal(logits_of(loaded, tokens), logits)
