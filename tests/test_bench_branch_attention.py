"""Cases of branch attention for the benchmark: work, definition, checks and peers."""

import pytest
import torch

from memattn.bench.branch_attention import CALL_PER_BRANCH, K_BRANCHES, BranchCase
from memattn.bench.result_check import ExpectedResults, check_peer, check_subject
from memattn.ops import branch_attention

pytestmark = pytest.mark.usefixtures("one_thread")


def small(kind, **sizes):
    return BranchCase(**{"kind": kind, "T": 33, "B": 2, "H": 4, "D": 8, "F": 5, **sizes})


def test_pairs_are_those_of_the_definition():
    # with all scores 0, lse is the log of the number of keys
    case = small("token", Hkv=2)
    inputs = case.inputs()
    inputs["query"].zero_()
    lse = branch_attention(**inputs, branch_indices=case.chosen()).lse
    assert case.work()["forward"].exps == round(lse.exp().sum().item())
    rows = case.chosen().flatten(0, 1).tolist()
    assert all(len(set(row)) == case.K for row in rows)
    assert small("sample").chosen().unique(dim=1).shape[1] == 1


@pytest.mark.parametrize("kind", BranchCase.kinds)
def test_the_gate_passes_what_is_right(kind):
    case = small(kind)
    whole = case.definition(slice(0, 33))(case.inputs())
    part = case.definition(slice(7, 20))(case.inputs())
    torch.testing.assert_close(part, whole[:, :, 7:20])
    check_subject(case, "auto", gradients=True)
    expected = ExpectedResults(case, gradients=True)
    check_peer(expected, case.peers()[CALL_PER_BRANCH].build(), gradients=True)
    assert case.peers()[K_BRANCHES].build()(case.inputs()).shape == whole.shape
    assert all(bar.case.operator == "branch_attention" for bar in case.bars("cpu-bars"))
