"""Training by few operators where modules are plain, as these compute it; loss without logits."""

import re
from typing import Any

import pytest
import torch
from sublayer_spies import spy_on
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.models import MemAttnConfig, MemAttnForCausalLM, plain_training, token_loss
from memattn.testing import assert_within_budget

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not plain_training.AVAILABLE, reason="the C++ extension is not built"),
]
MODELS: dict[str, dict[str, Any]] = {
    "vanilla": {"hidden_size": 40, "head_dim": 10, "num_key_value_heads": 2},
    "segmented": {"segment_len": 7, "window_size": 5, "num_persistent_tokens": 3},
    "future": {"future_dim": 5},  # its MLP alone, as of titans
    "titans": {"segment_len": 8, "num_persistent_tokens": 2},
}


def make_model(preset: str = "vanilla", **options: Any) -> MemAttnForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=53, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(max_position_embeddings=40, intermediate_size=52)
    config = getattr(MemAttnConfig, preset)(**{**sizes, **MODELS.get(preset, {}), **options})
    model = MemAttnForCausalLM(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_batch() -> dict[str, Tensor]:
    """Rows with padding on either side, whose labels are ignored."""
    ids = torch.randint(53, (3, 23), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, 20:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model: MemAttnForCausalLM, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(**make_batch(), **options)
    output.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "lm_loss": output.lm_loss.detach()} | found


@pytest.fixture
def fused(monkeypatch) -> list[bool]:
    """Whether each sublayer was few operators."""
    return spy_on(monkeypatch, "attention_sublayer", "mlp_sublayer")


@pytest.mark.parametrize("preset", MODELS)
def test_gradients_are_those_of_the_modules(preset, fused, monkeypatch):
    model = make_model(preset)
    actual = gradients(model, skip_logits=True)
    assert fused.count(True) == (4 if preset in ("vanilla", "segmented") else 2)
    monkeypatch.setattr(plain_training, "AVAILABLE", False)
    low = gradients(model)
    high = gradients(model.double())
    assert actual.keys() == low.keys()
    joined = [by_module(found) for found in (actual, low, high)]
    for name in joined[0]:
        assert_within_budget(name, *(found[name] for found in joined))


def by_module(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of all layers together: those of one norm are few numbers to have an error."""
    layers: dict[str, list[Tensor]] = {}
    for name, gradient in found.items():
        layers.setdefault(re.sub(r"\.\d+\.", ".", name), []).append(gradient.flatten())
    return {name: torch.cat(gradients) for name, gradients in layers.items()}


def test_frozen_weights_get_no_gradients_and_checkpoints_change_none(fused):
    model = make_model(use_cache=False)
    expected = gradients(model)
    model.model.layers[0].mlp.requires_grad_(False)
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    found = gradients(model)
    assert all(fused)
    assert not any(".0.mlp." in name for name in found)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def watch_forward(model: Any) -> None:
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: None)


def watch_backward(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.register_full_backward_hook(lambda *_: None)


def add_bias(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.bias = nn.Parameter(torch.ones(40))


def replace_layer(model: Any) -> None:
    model.model.layers[0].mlp.up_proj = nn.Sequential(model.model.layers[0].mlp.up_proj)


@pytest.mark.parametrize("change", [watch_forward, watch_backward, add_bias, replace_layer])
def test_modules_that_are_not_plain_run(change, fused):
    model = make_model()
    change(model)
    gradients(model)
    assert fused == [True, False, True, True]


def test_autocast_and_backends_that_are_differentiable_twice_take_the_modules(fused):
    with torch.autocast("cpu", torch.bfloat16):
        gradients(make_model())
    gradients(make_model(backend="reference"))
    assert not any(fused)


def test_a_second_derivative_is_refused():
    layers = pytest.importorskip("memattn.cpp.training_layers")
    x = torch.randn(1, 3, 8, requires_grad=True)
    weights = torch.ones(8), torch.randn(5, 8), torch.randn(5, 8), torch.randn(8, 5)
    (d_x,) = torch.autograd.grad(
        layers.swiglu_layer(x, *weights, 1e-6)[0].sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        d_x.sum().backward()


@pytest.mark.parametrize("rotates", [True, False])
def test_operators_keep_the_rules_of_torch(rotates):
    layers = pytest.importorskip("memattn.cpp.training_layers")
    draw = lambda *shape: torch.randn(*shape, requires_grad=True)
    angles = (torch.rand(1, 1, 5, 3), torch.rand(1, 1, 5, 3)) if rotates else (None, None)
    x, norm = draw(2, 5, 9), draw(9)
    for operator, args in (
        (layers.attention_inputs, (x, norm, draw(12, 9), draw(6, 9), draw(6, 9), *angles, 1e-6, 6)),
        (layers.attention_output, (draw(2, 2, 5, 6), draw(9, 12), x)),
        (layers.swiglu_layer, (x, norm, draw(7, 9), draw(7, 9), draw(9, 7), 1e-6)),
    ):
        torch.library.opcheck(operator, args)


def plain_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)[:, :-1].flatten(0, 1)
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[:, 1:].flatten()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_without_logits(dtype, monkeypatch):
    monkeypatch.setattr(token_loss, "_PIECE", 250)  # pieces of 7 tokens
    torch.manual_seed(0)
    inputs = [torch.randn(2, 21, 6).to(dtype), torch.randn(33, 6).to(dtype)]
    labels = torch.randint(33, (2, 21)).masked_fill(torch.rand(2, 21) < 0.3, -100)

    def run(function, dtype):
        given = [x.to(dtype).requires_grad_() for x in inputs]
        loss = function(*given, labels)
        return [loss, *torch.autograd.grad(loss, given)]

    found = (
        run(token_loss.next_token_loss, dtype),
        run(plain_loss, dtype),
        run(plain_loss, torch.double),
    )
    for name, *results in zip(("loss", "d_hidden", "d_weight"), *found, strict=True):
        assert_within_budget(name, *results)
    hidden, weight = (x.requires_grad_() for x in inputs)
    options = (hidden.detach().flatten(0, 1).requires_grad_(), weight, labels.flatten(), True, True)
    torch.library.opcheck(torch.ops.memattn.linear_cross_entropy, options)


def test_no_label_at_all():
    hidden = torch.randn(1, 4, 6, requires_grad=True)
    loss = token_loss.next_token_loss(hidden, torch.randn(9, 6), torch.full((1, 4), -100))
    loss.backward()
    assert loss.isnan() and hidden.grad is not None and not hidden.grad.any()


def test_the_loss_without_logits_is_differentiable_once():
    """Also where every layer is twice: a constant would stand for its gradient."""
    model, batch = make_model(backend="reference"), make_batch()
    weight = model.model.embed_tokens.weight
    loss = model(**batch, skip_logits=True).loss
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="skip_logits must be False for a second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("preset", ["vanilla", "segmented"])
def test_a_batch_of_no_rows(preset):
    model, ids = make_model(preset), torch.zeros(0, 5, dtype=torch.long)
    output = model(ids, labels=ids)
    output.logits.sum().backward()
    assert output.logits.shape == (0, 5, 53)
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_skip_logits():
    model, batch = make_model(), make_batch()
    skipped, whole = model(**batch, skip_logits=True), model(**batch)
    assert skipped.logits is None and whole.logits.shape == (3, 23, 53)
    torch.testing.assert_close(skipped.loss, whole.loss)
    items = {"num_items_in_batch": torch.tensor(100)}
    torch.testing.assert_close(
        model(**batch, **items, skip_logits=True).loss, model(**batch, **items).loss
    )
    model.loss_function = lambda logits, **_: logits.sum()  # one of the user's own
    assert model(**batch, skip_logits=True).loss == model(**batch).loss
    with pytest.raises(ValueError, match="skip_logits must be False without labels"):
        model(batch["input_ids"], skip_logits=True)
