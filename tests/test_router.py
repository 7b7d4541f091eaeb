"""The router of chapters as a module: how many it selects, its losses, its parameters."""

import pytest
import torch

from memattn.nn import ChapterRouter


def make(num_chapters=8, top_k=3, **options):
    torch.manual_seed(0)
    router = ChapterRouter(16, num_chapters, top_k, **options).double()
    return router, torch.randn(2, 5, 16, dtype=torch.float64)


@pytest.mark.parametrize("top_k, shared", [(1, 0), (3, 0), (3, 2), (6, 2)])
def test_selects_top_k_and_the_shared(top_k, shared):
    router, x = make(top_k=top_k, num_shared=shared, routed_scale=2.5)
    output = router(x)
    assert output.indices.shape == output.weights.shape == (2, 5, shared + top_k)
    for row in output.indices.flatten(0, 1).tolist():
        assert row[:shared] == list(range(shared)) and len(set(row)) == shared + top_k
        assert all(shared <= chapter < 8 for chapter in row[shared:])
    assert (output.weights[..., :shared] == 1).all()
    total = output.weights[..., shared:].sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, 2.5))
    # shared chapters have no parameters, so that every one gets a gradient
    assert router.weight.shape == (8 - shared, 16)


def test_the_logits_are_a_linear_layer():
    router, x = make(temperature=0.5)
    logits = (x @ router.weight.T + router.bias) / 0.5
    assert torch.equal(router(x).indices.long(), logits.topk(3).indices)


@torch.no_grad()
@pytest.mark.parametrize("normalisation, balanced", [("mean", 1.0), ("sum", 3.0)])
def test_load_balance_loss_at_balance_and_at_worst(normalisation, balanced):
    router, x = make(normalisation=normalisation)
    router.weight.zero_()  # the same probability everywhere
    output = router(x)
    assert float(output.load_balance_loss) == pytest.approx(balanced)
    assert float(output.auxiliary_loss) == pytest.approx(0.0)
    router.bias[0] = 100.0  # one chapter takes all
    output = router(x)
    assert float(output.load_balance_loss) == pytest.approx(balanced * 8 / 3)
    assert float(output.auxiliary_loss) == pytest.approx(7.0)
    assert float(output.z_loss) == pytest.approx(100.0**2)


@torch.no_grad()
def test_probability_cannot_hide_in_a_shared_chapter():
    router, x = make(num_shared=1)
    router.weight.zero_()
    router.bias[0] = 100.0  # the first routed chapter, not the shared one
    assert float(router(x).load_balance_loss) > 1.0


def test_rows_that_do_not_exist_select_nothing():
    router, x = make(num_shared=1)
    valid = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    output = router(x, valid)
    assert (output.indices[1, 2:] == -1).all() and not output.weights[1, 2:].any()
    assert output.count == 7


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(top_k=9), "top_k must be at most num_chapters - num_shared = 8, got 9"),
        (dict(top_k=7, num_shared=2), "top_k must be at most num_chapters - num_shared = 6"),
        (dict(num_shared=8), "num_chapters must be"),
        (dict(normalisation="max"), "normalisation must be one of mean, sum"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
