"""Branch attention: its definition against loops and separate attention, and what it refuses."""

import re

import pytest
import torch
from branch_factories import branch_attention_loops, make_branch_inputs
from operator_contract import int32
from torch.nn import functional as F

from memattn import branch_attention
from memattn.testing import run_with_gradients

EQUAL = dict(rtol=1e-11, atol=1e-12)  # float64, another order of sums
CASES = {
    "token": (dict(empty=True), {}, {}),
    "sequence": (dict(form="sequence"), dict(is_causal=False), {}),
    "all": (dict(form="all", empty=True), {}, {}),
    "padded": (dict(empty=True), {}, dict(seq_start=[2, 0], seq_end=[8, 5])),
    "packed": (dict(B=1), {}, dict(cu_seqlens=[0, 1, 5, 5, 9])),
    "decode": (dict(T=3, S=9, form="all"), dict(query_offset=6), dict(seq_start=[-1, 7])),
}


@pytest.mark.parametrize("name", CASES)
def test_definition_is_the_loops(name):
    """Values and all gradients in float64."""
    sizes, options, bounds = CASES[name]
    tensors, own = make_branch_inputs(**{**dict(T=9, D=4, Dv=3), **sizes}, dtype=torch.float64)
    options = {**own, **options, **{n: int32(*v) for n, v in bounds.items()}}
    leaves = {n: x.requires_grad_() for n, x in tensors.items()}
    results = [branch_attention(**leaves, **options), branch_attention_loops(**leaves, **options)]
    generator = torch.Generator().manual_seed(1)
    grads = []
    for out, lse in results:
        generator.manual_seed(1)
        draw = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        finite = torch.where(lse.isneginf(), 0.0, lse)
        grads.append(torch.autograd.grad((out * draw).sum() + finite.sin().sum(), leaves.values()))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **EQUAL)
    for leaf, actual, expected in zip(leaves, *grads, strict=True):
        torch.testing.assert_close(actual, expected, **EQUAL, msg=f"d_{leaf}")


def test_a_gate_gets_its_ungated_result_and_an_inactive_slot_nothing():
    """Also a gate that is nearly 0, where ``out / gate`` would have no digits left."""
    tensors, _ = make_branch_inputs(T=9, form="all", dtype=torch.float64)
    tensors["gates"][0, :, 1] = 1e-300
    tensors["gates"][1, 2:5, 0] = 0.0
    results = run_with_gradients(branch_attention, tensors, {})
    ones = tensors | {"gates": torch.ones_like(tensors["gates"])}
    plain = run_with_gradients(branch_attention, ones, {})
    inactive = tensors["gates"] == 0
    gradient = results["d_gates"]
    assert not gradient[inactive].any()
    torch.testing.assert_close(gradient[~inactive], plain["d_gates"][~inactive], **EQUAL)
    off = inactive.transpose(1, 2)[:, :, None].expand_as(results["lse"])
    assert torch.equal(results["lse"].isneginf(), off)
    assert not results["out"][off].any() and not results["d_query"][off].any()


@pytest.mark.parametrize("is_causal", [True, False])
def test_every_branch_is_an_attention_of_its_own(is_causal):
    """All branches are calls of PyTorch's attention; one-hot gates are one of them."""
    tensors, _ = make_branch_inputs(T=13, form="all", dtype=torch.float64)
    q, k, v = (tensors[n] for n in ("query", "key", "value"))
    apart = F.scaled_dot_product_attention(
        *(x.flatten(0, 1) for x in (q, k, v)), is_causal=is_causal, enable_gqa=True
    ).unflatten(0, (2, 3))
    gated = tensors["gates"].transpose(1, 2)[:, :, None, :, None] * apart
    found = branch_attention(**tensors, is_causal=is_causal)
    torch.testing.assert_close(found.out, gated, **EQUAL)
    tensors["gates"] = F.one_hot(torch.tensor(1), 3).double().expand(2, 13, 3)
    out = branch_attention(**tensors, is_causal=is_causal).out
    torch.testing.assert_close(out[:, 1], apart[:, 1], **EQUAL)
    assert not out[:, [0, 2]].any()
    # two slots that hold the chosen branches
    indices = torch.tensor([2, 0], dtype=torch.int32).expand(2, 13, 2)
    slots = dict(query=q[:, [2, 0]], key=k, value=v, gates=torch.ones(2, 13, 2).double())
    found = branch_attention(**slots, branch_indices=indices, is_causal=is_causal)
    torch.testing.assert_close(found.out, apart[:, [2, 0]], **EQUAL)


def test_samples_of_a_batch_and_slots_of_a_token_do_not_know_of_each_other():
    tensors, options = make_branch_inputs(T=9, empty=True)
    found = branch_attention(**tensors, **options)
    swapped = {"query": tensors["query"].flip(1), "gates": tensors["gates"].flip(2)}
    indices = options["branch_indices"]
    other = branch_attention(**tensors | swapped, branch_indices=indices.flip(2))
    assert torch.equal(other.out.flip(1), found.out)
    changed = {name: x.clone() for name, x in tensors.items()}
    for x in changed.values():
        x[1] += 1.0
    assert torch.equal(branch_attention(**changed, **options).out[0], found.out[0])


WRONG = {
    "query must have 5 axes": dict(query=torch.zeros(2, 4, 9, 16)),
    "key must have 5 axes": dict(key=torch.zeros(2, 2, 9, 16)),
    "key must have shape [B=2, F, Hkv, S, D=16], got": dict(key=torch.zeros(2, 3, 2, 9, 8)),
    "key must have a number of heads that divides": dict(
        key=torch.zeros(2, 3, 3, 9, 16), value=torch.zeros(2, 3, 3, 9, 16)
    ),
    "key must have at least one branch": dict(
        key=torch.zeros(2, 0, 2, 9, 16), value=torch.zeros(2, 0, 2, 9, 16)
    ),
    "key must have the dtype of query": dict(key=torch.zeros(2, 3, 2, 9, 16).half()),
    "value must have shape [B=2, F=3, Hkv=2, S=9, Dv]": dict(value=torch.zeros(2, 2, 2, 9, 16)),
    "gates must be a tensor": dict(gates=1.0),
    "gates must have shape [B=2, T=9, A=2], got": dict(gates=torch.zeros(2, 9, 3)),
    "gates must have dtype torch.float32": dict(gates=torch.zeros(2, 9, 2).half()),
    "query must have A=3 slots, one for each branch, without": dict(branch_indices=None),
    "branch_indices must be a tensor": dict(branch_indices=[0, 1]),
    "branch_indices must have dtype": dict(branch_indices=torch.zeros(2, 9, 2)),
    "branch_indices must have shape [B=2, T=9, A=2]": dict(branch_indices=int32(0, 1)),
    "branch_indices must be from -1 to F - 1 = 2, got 3": dict(
        branch_indices=torch.full((2, 9, 2), 3)
    ),
    "branch_indices must be from -1 to F - 1 = 2, got -2": dict(
        branch_indices=torch.full((2, 9, 2), -2)
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_names_the_wrong_argument(message):
    tensors, options = make_branch_inputs(T=9)
    error = TypeError if "must be a tensor" in message else ValueError
    with pytest.raises(error, match=re.escape(message)):
        branch_attention(**{**tensors, **options, **WRONG[message]})
