"""The gate of specialists: its formulas, what owns what, causality, losses, and what it refuses."""

import copy
import math
import re

import pytest
import torch

from memattn.nn import DomainGate

EQUAL = dict(rtol=1e-11, atol=1e-12)  # float64, another order of sums


def make_gate(n=3, priors=(1.0, 0.5, 2.0), seed=0, **options):
    """A gate of 8 features in float64 with open specialists, and an input ``[2, 7, 8]``."""
    torch.manual_seed(seed)
    gate = DomainGate(8, n, gate_size=5, **options).double()
    for name, prior in zip(gate.specialists, priors, strict=False):
        gate.set_prior(name, prior)
    return gate, 2 * torch.randn(2, 7, 8, dtype=torch.float64)


def one_token(gate, x, base_prior, priors, allowed):
    """The gates of a token with this input, in Python's numbers."""
    logits = []
    for name in gate.specialists:
        V, c, u, d = (p.detach() for p in gate.row(name).parameters())
        logits.append(float(u[0] @ (V @ x + c).clamp(min=0) + d[0]) / gate.temperature)
    weights = [base_prior, *(p if ok else 0.0 for p, ok in zip(priors, allowed, strict=True))]
    score = lambda e: logits[e - 1] + math.log(weights[e]) if weights[e] else -math.inf
    order = sorted(range(1, len(weights)), key=lambda e: (-score(e), e))
    dropped = order[gate.top_k :] if gate.top_k else []
    if gate.activation == "softmax":
        shares = [w * math.exp(a) for w, a in zip(weights, [0.0, *logits], strict=True)]
    else:
        shares = [w / (1 + math.exp(-a)) for w, a in zip(weights[1:], logits, strict=True)]
        shares = [base_prior, *shares]
    shares = [0.0 if e in dropped else s for e, s in enumerate(shares)]
    total = sum(shares)
    return [s / total for s in shares] if total else [1.0] + [0.0] * len(priors)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scope", ["token", "prefix", "sequence"])
