"""Models with future attention, and the seed's architecture: sizes, leaks, losses, limits."""

import json

import pytest
import torch
from model_factories import (
    SIZES,
    VOCAB,
    enable_checkpointing,
    make_tokens,
    pad_left,
    perturb,
)
from torch.nn import functional as F

from memattn.evaluate import audit
from memattn.models import (
    PRESETS,
    AttentionConfig,
    FutureConfig,
    MemAttnCache,
    MemAttnConfig,
    MemAttnForCausalLM,
)
from memattn.nn import FutureAttention, FutureComputed, SegmentedAttention

N_CTX = 40
KEY_SOURCES = ["table", "relative", "computed"]
GPT = dict(position_embedding="learned", norm="layer", mlp="gelu")


def make_config(source="table", **options):
    own = dict(future_dim=5, source=source, source_rank=3)
    return MemAttnConfig.future(**own | SIZES | dict(max_position_embeddings=N_CTX) | options)


def make_model(source="table", dtype=torch.float64, **options):
    torch.manual_seed(0)
    return perturb(MemAttnForCausalLM(make_config(source, **options)).to(dtype).eval())


@pytest.mark.parametrize(
    "preset, sizes, count, without_positions",
    [
        ("future", (144, 9, 28, dict(future_dim=199)), 15_846_048, 15_817_248),
        ("vanilla", (160, 10, 26, {}), 16_068_800, 16_036_800),
        ("vanilla", (156, 12, 26, {}), 15_472_392, 15_441_192),
    ],
    ids=["future", "baseline", "smaller baseline"],
)
def test_published_models_have_their_published_sizes(preset, sizes, count, without_positions):
    width, heads, layers, own = sizes
    config = PRESETS[preset](
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        vocab_size=50257,
        max_position_embeddings=200,
        **GPT,
        **own,
    )
    with torch.device("meta"):
        model = MemAttnForCausalLM(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == count
    positions = model.model.embed_positions
    assert positions is not None and total - positions.weight.numel() == without_positions


@pytest.mark.parametrize(
    "source, options",
    [
        ("table", dict(num_hidden_layers=1)),
        ("relative", dict(num_hidden_layers=1)),
        ("computed", dict(start_layer=1)),
        ("computed", GPT),
    ],
    ids=str,
)
def test_audit_passes(source, options):
    report = audit(make_model(source, **options), seq_len=24)
    assert report.verdict == "all 0", [row for row in report.rows if row.value != 0.0]
    assert {row.check for row in report.rows if row.value is not None} >= {
        "future leak",
        "packed documents",
        "decode vs prefill",
    }


def test_audit_chooses_a_length_that_crosses_the_band():
    model = make_model("relative", future_dim=20, num_hidden_layers=1)
    report = audit(model)  # of 40 tokens, as many as there may be
    assert report.verdict == "all 0" and report.notes == ()
    (note,) = audit(model, seq_len=20).notes
    assert note.startswith("20 tokens do not cross")


def test_audit_finds_a_source_that_takes_one_token_too_late(monkeypatch):
    model = make_model("computed", num_hidden_layers=1)
    future = model.model.layers[0].attention.future
    future.future_dim -= 1
    monkeypatch.setattr(type(future), "num_rows", lambda self, length: N_CTX - 1)
    leaks = [row for row in audit(model, seq_len=16).rows if row.check == "future leak"]
    assert leaks and all(row.value > 0.0 for row in leaks)


def test_layers_outside_the_range_are_causal():
    model = make_model(start_layer=1, end_layer=3, num_hidden_layers=4)
    kinds = [type(layer.attention) for layer in model.model.layers]
    assert kinds == [SegmentedAttention, FutureAttention, FutureAttention, SegmentedAttention]
    assert make_config(num_hidden_layers=2).attention.layers(2) == range(2)
    assert isinstance(make_model("computed").model.layers[0].attention.future, FutureComputed)


@pytest.mark.parametrize("loss_type", ["mse", "cosine"])
def test_the_losses_of_layers_are_averaged_and_added_in_training_only(loss_type):
    model = make_model(loss_type=loss_type, loss_coefficient=0.7, num_hidden_layers=3)
    tokens = make_tokens()
    of_layers = []
    for layer in model.model.layers:
        layer.attention.register_forward_hook(lambda m, args, out: of_layers.append(out.loss))
    model.train()
    output = model(tokens, labels=tokens)
    assert len(of_layers) == 3 and len({loss.item() for loss in of_layers}) == 3
    torch.testing.assert_close(output.future_loss, torch.stack(of_layers).mean())
    cross_entropy = F.cross_entropy(
        output.logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten()
    )
    torch.testing.assert_close(output.lm_loss, cross_entropy)
    torch.testing.assert_close(output.loss, output.lm_loss + 0.7 * output.future_loss)
    held_out = model.eval()(tokens, labels=tokens)
    assert torch.equal(held_out.loss, held_out.lm_loss)
    torch.testing.assert_close(held_out.loss, output.lm_loss)
    torch.testing.assert_close(held_out.future_loss, output.future_loss)


def test_the_future_loss_is_computed_where_it_is_wanted():
    model, tokens = make_model(), make_tokens()
    assert model(tokens).future_loss is None
    assert model(tokens, output_losses=True).future_loss > 0
    assert model(tokens, labels=tokens, output_losses=False).future_loss is None
    model.train()
    assert model(tokens).future_loss > 0
    without = make_model(loss_type=None).train()(tokens, labels=tokens)
    assert without.future_loss is None and torch.equal(without.loss, without.lm_loss)


def test_a_coefficient_of_zero_measures_without_training():
    model, tokens = make_model(loss_coefficient=0.0).train(), make_tokens()
    output = model(tokens, labels=tokens)
    assert output.future_loss > 0 and torch.equal(output.loss, output.lm_loss)


def test_micro_batches_add_up():
    """With the number of labels of the whole batch, each part counts by its share of them."""
    model, tokens = make_model(loss_coefficient=0.7).train(), make_tokens(B=3)
    labels = tokens.clone()
    labels[2, 10:] = -100
    count = (labels[:, 1:] != -100).sum()
    parts = [
        model(tokens[rows], labels=labels[rows], num_items_in_batch=count)
        for rows in (slice(0, 2), slice(2, 3))
    ]
    whole = model(tokens, labels=labels)
    shares = [44 / 53, 9 / 53]
    lm_loss = sum(part.lm_loss for part in parts)
    torch.testing.assert_close(lm_loss, whole.lm_loss)
    future = sum(share * part.future_loss for share, part in zip(shares, parts, strict=True))
    torch.testing.assert_close(sum(part.loss for part in parts), lm_loss + 0.7 * future)
    # rows that are alike in length and labels give the loss of the batch
    halves = [
        model(tokens[b : b + 1], labels=tokens[b : b + 1], num_items_in_batch=torch.tensor(66))
        for b in range(3)
    ]
    torch.testing.assert_close(sum(half.loss for half in halves), model(tokens, labels=tokens).loss)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(use_reentrant):
    tokens, mask = pad_left([make_tokens()[0], make_tokens()[1, :9]], 23)
    grads = []
    for checkpointing in (False, True):
        model = make_model("computed", loss_type="cosine", detach_target=False).train()
        if checkpointing:
            enable_checkpointing(model, use_reentrant=use_reentrant)
        model(tokens, attention_mask=mask, labels=tokens).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.usefixtures("new_programs")
def test_compiles_as_one_graph():
    model = make_model("computed", dtype=torch.float32, num_hidden_layers=1).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    tokens, mask = pad_left([make_tokens()[0], make_tokens()[1, :9]], 23)
    actual = compiled(tokens, attention_mask=mask, labels=tokens)
    expected = model(tokens, attention_mask=mask, labels=tokens)
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.future_loss, expected.future_loss)


