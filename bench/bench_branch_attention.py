"""branch_attention under pytest-benchmark: number of branches, by token or sample, peers."""

from dataclasses import replace

import pytest
from timed import make_case, quick, time_competitor

from memattn.bench.branch_attention import CALL_PER_BRANCH, K_BRANCHES, BranchCase
from memattn.bench.engine import OURS

DIRECTIONS = ["forward", "backward"]


@quick
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("n_slots", [1, 2])
@pytest.mark.parametrize("n_branches", [1, 4, 16, 50])
@pytest.mark.parametrize("kind", ["token", "sample"])
def test_number_of_branches(benchmark, kind, n_branches, n_slots, direction):
    if n_slots > n_branches:
        pytest.skip("a token cannot be in more branches than there are")
    case = replace(make_case(BranchCase, kind), F=n_branches, K=n_slots)
    time_competitor(benchmark, case, OURS, direction)


@quick
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", ["layer-token", "layer-sample"])
def test_layer(benchmark, kind, direction):
    time_competitor(benchmark, replace(make_case(BranchCase, kind), F=16), OURS, direction)


@quick
@pytest.mark.parametrize("competitor", [K_BRANCHES, CALL_PER_BRANCH])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_peers(benchmark, direction, competitor):
    case = replace(make_case(BranchCase, "token"), F=4)
    time_competitor(benchmark, case, competitor, direction)
