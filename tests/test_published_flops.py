"""The published FLOPs and parameters of the mixture of chapters, digit for digit."""

from dataclasses import replace

import pytest

from memattn.evaluate.published_flops import (
    MemoryLayerFlops,
    PublishedMemory,
    PublishedModel,
    published_flops,
    published_parameters,
)

MEMORY = PublishedMemory(
    num_layers=4,
    num_chapters=4097,
    num_shared=1,
    top_k=64,
    tokens_per_chapter=64,
    num_heads=12,
    kv_size=768,
)
BACKBONE = PublishedModel(
    hidden_size=768,
    num_layers=16,
    num_heads=12,
    kv_size=256,
    intermediate_size=2304,
    vocab_size=49152,
)


def test_the_published_figures():
    backbone = published_flops(BACKBONE, 1024)
    assert backbone.layer == 17_424_982_016
    assert backbone.memory_layer is None
    assert backbone.head == 77_563_973_632
    assert backbone.total == 356_363_685_888
    assert published_flops(replace(BACKBONE, num_layers=24), 1024).total == 495_763_542_016
    whole = published_flops(replace(BACKBONE, memory=MEMORY), 1024)
    assert whole.memory_layer == MemoryLayerFlops(
        attention=25_674_645_504,
        router=7_124_491,
        router_losses=331_859,
        weighting=15_991_040,
        norm=3_149_824,
        residual=786_432,
    )
    assert sum(whole.memory_layer) == 25_702_029_150
    assert whole.total == 459_171_802_488
    assert (whole.layer, whole.head) == (backbone.layer, backbone.head)


def test_two_sequences_cost_twice_as_much_but_for_the_means_of_the_losses():
    one, two = (published_flops(replace(BACKBONE, memory=MEMORY), 512, b) for b in (1, 2))
    assert two.layer == 2 * one.layer and two.head == 2 * one.head
    assert one.memory_layer is not None and two.memory_layer is not None
    for name, value in one.memory_layer._asdict().items():
        twice = getattr(two.memory_layer, name)
        assert value < twice < 2 * value if name == "router_losses" else twice == 2 * value


def test_the_published_router_has_rows_for_shared_chapters():
    assert published_parameters(371_289_856, 768, MEMORY) == 371_292_932
    assert published_parameters(5, 768, replace(MEMORY, num_shared=0)) == 5


def test_names_a_number_that_is_too_small():
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        published_flops(BACKBONE, 0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        published_flops(BACKBONE, 1, 0)
