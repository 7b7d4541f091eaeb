"""PyTorch's attention with specialists beside it."""

import copy
import re

import pytest
import torch
from shiftable_factories import CAUSAL, LEFT, RIGHT, B, E, H, T, draw, make_layer, shake, shift
from torch import nn

from memattn.nn import DomainGate, ShiftableMultiheadAttention, ShiftableTransformerBlock
from memattn.testing import assert_within_budget

EQUAL = dict(rtol=1e-11, atol=1e-12)  # float64, another order of sums
GAP = torch.tensor([[False] * 6, [False, True, True, False, False, True]])


def each_alone(module):
    """The base and every specialist of a module as PyTorch's attention."""
    names = dict(q="q_proj_weight", k="k_proj_weight", v="v_proj_weight")
    found = [module.base]
    for name in module.gate.specialists:
        own, other = module.specialists[name], copy.deepcopy(module.base).requires_grad_(True)
        with torch.no_grad():
            if other._qkv_same_embed_dim:
                other.in_proj_weight.copy_(torch.cat([own.q_weight, own.k_weight, own.v_weight]))
            else:
                for n, at in names.items():
                    getattr(other, at).copy_(getattr(own, f"{n}_weight"))
            if other.in_proj_bias is not None:
                other.in_proj_bias.copy_(torch.cat([own.q_bias, own.k_bias, own.v_bias]))
                other.out_proj.bias.copy_(own.out_bias)
            other.out_proj.weight.copy_(own.out_weight)
        found.append(other)
    return found


HEADS = draw(B * H, T, T, seed=5)
CALLS = {
    "plain": (dict(), dict()),
    "causal": (dict(), dict(attn_mask=CAUSAL, is_causal=True)),
    "right": (dict(), dict(key_padding_mask=RIGHT)),
    "left-causal": (
        dict(),
        dict(
            key_padding_mask=torch.zeros(B, T).masked_fill(LEFT, -torch.inf),
            attn_mask=CAUSAL,
            is_causal=True,
        ),
    ),
    "added": (dict(), dict(key_padding_mask=torch.zeros(B, T).masked_fill(RIGHT, -torch.inf))),
    "gap": (dict(bias=False), dict(key_padding_mask=GAP)),
    "any": (dict(), dict(attn_mask=(HEADS[0] > 1.0).fill_diagonal_(False), key_padding_mask=RIGHT)),
    "heads": (dict(batch_first=False), dict(attn_mask=HEADS)),
    "sizes": (dict(kdim=5, vdim=3), dict()),
    "across": (dict(), dict(key_padding_mask=RIGHT)),
    "one": (dict(batch_first=False), dict()),
}


@pytest.mark.parametrize("name", CALLS)
def test_output_is_the_gated_sum_of_separate_attentions(name):
    """Values and all gradients in float64; with three slots, one and all; attention weights too."""
    sizes, masks = CALLS[name]
    torch.manual_seed(0)
    base = shake(nn.MultiheadAttention(E, H, **dict(batch_first=True) | sizes)).double()
    masks = {n: m.double() if torch.is_tensor(m) and m.is_floating_point() else m
             for n, m in masks.items()}  # fmt: skip
    shape = [T, E] if name == "one" else [T, B, E] if name == "heads" else [B, T, E]
    query = draw(*shape, dtype=torch.float64).requires_grad_()
    key, value = query, query
    if name in ("sizes", "across"):
        key, value = (draw(B, T, n, seed=n).double() for n in (5, 3)) if name == "sizes" else (
            draw(B, T, E, seed=3).double(), draw(B, T, E, seed=4).double())  # fmt: skip
    for top_k in (None, 1, 2):
        module = shift(base, n=3, top_k=top_k).train()
        out, attention, gates = module(query, key, value, **masks, return_gates=True)
        alone = each_alone(module)
        results = [attend(query, key, value, **masks) for attend in alone]
        torch.testing.assert_close(attention, results[0][1], rtol=0, atol=0, equal_nan=True)
        outs = torch.stack([r[0] for r in results], -1)
        shares = gates.gates[0] if name == "one" else gates.gates
        shares = shares.transpose(0, 1) if name == "heads" else shares
        if "key_padding_mask" in masks and key is query:
            hidden = {"gap": GAP, "left-causal": LEFT}.get(name, RIGHT)
            assert not shares[hidden].any()
            only = torch.tensor([1.0, 0, 0, 0]).double()
            shares = torch.where(hidden[..., None], only, shares)
        expected = (outs * shares[..., None, :]).sum(-1)
        cotangent = draw(*out.shape, seed=9).double()
        rows = shares.sum(-1) > 0
        if name == "left-causal":  # what precedes a sequence sees nothing
            rows = rows & ~LEFT
        torch.testing.assert_close(out[rows], expected[rows], **EQUAL)
        if name == "left-causal":
            continue
        grads = []
        for result, parameters in (
            (out, [module.specialists[n] for n in module.gate.specialists]), (expected, alone[1:])
        ):  # fmt: skip
            weights = [*(p.out_weight if hasattr(p, "out_weight") else p.out_proj.weight
                         for p in parameters)]  # fmt: skip
            grads.append(
                torch.autograd.grad(  # zeros for a specialist that no token uses
                    *((result * cotangent).sum(), [query, *weights]),
                    retain_graph=True,
                    materialize_grads=True,
                )
            )
        for actual, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(actual, wanted, **EQUAL)
        assert all(p.grad is None and not p.requires_grad for p in module.base.parameters())


