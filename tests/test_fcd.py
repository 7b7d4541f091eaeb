"""FCD: weights of a shared, frozen core and a small vector of each task."""

import pytest
import torch
from continual_streams import SMALL, blobs

from memattn.continual import make_strategy


def learn(stream, n, **options):
    strategy = make_strategy("fcd", stream, SMALL, 0, options)
    for index, task in enumerate(stream.tasks[:n]):
        strategy.fit(index, task)
    return strategy


def test_weights_are_the_tucker_product():
    tucker = learn(blobs(), 2, rank=3, vector_size=5).tucker
    for index in (0, 1):
        weights = tucker.weights(index)
        assert list(weights) == ["blocks.0.weight", "blocks.1.weight"]
        for i, weight in enumerate(weights.values()):
            factors = (tucker.left[i], tucker.core[i], tucker.right[i], tucker.vectors[index][i])
            expected = torch.einsum("oa,abk,bi,k->oi", *(f.double() for f in factors))
            torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_later_task_trains_its_vectors_and_its_head_only():
    stream = blobs()
    strategy = learn(stream, 1)
    before = {name: t.clone() for name, t in strategy.network.state_dict().items()}
    numbers = strategy.parameters_to_predict()
    strategy.fit(1, stream.tasks[1])
    after = strategy.network.state_dict()
    changed = {n for n, t in after.items() if n not in before or not torch.equal(t, before[n])}
    assert changed == {"backbone.vectors.1", "heads.1.weight", "heads.1.bias"}
    assert strategy.parameters_to_predict() - numbers == 2 * strategy.vector_size


def test_the_first_task_trains_the_core_and_not_later_heads():
    stream = blobs()
    untrained = learn(stream, 0).network.state_dict()
    trained = learn(stream, 1).network.state_dict()
    same = {name for name, t in untrained.items() if torch.equal(t, trained[name])}
    assert same == {f"heads.{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}


def test_separation_turns_vectors_away_from_earlier_ones():
    def squared_cosine(separation):
        first, second = learn(blobs(), 2, separation=separation).tucker.vectors
        return torch.cosine_similarity(first, second, dim=-1).square().mean()

    assert squared_cosine(100.0) < 0.1 * squared_cosine(0.0)


@pytest.mark.parametrize("backbone", ["mlp", "transformer"])
def test_the_backbone_keeps_no_matrix_of_its_own(backbone):
    strategy = make_strategy("fcd", blobs(), SMALL.__class__(backbone=backbone), 0)
    tucker = strategy.tucker
    assert not [name for name, p in tucker.backbone.named_parameters() if p.dim() == 2]
    assert not any(buffer.numel() for buffer in tucker.backbone.buffers())
