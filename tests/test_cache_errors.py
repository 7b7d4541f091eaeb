"""What the cache, and the decoder with it, refuse."""

import pytest
import torch
from model_factories import make_model, make_tokens

from memattn.models import MemAttnCache


@pytest.mark.parametrize(
    "use, error, message",
    [
        (
            lambda model, cache: model(make_tokens(B=3), past_key_values=cache),
            ValueError,
            "past_key_values must have the batch size of the input, 3, got 2",
        ),
        (
            lambda model, cache: model(
                make_tokens(T=2), past_key_values=cache, attention_mask=torch.ones(2, 7)
            ),
            ValueError,
            r"attention_mask must have shape \[B=2, 2\] or \[B=2, 25\], got \[2, 7\]",
        ),
        (
            lambda model, cache: model(
                make_tokens(T=1),
                past_key_values=cache,
                attention_mask=torch.cat([torch.zeros(2, 3), torch.ones(2, 21)], 1),
            ),
            ValueError,
            "attention_mask must agree with the past_key_values on earlier columns",
        ),
        (
            lambda model, cache: model(
                make_tokens(B=1),
                past_key_values=cache,
                cu_seqlens=torch.tensor([0, 23], dtype=torch.int32),
            ),
            ValueError,
            "past_key_values must be None with packed documents, got MemAttnCache",
        ),
        (
            lambda model, cache: model.generate(
                make_tokens(), cache_implementation="static", max_new_tokens=1
            ),
            ValueError,
            "cache_implementation must be None, got 'static'",
        ),
        (
            lambda model, cache: cache.reset(torch.ones(3, dtype=torch.bool)),
            ValueError,
            "mask must",
        ),
        (lambda model, cache: cache.reset(torch.ones(2)), ValueError, "mask must have dtype"),
        (lambda model, cache: cache.reset([True]), TypeError, "mask must be a tensor, got list"),
        (lambda model, cache: cache.crop(1), ValueError, "must be between -23 and 0, got 1"),
        (lambda model, cache: cache.crop(-24), ValueError, "tokens_to_remove must be between"),
        (lambda model, cache: cache.crop(-9), ValueError, "tokens_to_remove must leave what later"),
        (
            lambda model, cache: MemAttnCache(model.config).save("never.safetensors"),
            ValueError,
            "cache must hold sequences to be saved, got an empty cache",
        ),
        (
            lambda model, cache: MemAttnCache(model.config).split(1),
            ValueError,
            "cache must hold sequences to be split, got an empty cache",
        ),
        (lambda model, cache: MemAttnCache.merge([]), ValueError, "caches must hold at least one"),
        (
            lambda model, cache: MemAttnCache.merge([cache, MemAttnCache(model.config)]),
            ValueError,
            "caches must hold sequences, got an empty cache",
        ),
    ],
)
def test_error_messages(use, error, message):
    model = make_model()
    cache = model(make_tokens(), use_cache=True).past_key_values
    with pytest.raises(error, match=message):
        use(model, cache)