def test_gates_are_the_formulas(scope, activation):
    """Temperature, top-k, priors and masks of samples, absent tokens that hold NaN."""
    gate, x = make_gate(scope=scope, activation=activation, temperature=0.7, top_k=2)
    present = torch.ones(2, 7, dtype=torch.bool)
    present[0, [0, 3]] = False
    dirty = x.masked_fill(~present[..., None], torch.nan)
    priors = torch.tensor([[1.0, 0.3, 0.7, 2.0], [0.0, 0.5, 1.0, 1.5]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    for given in (dict(), dict(prior=priors), dict(mask=mask), dict(prior=priors, mask=mask),
                  dict(prior=priors[1], mask=torch.tensor([False] * 3))):  # fmt: skip
        gates = gate(dirty, present=present, **given).gates
        assert not gates[~present].any()
        for b, t in present.nonzero().tolist():
            seen = {"token": [t], "prefix": range(t + 1), "sequence": range(7)}[scope]
            mean = torch.stack([x[b, j] for j in seen if present[b, j]]).mean(0)
            prior = given.get("prior", torch.tensor([1.0, 1.0, 0.5, 2.0])).expand(2, 4)[b].tolist()
            allowed = given.get("mask", torch.ones(3).bool()).expand(2, 3)[b].tolist()
            expected = one_token(gate, mean, prior[0], prior[1:], allowed)
            torch.testing.assert_close(
                gates[b, t], torch.tensor(expected, dtype=torch.float64), **EQUAL
            )


def test_equal_logits_go_to_the_first_specialists():
    gate, x = make_gate(n=20, priors=[1.0] * 20, top_k=3)
    for name in gate.specialists[1:]:
        gate.row(name).load_state_dict(gate.row("specialist_0").state_dict())
    gates = gate(x).gates
    assert (gates[..., :4] > 0).all() and not gates[..., 4:].any()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_specialist_owns_its_row(activation):
    """Closing, adding and removing others and training one change no bit of the rest."""
    gate, x = make_gate(activation=activation)
    gate.set_prior("specialist_1", 0.0)
    assert gate.open_specialists == (0, 2)
    before = gate(x).gates
    assert not before[..., 2].any()
    name = gate.add_specialist()
    assert name == "specialist_3" and gate.open_specialists == (0, 2)
    assert gate.row(name).hidden.weight.dtype == torch.float64
    after = gate(x)
    assert torch.equal(after.gates[..., :4], before) and not after.gates[..., 4].any()
    gate.remove_specialist("specialist_1")
    assert torch.equal(gate(x).gates[..., :3], before[..., [0, 1, 3]])
    assert gate.add_specialist() == "specialist_1"  # after the others
    gate.remove_specialist("specialist_1")

    kept = {n: p.clone() for n, p in gate.state_dict().items()}
    for parameter in gate.parameters():
        parameter.requires_grad_(False)
    gate.row("specialist_2").requires_grad_(True)
    optimizer = torch.optim.SGD(gate.row("specialist_2").parameters(), lr=0.1)
    output = gate(x)
    (output.gates[..., 2].sum() + output.losses["gate_entropy"][0]).backward()
    optimizer.step()
    for name, tensor in gate.state_dict().items():
        changed = not torch.equal(tensor, kept[name])
        assert changed == (name.startswith("rows.specialist_2") and "prior" not in name), name
    # everything closed is the base alone, to the bit; so is a gate without specialists
    for name in gate.specialists:
        gate.set_prior(name, 0.0)
    alone = gate(x).gates
    assert (alone[..., 0] == 1).all() and not alone[..., 1:].any()
    assert torch.equal(DomainGate(8).double()(x).gates, alone[..., :1])
    # an export of one row is all that another gate needs
    other, _ = make_gate(seed=1, activation=activation)
    other.row("specialist_0").load_state_dict(gate.row("specialist_2").state_dict())
    other.set_prior("specialist_0", 2.0)
    mask = torch.tensor([True, False, False])
    assert torch.equal(other(x, mask=mask).gates[..., 1],
                       gate(x, prior=torch.tensor([1.0, 0.0, 2.0, 0.0])).gates[..., 2])  # fmt: skip


@pytest.mark.parametrize("scope", ["token", "prefix"])
def test_nothing_looks_ahead_or_into_another_sequence(scope):
    """Later tokens, padding, packed documents, and calls that go on where the last one ended."""
    gate, x = make_gate(scope=scope)
    labels = torch.tensor([[1], [0]])
    whole = gate(x, is_causal=True, labels=labels)
    changed = x.clone()
    changed[:, 4:] += 1.0
    changed[1, 4:] = torch.nan
    assert torch.equal(gate(changed, is_causal=True).gates[:, :4], whole.gates[:, :4])
    padded = torch.cat([torch.full((2, 3, 8), torch.nan).double(), x], 1)
    present = (torch.arange(10) >= 3).expand(2, 10)
    index = torch.arange(-3, 7).expand(2, 10)
    found = gate(padded, present=present, index=index, labels=labels)
    assert torch.equal(found.gates[:, 3:], whole.gates)
    for loss, (total, count) in whole.losses.items():
        torch.testing.assert_close(found.losses[loss][0], total, **EQUAL)
        assert found.losses[loss][1] == count == 14
    torch.testing.assert_close(found.means(), whole.gates.mean(1), **EQUAL)
    packed = torch.cat([x[:1, :4], x[1:, :3]], 1)
    index = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    apart = torch.cat([whole.gates[:1, :4], whole.gates[1:, :3]], 1)
    assert torch.equal(gate(packed, index=index).gates, apart)
    state, parts = None, []
    for first, last in ((0, 1), (1, 2), (2, 2), (2, 7)):
        part = gate(x[:, first:last], state=state)
        state = part.state
        parts.append(part.gates)
    torch.testing.assert_close(torch.cat(parts, 1), whole.gates, **EQUAL)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_losses_are_finite_where_gates_are_0(activation):
    """Closed, masked and dropped specialists, logits far apart; sums and counts of parts add."""
    gate, x = make_gate(activation=activation, top_k=1, priors=(1.0, 0.0, 2.0))
    present = torch.ones(2, 7, dtype=torch.bool)
    present[1, 5:] = False
    for size in (1.0, 1e4):
        leaf = (x * size).requires_grad_()
        output = gate(leaf, present=present, mask=torch.tensor([True, True, False]))
        g = output.gates[present]
        assert (g == 0).any()
        entropy = torch.special.entr(g.detach()).sum()
        pairs = sum(g[:, a] @ g[:, b] for a in range(4) for b in range(a))
        torch.testing.assert_close(output.losses["gate_entropy"][0].detach(), entropy, **EQUAL)
        torch.testing.assert_close(output.losses["gate_sparsity"][0], pairs, **EQUAL)
        sum(total for total, _ in output.losses.values()).backward()
        for tensor in (leaf, *gate.parameters()):
            assert tensor.grad is None or tensor.grad.isfinite().all()
    assert gate.row("specialist_0").hidden.weight.grad.any()
    parts = [gate(x[b : b + 1], present=present[b : b + 1]).losses for b in (0, 1)]
    whole = gate(x, present=present).losses
    for loss in whole:
        for part, total in zip(zip(*(p[loss] for p in parts), strict=True), whole[loss],
                               strict=True):  # fmt: skip
            torch.testing.assert_close(sum(part), total, **EQUAL)
    leaf = torch.tensor([[0.0, 1.0, 0, 0], [0.5, 0.25, 0.25, 0.0]]).double().requires_grad_()
    given = gate(x, override=leaf)
    total = 7 * (0.5 * math.log(2) + 0.5 * math.log(4))
    assert given.losses["gate_entropy"][0].item() == pytest.approx(total, rel=1e-12)
    assert given.losses["gate_sparsity"][0].item() == pytest.approx(7 * (1 - 0.375) / 2)
    (gradient,) = torch.autograd.grad(given.losses["gate_entropy"][0], leaf)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_labels_teach_whose_text_it_is(activation):
    """Both kinds weigh the same; unknown, absent and closed tokens count nowhere."""
    gate, x = make_gate(activation=activation, priors=(1.0, 0.0, 2.0))
    present = torch.ones(2, 7, dtype=torch.bool)
    present[1, 5:] = False
    labels = torch.tensor([[1, 1, 1, 1, -1, 0, 0], [-1, 1, 1, 0, 1, 1, 0]])
    alone = torch.tensor(
        [[True, True, True], [False, False, False]]
    )  # the second row has no others
    plain = gate(x, present=present)
    assert plain.losses["gate_domain"] == (0.0, 0.0)
    output = gate(x, present=present, labels=labels)
    assert torch.equal(output.gates, plain.gates)
    total, count = output.losses["gate_domain"]
    g = plain.gates[..., 0]
    special, base = (labels == 1) & present, (labels == 0) & present
    expected = (-(1 - g[special]).log().mean() - g[base].log().mean()) / 2
    torch.testing.assert_close(total / count, expected, **EQUAL)
    assert count == 10
    weights = 3 * torch.rand(2, 7)
    given = gate(x, present=present, labels=labels, label_weights=weights).losses["gate_domain"]
    expected = -(weights[special] * (1 - g[special]).log()).sum()
    expected -= (weights[base] * g[base].log()).sum()
    torch.testing.assert_close(given[0], expected, **EQUAL)
    assert given[1] == count
    one_kind = gate(x, present=present, labels=torch.ones(2, 1, dtype=torch.int32))
    total, count = one_kind.losses["gate_domain"]
    torch.testing.assert_close(total / count, -(1 - g[present]).log().mean(), **EQUAL)
    closed = gate(x, present=present, labels=labels, mask=alone).losses["gate_domain"]
    assert closed[1] == 4 + 2 + 1 and closed[0].isfinite()
    (-total).backward()
    assert gate.row("specialist_2").hidden.weight.grad.any()
    assert gate.row("specialist_1").hidden.weight.grad is None


def test_weights_of_samples_are_used_as_they_are():
    """Together and apart, for a row or for every token; closed specialists too."""
    gate, x = make_gate(priors=(0.0,), top_k=1)
    weights = torch.tensor([[0.0, 0.5, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]])
    gates = gate(x, override=weights).gates
    assert torch.equal(gates, weights[:, None].expand(2, 7, 4).double())
    tokens = weights[:, None].repeat(1, 7, 1)
    assert torch.equal(gate(x, override=tokens).gates, gates)
    for b in (0, 1):
        alone = gate(x[b : b + 1], override=weights[b : b + 1]).gates
        assert torch.equal(alone[0], gates[b])


def test_a_prior_is_seen_as_it_is_in_copies_and_in_inference_mode():
    """After it was read once, by a gate whose prior has changed as often as that of its copy."""
    gate, _ = make_gate(n=1, priors=[0.0])
    assert gate.open_specialists == ()
    gate.set_prior("specialist_0", 1.0)
    assert copy.deepcopy(gate).open_specialists == gate.open_specialists == (0,)
    with torch.inference_mode():
        gate = DomainGate(8, 1)
        assert gate.open_specialists == ()
        gate.set_prior("specialist_0", 1.0)
        assert gate.open_specialists == (0,)


def test_gates_do_not_depend_on_autocast_and_are_float32():
    gate, x = make_gate()
    gate, x = gate.bfloat16(), x.bfloat16()
    expected = gate(x)
    wide = gate.float()(x.float())
    assert expected.gates.dtype == torch.float32 and torch.equal(expected.gates, wide.gates)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(x.float()).gates, wide.gates)


WRONG = {
    "hidden_size must be at least 1": lambda: DomainGate(0),
    "scope must be one of token, prefix, sequence, got 'batch'": lambda: DomainGate(
        8, scope="batch"
    ),
    "activation must be one of": lambda: DomainGate(8, activation="relu"),
    "temperature must be positive": lambda: DomainGate(8, temperature=0.0),
    "top_k must be at least 1": lambda: DomainGate(8, top_k=0),
    "x must have shape [B=1, T=2, E=8]": lambda: DomainGate(8)(torch.zeros(1, 2, 4)),
    "scope must be token or prefix in a causal model": lambda: DomainGate(8, scope="sequence")(
        torch.zeros(1, 2, 8), is_causal=True
    ),
    "override must be at least 0 and sum to 1": lambda: DomainGate(8, 1)(
        torch.zeros(1, 2, 8), override=torch.tensor([[0.5, 0.6]])
    ),
    "override must be at least 0 and sum": lambda: DomainGate(8, 1)(
        torch.zeros(1, 2, 8), override=torch.tensor([[1.5, -0.5]])
    ),
    "override must have shape": lambda: DomainGate(8, 1)(
        torch.zeros(1, 2, 8), override=torch.tensor([1.0, 0.0])
    ),
    "prior must have shape [2] or [B=1, 2]": lambda: DomainGate(8, 1)(
        torch.zeros(1, 2, 8), prior=torch.ones(1)
    ),
    "prior must be at least 0": lambda: DomainGate(8, 1)(
        torch.zeros(1, 2, 8), prior=torch.tensor([1.0, -1.0])
    ),
    "labels must have shape [B=1, 1] or [B=1, T=2], got [1]": lambda: DomainGate(8, 1)(
        torch.zeros(1, 2, 8), labels=torch.tensor([1])
    ),
    "label_weights must be None without labels": lambda: DomainGate(8, 1)(
        torch.zeros(1, 2, 8), label_weights=torch.ones(1, 1)
    ),
    "label_weights must be at least 0 and finite, got -1.0": lambda: DomainGate(8, 1)(
        torch.zeros(1, 2, 8),
        labels=torch.tensor([[1]]),
        label_weights=torch.tensor([[1.0, -1.0]]),
    ),
    "label_weights must be at least 0 and finite, got inf": lambda: DomainGate(8, 1)(
        torch.zeros(1, 2, 8),
        labels=torch.tensor([[1]]),
        label_weights=torch.tensor([[1.0, float("inf")]]),
    ),
    "labels must be 0 for text of the base, 1 for that of specialists or -1": lambda: DomainGate(
        8, 1
    )(torch.zeros(1, 2, 8), labels=torch.tensor([[-2, 2]])),
    "mask must have shape [1] or [B=1, 1]": lambda: DomainGate(8, 1)(
        torch.zeros(1, 2, 8), mask=torch.ones(2)
    ),
    "name must be a specialist: specialist_0, got 'sql'": lambda: DomainGate(8, 1).row("sql"),
    "name must be a new one, got 'specialist_0'": lambda: DomainGate(8, 1).add_specialist(
        "specialist_0"
    ),
    "name must be letters": lambda: DomainGate(8).add_specialist("a.b"),
    "prior must be at least 0 and finite": lambda: DomainGate(8, 1).set_prior("specialist_0", -1.0),
}


@pytest.mark.parametrize("message", WRONG)
def test_names_the_wrong_argument(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WRONG[message]()
