"""First tokens that all later ones see: what a cache keeps of them, and what masses they get."""

import copy

import pytest
import torch

from memattn import segmented_attention
from memattn.models import MemAttnCache, MemAttnConfig, MemAttnForCausalLM
from memattn.parts.views import MASSES_BY_SOURCE

T = 40
SPANS = [(None, 5), (6, 4), (8, None)]


@pytest.fixture(params=SPANS, ids=str)
def model(request) -> MemAttnForCausalLM:
    torch.manual_seed(0)
    segment_len, window_size = request.param
    config = MemAttnConfig.segmented(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        segment_len=segment_len,
        window_size=window_size,
        num_persistent_tokens=2,
        num_sink_tokens=3,
    )
    return MemAttnForCausalLM(config).double().eval()


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 50, (rows, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def in_chunks(model, ids, cache, chunks, mask=None) -> torch.Tensor:
    """Logits of a text that comes in chunks."""
    found, end = [], 0
    for chunk in ids.split(chunks, 1):
        end += chunk.shape[1]
        seen = None if mask is None else mask[:, :end]
        found.append(model(chunk, past_key_values=cache, attention_mask=seen).logits)
    return torch.cat(found, 1)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected)


@torch.no_grad()
def test_far_tokens_see_the_first_ones(model):
    ids = tokens()
    changed = ids.clone()
    changed[:, 2] = (ids[:, 2] + 1) % 50
    far = (model(ids).logits - model(changed).logits)[:, -1].abs().amax(-1)
    assert (far > 0).all()


def test_visible_counts_keys(model):
    config = model.config.attention
    options = dict(segment_len=config.segment_len, window_size=config.window_size)
    zeros = torch.zeros(1, 1, T, 4)
    lse = segmented_attention(zeros, zeros, zeros, num_sink_tokens=3, **options).lse
    counts = [config.visible(i, model.config.sizes) - 2 for i in range(T)]
    assert lse.exp().round().int().flatten().tolist() == counts


@torch.no_grad()
@pytest.mark.parametrize("chunks", [1, 7, [2, 1, 1, 20, 16], [25, *[1] * 15]], ids=str)
def test_chunks_are_the_whole(model, chunks):
    ids = tokens(3)
    assert_near(in_chunks(model, ids, MemAttnCache(model.config), chunks), model(ids).logits)
    mask = torch.ones(3, T, dtype=torch.long)
    pads = [0, 4, 23]
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    padded = in_chunks(model, ids, MemAttnCache(model.config), chunks, mask)
    for row, pad in enumerate(pads):
        alone = model(ids[row : row + 1, pad:]).logits
        assert_near(padded[row : row + 1, pad:], alone)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(9, 22), (17, 16), (23, 25), (28, 3)], ids=str)
def test_merged_rows_keep_their_first_tokens(model, lengths, tmp_path):
    ids, more = tokens(), tokens()[:, :9]
    caches = [MemAttnCache(model.config) for _ in lengths]
    for cache, row, length in zip(caches, ids, lengths, strict=True):
        model(row[None, :length], past_key_values=cache)
    MemAttnCache.merge(caches).save(tmp_path / "cache.safetensors")
    loaded = MemAttnCache.load(tmp_path / "cache.safetensors")
    found = in_chunks(model, more, loaded, 1)
    for row, length in enumerate(lengths):
        whole = torch.cat([ids[row, :length], more[row]])[None]
        assert_near(found[row : row + 1], model(whole).logits[:, length:])


@torch.no_grad()
def test_crop_and_reset(model):
    ids = tokens()
    whole = model(ids).logits
    for begin, wrong in ((20, 8), (2, 9)):
        cache = MemAttnCache(model.config)
        model(ids[:, :begin], past_key_values=cache)
        cache.activate_past_recording()
        model(ids[:, -wrong:], past_key_values=cache)
        cache.crop(-wrong)
        assert_near(in_chunks(model, ids[:, begin:], cache, 3), whole[:, begin:])
    cache = MemAttnCache(model.config)
    model(ids[:, :20], past_key_values=cache)
    with pytest.raises(ValueError, match="must leave what later tokens see"):
        cache.crop(-15)  # which changes nothing
    assert_near(in_chunks(model, ids[:, 20:], copy.deepcopy(cache), 3), whole[:, 20:])
    cache.reset(torch.tensor([True, False]))
    found = in_chunks(model, ids[:, 20:], cache, 3)
    assert_near(found[0], model(ids[:1, 20:]).logits[0])
    assert_near(found[1], whole[1, 20:])


def test_masses_of_sources_are_one(model):
    layer = model.model.layers[0].attention
    x = torch.randn(2, T, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    masses = MASSES_BY_SOURCE[type(layer)](layer, x, rotary=None)
    assert_near(sum(masses.values()), torch.ones(2, 4, T, dtype=torch.float64))
    assert not masses["sinks"][..., 0].any() and (masses["sinks"][..., 20:] > 0).all()
