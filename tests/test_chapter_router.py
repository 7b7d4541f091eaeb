"""The router of chapters: its definition against loops, its losses, and what it refuses."""

import pytest
import torch
from chapter_factories import route_by_loops

from memattn import chapter_router


def make_inputs(B=2, N=9, E=8, n_routed=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return {
        "hidden": draw(B, N, E),
        "weight": draw(n_routed, E),
        "bias": draw(n_routed),
    }


@pytest.mark.parametrize("num_shared", [0, 2])
@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_definition_is_that_of_loops(top_k, num_shared):
    tensors = make_inputs()
    found = chapter_router(**tensors, top_k=top_k, num_shared=num_shared, routed_scale=2.5)
    chapters, weights = route_by_loops(
        tensors["hidden"].flatten(0, 1), tensors["weight"], tensors["bias"], top_k, num_shared, 2.5
    )
    assert found.indices.dtype == torch.int32
    assert found.indices.flatten(0, 1).tolist() == chapters
    expected = torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(found.weights.flatten(0, 1), expected)
    assert int(found.count) == 18


@pytest.mark.parametrize("normalisation", ["mean", "sum"])
def test_losses_by_their_formulae(normalisation):
    tensors, tau = make_inputs(), 0.7
    valid = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    found = chapter_router(
        **tensors, top_k=2, valid=valid, temperature=tau, normalisation=normalisation
    )
    z = (tensors["hidden"][valid] @ tensors["weight"].T + tensors["bias"]) / tau
    p, lse = z.softmax(-1), z.logsumexp(-1)
    f = torch.zeros_like(p).scatter(-1, z.topk(2).indices, 1.0).mean(0)
    factor = 3 if normalisation == "mean" else 6
    torch.testing.assert_close(found.load_balance_loss, factor * (f * p.mean(0)).sum())
    torch.testing.assert_close(found.auxiliary_loss, 6 * p.mean(0).square().sum() - 1)
    torch.testing.assert_close(found.z_loss, lse.square().mean())
    torch.testing.assert_close(found.entropy, -(p * p.log()).sum(-1).mean())
    torch.testing.assert_close(found.load, f)
    assert int(found.count) == int(valid.sum())
    assert (found.indices[~valid] == -1).all() and not found.weights[~valid].any()
    assert (found.indices[valid] >= 0).all()


def test_values_at_balance_and_at_worst():
    # every chapter is the choice of two rows, with all its probability
    rows = torch.eye(6, dtype=torch.float64).repeat(2, 1)[None] * 50
    weight = torch.eye(6, dtype=torch.float64)
    balanced = chapter_router(rows, weight, top_k=1)
    assert abs(float(balanced.load_balance_loss) - 1) < 1e-12
    assert abs(float(balanced.auxiliary_loss)) < 1e-12
    uniform = chapter_router(rows * 0, weight, top_k=3, normalisation="sum")
    assert abs(float(uniform.load_balance_loss) - 3) < 1e-12  # the published value: top_k
    assert abs(float(uniform.auxiliary_loss)) < 1e-12  # the published loss is not smallest here
    worst = chapter_router(rows[:, :1].expand(1, 12, 6), weight, top_k=1)
    assert abs(float(worst.auxiliary_loss) - 5) < 1e-9
    # shared chapters have no logit, so no probability can hide in them
    shared = chapter_router(rows, weight, top_k=1, num_shared=1)
    assert float(shared.load_balance_loss) == float(balanced.load_balance_loss)


def test_gradients():
    tensors = make_inputs(B=1, N=4, E=3, n_routed=5)
    names = list(tensors)

    def call(*values):
        found = chapter_router(**dict(zip(names, values, strict=True)), top_k=2, routed_scale=1.5)
        return found.weights, found.load_balance_loss, found.auxiliary_loss, found.z_loss

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in tensors.values()])
    found = chapter_router(**tensors, top_k=2)
    constants = (found.indices, found.count, found.load, found.entropy)
    assert not any(t.requires_grad for t in constants)


def test_ties_go_to_the_lowest_index():
    tensors = make_inputs(n_routed=40)
    tensors = {**tensors, "weight": tensors["weight"] * 0, "bias": tensors["bias"] * 0}
    tensors["bias"][30] = 1.0
    found = chapter_router(**tensors, top_k=5, num_shared=1)
    assert found.indices.unique(dim=1).tolist() == [[[0, 31, 1, 2, 3, 4]]] * 2


def test_invalid_rows_may_hold_anything_and_nan_stays_in_its_row():
    tensors = make_inputs()
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, 3] = False
    expected = chapter_router(**tensors, top_k=2, valid=valid)
    tensors["hidden"] = tensors["hidden"].index_fill(1, torch.tensor([3]), 0.0)
    tensors["hidden"][1, 3] = make_inputs()["hidden"][1, 3]
    tensors["hidden"][0, 3] = torch.nan
    tensors["hidden"].requires_grad_()
    found = chapter_router(**tensors, top_k=2, valid=valid)
    for name in found._fields:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    (found.weights.square().sum() + found.z_loss + found.auxiliary_loss).backward()
    assert tensors["hidden"].grad.isfinite().all() and not tensors["hidden"].grad[0, 3].any()
    seen = chapter_router(**tensors, top_k=2)
    assert seen.weights[0, 3].isnan().all()
    assert ((seen.indices >= 0) & (seen.indices < 6)).all()
    assert torch.equal(seen.weights[1], expected.weights[1])


def test_without_valid_rows_losses_are_0():
    tensors = {name: t.requires_grad_() for name, t in make_inputs().items()}
    found = chapter_router(**tensors, top_k=2, valid=torch.zeros(2, 9, dtype=torch.bool))
    losses = found.load_balance_loss + found.auxiliary_loss + found.z_loss
    losses.backward()
    assert float(losses.detach()) == 0.0 and float(found.count) == 0.0
    assert not any(t.grad.any() for t in tensors.values())


WRONG = {
    "hidden must have 3 axes": dict(hidden=torch.zeros(2, 8)),
    "weight must have shape [C, E=8]": dict(weight=torch.zeros(6, 7)),
    "weight must have the dtype of hidden": dict(weight=torch.zeros(6, 8).half()),
    "bias must have shape [C=6]": dict(bias=torch.zeros(5)),
    "bias must have the dtype of weight": dict(bias=torch.zeros(6).half()),
    "top_k must be at least 1": dict(top_k=0),
    "top_k must be at most C - num_shared = 6": dict(top_k=7),
    "num_shared must be at least 0": dict(num_shared=-1),
    "temperature must be positive": dict(temperature=0.0),
    "routed_scale must be a number": dict(routed_scale="1"),
    "valid must have dtype torch.bool": dict(valid=torch.zeros(2, 9)),
    "normalisation must be one of mean, sum": dict(normalisation="max"),
    "backend must be one of": dict(backend="cuda"),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input(message):
    tensors = make_inputs(dtype=torch.float32)
    with pytest.raises((ValueError, TypeError)) as error:
        chapter_router(**{**tensors, "top_k": 2, **WRONG[message]})
    assert message in str(error.value)
