"""Operands of decoding are collected once for a cache, and anew where the model has changed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memattn.models import MemAttnConfig, MemAttnForCausalLM, plain_decoder, plain_step

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not plain_step.AVAILABLE, reason="the C++ extension is not built"),
]


def make_model(preset: str = "segmented") -> Any:
    torch.manual_seed(0)
    spans = {"segment_len": 7, "window_size": 5, "num_persistent_tokens": 2}
    spans = spans if preset == "segmented" else {"future_dim": 5}
    sizes = dict(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = getattr(MemAttnConfig, preset)(max_position_embeddings=40, **sizes, **spans)
    model = MemAttnForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def decode(model: Any, between: Callable[[Any], None] | None = None) -> list[Tensor]:
    """Logits of 6 tokens behind a prompt, with a change of the model before the last two."""
    ids = torch.randint(31, (2, 14), generator=torch.Generator().manual_seed(1))
    cache = model(ids[:, :8], use_cache=True).past_key_values
    found = []
    for t in range(8, 14):
        if t == 12 and between is not None:
            between(model)
        found.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    return found


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


def hook(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, out: 2.0 * out)


def replace_weight(model: Any) -> None:
    layer = model.model.layers[0].attention.q_proj
    layer.weight = nn.Parameter(2.0 * layer.weight)


def replace_data(model: Any) -> None:
    layer = model.model.layers[0].attention.q_proj
    layer.weight.data = 2.0 * layer.weight


def replace_layer(model: Any) -> None:
    model.model.layers[0].mlp = copy.deepcopy(model.model.layers[1].mlp)


def replace_block(model: Any) -> None:
    model.model.layers[0] = copy.deepcopy(model.model.layers[1])


def add_bias(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.bias = nn.Parameter(torch.ones(16))


def change_class(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.__class__ = Doubled


def change_spans(model: Any) -> None:
    for layer in model.model.layers:
        layer.attention.segment_len, layer.attention.window_size = 1, 2


def change_forward(model: Any) -> None:
    model.model.layers[0].mlp.forward = lambda hidden_states: 0.0 * hidden_states


def change_norm(model: Any) -> None:
    model.model.layers[0].mlp_norm.eps = 1.0


CHANGES = [hook, replace_weight, replace_data, replace_layer, replace_block, add_bias, change_class]
CHANGES += [change_spans, change_forward, change_norm]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_tokens_is_seen(monkeypatch, change):
    actual = decode(make_model(), change)
    unchanged = decode(make_model())
    monkeypatch.setattr(plain_step, "AVAILABLE", False)
    expected = decode(make_model(), change)
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(actual[-1], unchanged[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("preset", ["segmented", "future"])
def test_operands_are_collected_once_for_a_cache(monkeypatch, preset):
    collected = []
    whole = plain_decoder.collect_operands
    spy = lambda *args: collected.append(1) or whole(*args)
    monkeypatch.setattr(plain_decoder, "collect_operands", spy)
    decode(make_model(preset))
    assert len(collected) == 1


@torch.no_grad()
def test_a_copy_of_a_cache_has_no_copy_of_the_model():
    model = make_model()
    ids = torch.arange(9)[None]
    cache = model(ids, use_cache=True).past_key_values
    model(ids[:, :1], past_key_values=cache)
    other = copy.deepcopy(cache)
    assert cache.operands is not None and other.operands is None
    logits = [model(ids[:, 1:2], past_key_values=c).logits for c in (cache, other)]
    assert torch.equal(*logits)
