"""Measures of the neural memory against their definitions, token by token in float64."""

import json

import pytest
import torch
from model_factories import make_model, make_tokens
from torch.nn import functional as F

import memattn.nn.neural_memory as layer_module
from memattn.cli import main
from memattn.data import load_tokenizer
from memattn.evaluate import memory_use
from memattn.models import MemAttnConfig, MemAttnForCausalLM
from memattn.parts.memory_measures import measure_memory, watch_memory
from memattn.viz import attention_mass

VARIANTS = ("lmm", "mag", "mal", "mac", "mac_parallel")
B, T = 2, 23


def titans(variant, dtype=torch.float64):
    return make_model(f"titans-{variant}", dtype, num_hidden_layers=1, max_norm=None)


def operator_calls(model, input_ids, monkeypatch):
    """Arguments of the operator, all tokens of all calls after each other, persistent first."""
    calls, operator = [], layer_module.neural_memory

    def recorded(*args, **options):
        calls.append(args)
        return operator(*args, **options)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(layer_module, "neural_memory", recorded)
        model(input_ids, use_cache=False)
    tokens = [
        torch.cat([x.expand(B, *x.shape[1:]) for x in group], 2)
        for group in zip(*(args[:6] for args in calls), strict=True)
    ]
    return tokens, [layer.detach() for layer in calls[0][6]]


def answer(layers, x):
    for n, layer in enumerate(layers):
        x = torch.einsum("bhij,bhj->bhi", layer, x)
        x = F.gelu(x) if n < len(layers) - 1 else x
    return x


def recurrence(tokens, weights, chunk_size):
    """Norms of gradients ``[B, H]`` of each token, and weights before it and after the last."""
    _, key, value, lr, momentum, decay = tokens
    W = [layer.expand(B, *layer.shape) for layer in weights]
    S, seen, norms = [torch.zeros_like(layer) for layer in W], [W], []
    for t in range(key.shape[2]):
        if t % chunk_size == 0:
            A = [layer.clone().requires_grad_() for layer in W]
        loss = 0.5 * (answer(A, key[:, :, t]) - value[:, :, t]).square().sum()
        u = torch.autograd.grad(loss, A)
        norms.append(sum(x.square().sum((-1, -2)) for x in u).sqrt())
        rate = lambda x, t=t: x[:, :, t, None, None]
        S = [rate(momentum) * s - rate(lr) * x for s, x in zip(S, u, strict=True)]
        W = [(1 - rate(decay)) * w + s for w, s in zip(W, S, strict=True)]
        seen.append(W)
    return norms, seen


@pytest.mark.parametrize("variant", VARIANTS)
def test_measures_are_those_of_the_definition(variant, monkeypatch):
    model, ids = titans(variant), make_tokens(B, T)
    layer = model.model.layers[0].attention
    b = layer.memory.chunk_size
    tokens, weights = operator_calls(model, ids, monkeypatch)
    norms, seen = recurrence(tokens, weights, b)
    P = len(norms) - T
    outputs = {}
    hooks = [
        getattr(layer, name).register_forward_hook(
            lambda module, args, output, name=name: outputs.update({name: output})
        )
        for name in ("memory", "attention")
        if hasattr(layer, name)
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    (use,) = measure_memory(model, ids).uses

    torch.testing.assert_close(use.surprise, torch.stack(norms[P:], 2))
    ends = [*range(b, P + T, b), P + T]
    starts = [0, *ends[:-1]]
    assert use.chunk_tokens == [
        end - max(start, P) for start, end in zip(starts, ends, strict=True)
    ]
    square = lambda layers: sum(x.square().sum((-1, -2)) for x in layers)
    less = lambda a, b: [x - y for x, y in zip(a, b, strict=True)]
    updates = [
        (square(less(seen[end], seen[start])) / square(seen[start])).sqrt()
        for start, end in zip(starts, ends, strict=True)
    ]
    torch.testing.assert_close(use.update, torch.stack(updates, 2))

    key, value = tokens[1], tokens[2]
    error = lambda W, t: (answer(W, key[:, :, t]) - value[:, :, t]).square().sum()
    assert [(x.first, x.last) for x in use.retrieval] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, T)]
    for first, last, quality in use.retrieval:
        places = [t for t in range(P, P + T) if first <= P + T - t <= last]
        left, before = (sum(error(W, t) for t in places) for W in (seen[-1], seen[P]))
        torch.testing.assert_close(quality, float(1 - left / before))

    for n, (end, start) in enumerate(zip(seen[-1], seen[P], strict=True)):
        s = torch.linalg.svdvals(end - start).square()
        share = s / s.sum(-1, keepdim=True)
        rank = (-share * share.log()).sum(-1).exp() / min(end.shape[-2:])
        torch.testing.assert_close(use.utilisation[..., n], rank)

    if variant.startswith("mac"):
        masses = attention_mass(model, ids)["memory"].mean()
        torch.testing.assert_close(use.relevance.mean(), masses)
    else:
        m = outputs["memory"].out.norm(dim=-1)
        y = outputs["attention"].norm(dim=-1) if variant != "lmm" else 0 * m
        torch.testing.assert_close(use.relevance, m / (m + y))


@pytest.mark.parametrize("variant", ("mag", "mac"))
def test_watching_changes_nothing(variant):
    model, ids = titans(variant, torch.float32), make_tokens(B, T)
    model.train()
    with torch.no_grad():
        free = model(ids, use_cache=False).logits
        with watch_memory(model):
            watched = model(ids, use_cache=False).logits
    assert torch.equal(free, watched)
    measure_memory(model, ids)
    assert model.training and not model.model.layers[0].attention._forward_pre_hooks


def test_a_model_without_a_memory_is_refused():
    with pytest.raises(TypeError, match="model must have layers with a neural memory"):
        measure_memory(make_model("window"), make_tokens(B, T))
    with pytest.raises(ValueError, match="input_ids must be without padding"):
        model, ids = titans("lmm"), make_tokens(B, T)
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        with watch_memory(model):
            model(ids, attention_mask=mask)


def test_command_measures_and_draws(tmp_path, capsys):
    tokenizer = load_tokenizer("bytes")
    sizes = dict(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2)
    torch.manual_seed(0)
    for name, make in (("titans", MemAttnConfig.titans), ("plain", MemAttnConfig.vanilla)):
        model = MemAttnForCausalLM(make(**sizes, num_attention_heads=2))
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    text = tmp_path / "text.txt"
    text.write_text("It rained, and it did not stop. " * 9)
    facts, picture = tmp_path / "use.json", tmp_path / "use.png"
    arguments = ["--data", str(text), "--context_len", "80", "--samples", "2"]
    arguments += ["--json", str(facts), "--out", str(picture)]
    assert main(["evaluate", "memory", str(tmp_path / "titans"), *arguments]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 windows of 80 tokens" in shown and "retrieval" in shown
    found = json.loads(facts.read_text())
    assert list(found["layers"]) == ["model.layers.0.attention", "model.layers.1.attention"]
    first = found["layers"]["model.layers.0.attention"]
    assert sum(first["chunk_tokens"]) == 80 and len(first["utilisation"]) == 2
    assert len(first["update"]) == len(first["surprise"]) == len(first["relevance"]) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["evaluate", "memory", str(tmp_path / "plain"), *arguments]) == 2
    assert "must have layers with a neural memory" in capsys.readouterr().err
    short = memory_use(model_of(tmp_path / "titans"), ["a", "abc"], tokenizer)
    assert short.uses[0].relevance.shape == (1, 4)  # no text is longer


def model_of(folder):
    return MemAttnForCausalLM.from_pretrained(folder)