@pytest.mark.parametrize("source", KEY_SOURCES)
def test_bfloat16_trains(source):
    model = make_model(source, dtype=torch.float32).to(torch.bfloat16).train()
    tokens = make_tokens()
    output = model(tokens, labels=tokens)
    assert output.logits.dtype == torch.bfloat16 and output.future_loss.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_the_loss_trains_the_table():
    """A few steps on one text lower the future loss: its gradient points the right way."""
    torch.manual_seed(0)
    model = MemAttnForCausalLM(make_config(loss_type="cosine", future_dim=3)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = make_tokens(B=1, T=N_CTX)
    losses = []
    for _ in range(12):
        output = model(tokens, labels=tokens)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((output.lm_loss.item(), output.future_loss.item()))
    assert losses[-1][0] < losses[0][0] - 1.0 and losses[-1][1] < losses[0][1] - 0.1


@pytest.mark.parametrize("source", ["table", "computed"])
def test_longer_sequences_than_there_are_positions_are_named(source):
    model, tokens = make_model(source), make_tokens(B=1, T=60)
    message = "input_ids must have at most max_position_embeddings=40 tokens a row, got 41"
    with pytest.raises(ValueError, match=message):
        model(tokens[:, :41])
    cache = MemAttnCache(model.config)
    model(tokens[:, :39], past_key_values=cache)
    with pytest.raises(ValueError, match=message):
        model(tokens[:, 39:41], past_key_values=cache)
    # the failed call left the cache as it was
    last = model(tokens[:, 39:40], past_key_values=cache).logits
    whole = model(tokens[:, :40]).logits[:, 39:]
    torch.testing.assert_close(last, whole, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=message):
        model(tokens[:, :41], use_cache=False)
    with pytest.raises(ValueError, match=message):
        model(tokens, cu_seqlens=torch.tensor([0, 19, 60], dtype=torch.int32))


def test_only_positions_count_towards_the_limit():
    learned = make_model("relative", position_embedding="learned")
    with pytest.raises(ValueError, match="at most max_position_embeddings=40 tokens a row, got 60"):
        learned(make_tokens(T=60))
    assert make_model("relative")(make_tokens(T=60)).logits.shape == (2, 60, VOCAB)
    for model in (learned, make_model("computed")):
        tokens = make_tokens(B=1, T=60)
        packed = model(tokens, cu_seqlens=torch.tensor([0, 40, 60], dtype=torch.int32)).logits
        torch.testing.assert_close(
            packed[:, :40], model(tokens[:, :40]).logits, rtol=1e-10, atol=1e-10
        )
        padded, mask = pad_left([tokens[0, :40]], 60)
        logits = model(padded, attention_mask=mask).logits[:, 20:]
        torch.testing.assert_close(logits, packed[:, :40], rtol=1e-10, atol=1e-10)
        right = model(padded.flip(1), attention_mask=mask.flip(1)).logits[:, :40]
        assert right.isfinite().all()


def test_generation_stops_with_a_message_at_the_last_position():
    model, tokens = make_model(), make_tokens(T=38)
    longest = dict(do_sample=False, eos_token_id=None)
    assert model.generate(tokens, max_new_tokens=2, **longest).shape == (2, 40)
    with pytest.raises(ValueError, match="at most max_position_embeddings=40 tokens a row"):
        model.generate(tokens, max_new_tokens=4, **longest)


def test_config_survives_json():
    config = make_config("computed", start_layer=1, loss_type=None, **GPT)
    again = MemAttnConfig.from_dict(json.loads(config.to_json_string()))
    assert again.attention == config.attention
    assert again.attention == FutureConfig(
        future_dim=5, source="computed", source_rank=3, start_layer=1, loss_type=None
    )
    assert (again.position_embedding, again.norm, again.mlp) == ("learned", "layer", "gelu")
    assert again.intermediate_size == SIZES["intermediate_size"]
    assert PRESETS["future"]().attention == FutureConfig()
    assert AttentionConfig(kind="future") == FutureConfig()


def test_what_the_gpt_parts_are():
    config = MemAttnConfig.vanilla(**SIZES | dict(intermediate_size=None), **GPT)
    assert config.intermediate_size == 4 * config.hidden_size
    assert MemAttnConfig.vanilla(hidden_size=64, num_attention_heads=2).intermediate_size == 192
    model = MemAttnForCausalLM(config)
    names = {name for name, _ in model.named_parameters()}
    assert not any(name.endswith("bias") for name in names)
    assert model.model.rotary is None and isinstance(model.model.norm, torch.nn.LayerNorm)
    # a token is known by its place: the same token twice gives two different embeddings
    states = model(torch.full((1, 2), 7), output_hidden_states=True).hidden_states[0]
    expected = model.model.embed_tokens.weight[7] + model.model.embed_positions.weight[:2]
    torch.testing.assert_close(states[0], expected)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(future_dim=0), ValueError, "attention.future_dim must be at least 1, got 0"),
        (
            dict(future_dim=40),
            ValueError,
            "attention.future_dim must be at most max_position_embeddings - 1 = 39, got 40",
        ),
        (dict(source="x"), ValueError, "attention.source must be one of table, relative"),
        (dict(source_rank=0), ValueError, "attention.source_rank must be at least 1"),
        (dict(loss_type="l1"), ValueError, "attention.loss_type must be None or one of mse"),
        (
            dict(loss_coefficient=-1.0),
            ValueError,
            "attention.loss_coefficient must be finite and at least 0, got -1.0",
        ),
        (dict(start_layer=2), ValueError, "start_layer must be below num_hidden_layers=2, got 2"),
        (dict(start_layer=-1), ValueError, "start_layer must be at least 0, got -1"),
        (dict(end_layer=3), ValueError, "end_layer must be at most num_hidden_layers=2, got 3"),
        (
            dict(start_layer=1, end_layer=1),
            ValueError,
            "attention.end_layer must be at least 2, got 1",
        ),
        (dict(detach_target="no"), TypeError, "attention.detach_target must be True or"),
        (
            dict(position_embedding="alibi"),
            ValueError,
            "position_embedding must be one of rope, learned, axial, continuous_axial, got 'alibi'",
        ),
        (dict(norm="batch"), ValueError, "norm must be one of rms, layer, got 'batch'"),
        (dict(mlp="relu"), ValueError, "mlp must be one of swiglu, gelu, got 'relu'"),
    ],
    ids=str,
)
def test_config_error_messages(options, error, message):
    with pytest.raises(error, match=message):
        make_config(**options)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: AttentionConfig(future=FutureConfig()),
            ValueError,
            'attention.future must be None with attention.kind "causal"',
        ),
        (
            lambda: AttentionConfig(kind="future", num_persistent_tokens=2),
            ValueError,
            'attention.num_persistent_tokens must be 0 with attention.kind "future", got 2',
        ),
        (
            lambda: AttentionConfig(kind="future", window_size=2),
            ValueError,
            'attention.window_size must be None with attention.kind "future", got 2',
        ),
        (
            lambda: AttentionConfig(kind="future", future=3),
            TypeError,
            "attention.future must be a FutureConfig or a dict, got int",
        ),
        (
            lambda: MemAttnConfig(future_dim=4),
            TypeError,
            "future_dim must be given as a field of attention, got 4",
        ),
    ],
)
def test_part_error_messages(make, error, message):
    with pytest.raises(error, match=message):
        make()