def test_the_fused_path_keeps_the_error_rule_and_one_hot_gates_are_one_branch():
    torch.manual_seed(0)
    module = shift(shake(nn.MultiheadAttention(E, H, batch_first=True)))
    x = draw(B, T, E)
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])
    results = {}
    for dtype in (torch.float32, torch.float64):
        own = module.to(dtype)
        outs = torch.stack(
            [attend(x.to(dtype), *[x.to(dtype)] * 2)[0] for attend in each_alone(own)], -1
        )
        given = x.to(dtype)
        fused = own(given, given, given, domain_weights=weights)[0]
        results[dtype] = (fused, (outs * weights[:, None, None].to(dtype)).sum(-1))
        for b in range(B):  # together and apart
            row = given[b : b + 1]
            apart = own(row, row, row, domain_weights=weights[b : b + 1])[0]
            torch.testing.assert_close(apart, fused[b : b + 1])
    assert_within_budget("out", results[torch.float32][0], results[torch.float32][1],
                         results[torch.float64][1])  # fmt: skip
    torch.testing.assert_close(results[torch.float64][0][1], outs[1, ..., 2], **EQUAL)


@pytest.mark.parametrize("rank", [None, 2])
def test_specialists_begin_as_copies_and_are_trained_exported_and_removed_alone(rank):
    """Opening one moves the output by rounding alone; a step changes it and nothing else."""
    torch.manual_seed(0)
    base = shake(nn.MultiheadAttention(E, H, batch_first=True, dropout=0.5))
    module = ShiftableMultiheadAttention(E, H, base, 2, rank=rank).train()
    x = draw(B, T, E)
    lower = nn.Linear(E, E)
    with torch.no_grad():
        expected = base.eval()(x, x, x)[0]
    assert torch.equal(module(x, x, x)[0], expected)
    module.gate.set_prior("specialist_1", 1.0)
    torch.testing.assert_close(module(x, x, x)[0], expected)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    optimizer = torch.optim.SGD(module.specialist_parameters("specialist_1"), lr=0.5)
    for _ in range(2):
        hidden = lower(x)
        out = module(hidden, hidden, hidden)[0]
        optimizer.zero_grad()
        out.square().sum().backward()
        optimizer.step()
    assert lower.weight.grad.any()
    for name, tensor in module.state_dict().items():
        is_own = "specialist_1" in name and not name.endswith(("prior", "k_bias"))
        assert torch.equal(tensor, before[name]) != is_own or "k_bias" in name, name
    # it goes to another model with the same base, closed specialists and all
    other = ShiftableMultiheadAttention(E, H, copy.deepcopy(base), 1, rank=rank)
    other.load_specialist_state("specialist_0", module.export_specialist_state("specialist_1"))
    assert torch.equal(other(x, x, x)[0], module(x, x, x)[0])
    module.remove_specialist("specialist_1")
    assert torch.equal(module(x, x, x)[0], expected)
    fresh = ShiftableMultiheadAttention(E, H, base, 1, rank=3)
    with pytest.raises(ValueError, match="state must be of this model, with .* as"):
        fresh.load_specialist_state("specialist_0", other.export_specialist_state("specialist_0"))
    with pytest.raises(ValueError, match="name must be a specialist: specialist_0, got 'sql'"):
        module.export_specialist_state("sql")


WRONG = {
    "base_mha must have embed_dim=d_model=16, got 8": lambda a: ShiftableMultiheadAttention(
        16, 2, a
    ),
    "base_mha must have num_heads=4, got 2": lambda a: ShiftableTransformerBlock(8, 4, 16, a),
    "base_mha must be an nn.MultiheadAttention, got NonDyn": lambda a: ShiftableTransformerBlock(
        8, 2, 16, a.out_proj
    ),
    "base_mha must have dim_feedforward=32, got 16": lambda a: ShiftableTransformerBlock(
        8, 2, 32, make_layer()
    ),
    "dropout must be None where base_mha is a layer": lambda a: ShiftableTransformerBlock(
        8, 2, 16, make_layer(), dropout=0.1
    ),
    "base_mha must be a layer without specialists": lambda a: ShiftableTransformerBlock.from_layer(
        ShiftableTransformerBlock.from_layer(make_layer())
    ),
    "base_mha must have no add_bias_kv": lambda a: ShiftableMultiheadAttention(
        8, 2, nn.MultiheadAttention(8, 2, add_bias_kv=True)
    ),
    "gate must have hidden_size=8 and no specialists yet": lambda a: ShiftableMultiheadAttention(
        8, 2, a, gate=DomainGate(8, 1)
    ),
    "rank must be at least 1": lambda a: ShiftableMultiheadAttention(8, 2, a, 1, rank=0),
    "scope must be token or prefix in a causal model": lambda a: shift(a, scope="sequence")(
        *[draw(B, T, E)] * 3, attn_mask=CAUSAL
    ),
    "domain_prior must have shape [3] or [B=2, 3], got []": lambda a: shift(a)(
        *[draw(B, T, E)] * 3, domain_prior=torch.tensor(1.0)
    ),
    "domain_mask must have shape [2] or [B=2, 2], got [3]": lambda a: ShiftableMultiheadAttention(
        8,
        2,
        a,
        2,  # closed
    )(*[draw(B, T, E)] * 3, domain_mask=torch.ones(3, dtype=torch.bool)),
    "domain_weights must be at least 0 and sum to 1": lambda a: shift(a)(
        *[draw(B, T, E)] * 3, domain_weights=torch.tensor([[0.5, 0.0, 0.0]] * B)
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_names_the_wrong_argument(message):
    errors = (ValueError, TypeError, NotImplementedError)
    with pytest.raises(errors, match=re.escape(message)):
        WRONG[message](nn.MultiheadAttention(8, 2, batch_first=True))
