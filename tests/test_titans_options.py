"""Titans: its preset beside the plain decoder, and what its layers can have beyond the defaults."""

import pytest
from model_factories import SIZES, make_config

from memattn.models import PRESETS, MemAttnConfig, MemAttnForCausalLM, vanilla_of_equal_parameters
from memattn.parts.causal import CausalConfig


@pytest.mark.parametrize("window_size", [None, 6])
def test_the_plain_decoder_has_as_many_parameters(window_size):
    assert PRESETS["titans"]().attention.kind == "titans"
    sizes = dict(mlp="gelu", head_dim=10, tie_word_embeddings=False)
    other = make_config("titans-mag", **sizes)
    plain = vanilla_of_equal_parameters(other, window_size=window_size)
    count = lambda config: sum(p.numel() for p in MemAttnForCausalLM(config).parameters())
    one_wider = 2 * 2 * SIZES["hidden_size"]  # layers, projections of the MLP
    assert abs(count(plain) - count(other)) <= one_wider / 2
    assert plain.intermediate_size > other.intermediate_size
    if window_size is None:
        assert plain.attention == CausalConfig()
    else:
        assert plain.attention.spans == (None, window_size)
    same = ("hidden_size", "num_key_value_heads", "head_dim", "vocab_size", "mlp", "bos_token_id")
    assert all(getattr(plain, name) == getattr(other, name) for name in same)


def test_a_model_smaller_than_any_plain_decoder_is_refused():
    small = MemAttnConfig.titans(
        variant="lmm",
        memory_heads=1,
        memory_head_dim=1,
        memory_depth=1,
        intermediate_size=1,
        num_persistent_tokens=0,
        **{name: size for name, size in SIZES.items() if name != "intermediate_size"},
    )
    with pytest.raises(ValueError, match="config must have .* parameters or more"):
        vanilla_of_equal_parameters(small)
