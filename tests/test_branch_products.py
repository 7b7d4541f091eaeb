"""Projections of branches for the tokens that use them."""

import pytest
import torch

from memattn.nn.attention_specialist import AttentionWeights
from memattn.nn.branch_products import plan_branches

B, T, S, E, H, F = 3, 21, 17, 8, 2, 5


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_gates(dtype=torch.float64):
    """Tokens of the first sample use branches 1 and 3 or none, the others what they like."""
    gates = draw(B, T, F, dtype=dtype)
    gates = torch.where(gates > 0.4, gates, 0.0)
    gates[0, :, [0, 2, 4]] = 0.0
    gates[1, :, 2] = 0.0
    gates[2, :, 2:] = 0.0
    return gates


def make_weights(bias, dtype=torch.float64):
    shapes = [(E, E)] * 4 + [(E,)] * 4
    tensors = [[draw(*s, seed=8 * f + i).to(dtype) for i, s in enumerate(shapes)] for f in range(F)]
    for row in tensors:
        row[4:] = row[4:] if bias else [None] * 4
    return [AttentionWeights(*(t if t is None else t.requires_grad_() for t in r)) for r in tensors]


@pytest.mark.parametrize("bias", [True, False])
def test_projections_are_those_of_each_branch(bias):
    """Values and gradients; a branch that no token uses may hold NaN, and gets no gradient."""
    gates, weights = make_gates().requires_grad_(), make_weights(bias)
    x, y = draw(B, T, E, seed=1).requires_grad_(), draw(B, S, E, seed=2).requires_grad_()
    plan = plan_branches(gates)
    assert plan.branches == [0, 1, 3, 4] and plan.used == [[1, 3], [0, 1, 3, 4], [0, 1]]
    assert plan.width == 4 and plan.slots.shape == (B, T, F)
    by_number = {f: weights[f] for f in plan.branches}
    query, key = plan.queries(x, by_number, H), plan.keys(y, by_number, H, "k")
    assert query.shape == (B, F, H, T, E // H) and key.shape == (B, 4, H, S, E // H)
    held = plan.slots >= 0
    value = draw(B, F, H, T, E // H, seed=3) * held.transpose(1, 2)[:, :, None, :, None]
    value.requires_grad_()
    found = plan.reduce(value, by_number)
    heads = lambda x, f, n: torch.nn.functional.linear(
        x, getattr(weights[f], n), getattr(weights[f], f"{n}_bias")
    ).unflatten(-1, (H, -1)).transpose(0, 1)  # fmt: skip
    wanted = []
    for b in range(B):
        for at, f in enumerate(plan.used[b]):
            torch.testing.assert_close(key[b, at], heads(y[b], f, "k"))
        assert not key[b, len(plan.used[b]) :].any()
        total = torch.zeros(T, E, dtype=torch.float64)
        for t, a in held[b].nonzero().tolist():
            f = int(plan.slots[b, t, a])
            assert plan.used[b][int(plan.places[b, t, a])] == f
            assert plan.gates[b, t, a] == gates[b, t, f]
            wanted.append((query[b, a, :, t] - heads(x[b, t : t + 1], f, "q")[:, 0]).abs().max())
            row = weights[f].out @ value[b, a, :, t].flatten()
            if bias:
                row = row + gates[b, t, f] * weights[f].out_bias
            total = total + torch.nn.functional.one_hot(torch.tensor(t), T)[:, None] * row
        torch.testing.assert_close(found[b], total)
        given = [x, y, value, gates, *(t for w in weights for t in w if t is not None)]
        results = [found[b], query[b], key[b]]
        expected = [
            total,
            sum(
                torch.nn.functional.one_hot(torch.tensor(a * T + t), F * T).view(F, 1, T, 1)
                * heads(x[b, t : t + 1], int(plan.slots[b, t, a]), "q")[None]
                for t, a in held[b].nonzero().tolist()
            ),
            torch.stack([heads(y[b], f, "k") for f in plan.used[b]]),
        ]
        results[2] = results[2][: len(plan.used[b])]
        cotangents = [draw(*r.shape, seed=n) for n, r in enumerate(expected)]
        actual, right = (
            torch.autograd.grad(r, given, cotangents, allow_unused=True, retain_graph=True)
            for r in (results, expected)
        )
        for one, other in zip(actual, right, strict=True):
            one = torch.zeros(()) if one is None else one
            other = torch.zeros(()) if other is None else other
            torch.testing.assert_close(*torch.broadcast_tensors(one.double(), other.double()))
    assert torch.stack(wanted).max() < 1e-12
    query.sum().backward()
    assert weights[2].q.grad is None and weights[1].q.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_a_token_gets_does_not_depend_on_how_many_others_use_its_branch(dtype):
    gates, weights = make_gates(dtype), make_weights(True, dtype)
    by_number = dict(enumerate(weights))
    x = draw(B, T, E, seed=1, dtype=dtype)
    heads, results = draw(B, F, H, T, E // H, seed=3, dtype=dtype), []
    for cut in range(T + 1):
        changed = gates.clone()
        changed[1:, cut:] = 0.0
        plan = plan_branches(changed)
        held = (plan.slots >= 0).transpose(1, 2)[:, :, None, :, None]
        query = plan.queries(x, by_number, H)
        results.append((query[0], plan.reduce(heads * held, by_number)[0]))
    for query, out in results:
        assert torch.equal(query, results[0][0]) and torch.equal(out, results[0][1])


def test_gates_that_are_all_0_use_nothing():
    plan = plan_branches(torch.zeros(B, T, F), 2)
    assert plan.branches == [] and plan.width == 0 and (plan.slots == -1).all()
