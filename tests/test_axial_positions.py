"""Axial positions: a segment and a place in it, from tables that end or networks that do not."""

import pytest
import torch
from model_factories import logits_of, make_config, make_model, make_tokens
from torch.nn.functional import silu

from memattn.models import MemAttnCache, MemAttnConfig
from memattn.nn import ContinuousAxialPositions

KINDS = ("axial", "continuous_axial")
OPTIONS = dict(position_segment_len=5, max_position_embeddings=23, num_hidden_layers=1)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_segment_and_place(kind):
    model = make_model("vanilla", position_embedding=kind, **OPTIONS)
    positions = model.model.embed_positions
    segment, place = torch.arange(23) // 5, torch.arange(23) % 5
    if kind == "axial":
        assert (len(positions.segments.weight), len(positions.places.weight)) == (5, 5)
        expected = positions.segments.weight[segment] + positions.places.weight[place]
    else:
        expected = 0.0
        for i, x in enumerate([(1.0 + segment.double()).log(), place.double() / 5]):
            hidden = silu(x[:, None] * positions.in_weight[i] + positions.in_bias[i])
            expected = expected + hidden @ positions.out_weight[i].T
    torch.testing.assert_close(positions(torch.arange(23)[None])[0], expected, rtol=0, atol=1e-12)
    assert model.model.rotary is None
    # what the model sees of a token in another place differs
    tokens = torch.full((1, 23), 7)
    assert logits_of(model, tokens)[0].unique(dim=0).shape[0] == 23
    model.train()(tokens, labels=make_tokens(B=1)).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in positions.parameters())


def test_tables_end_and_networks_do_not():
    tokens = make_tokens(T=24)
    limited = make_model("vanilla", position_embedding="axial", **OPTIONS)
    message = "input_ids must have at most max_position_embeddings=23 tokens a row, got 24"
    with pytest.raises(ValueError, match=message):
        limited(tokens)
    cache = MemAttnCache(limited.config)
    limited(tokens[:, :23], past_key_values=cache)
    with pytest.raises(ValueError, match=message):
        limited(tokens[:, 23:], past_key_values=cache)
    endless = make_model("vanilla", position_embedding="continuous_axial", **OPTIONS)
    assert logits_of(endless, tokens.repeat(1, 9)).isfinite().all()


def test_new_networks_are_as_large_as_embeddings():
    torch.manual_seed(0)
    config = make_config("window", position_embedding="continuous_axial")
    assert config.position_segment_len == 4  # the window
    assert MemAttnConfig.from_dict(config.to_dict()).position_segment_len == 4
    positions = type(make_model("window"))(config).model.embed_positions
    assert isinstance(positions, ContinuousAxialPositions)
    size = positions(torch.arange(999)[None]).std().item() / config.initializer_range
    assert 0.25 < size < 4.0
    half = positions.bfloat16()
    half.segment_len = 1000  # places that bfloat16 could not tell apart
    assert half.in_weight.dtype == torch.bfloat16
    rows = half(torch.arange(900, 1000)[None])[0].float()
    assert rows.unique(dim=0).shape[0] > 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(position_embedding="axial"),
            "position_segment_len must be given where no part has segments, got 0",
        ),
        (
            dict(position_embedding="axial", position_segment_len=-1),
            "position_segment_len must be at least 1, got -1",
        ),
        (
            dict(position_segment_len=4),
            "position_segment_len must be None with position_embedding 'rope', got 4",
        ),
    ],
)
def test_wrong_segments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MemAttnConfig.vanilla(**options)
